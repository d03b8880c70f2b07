"""The model card of a saved cut: what was dropped, from what, and what was measured of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from core.loading import auto_class
from core.masks import dropped_players
from core.models import BUNDLED, LayeredModel
from core.players import players_of_mask
from core.text_info import TextInfo

if TYPE_CHECKING:
    from core.healing import Healing

CARD_FILE = "README.md"
# The note that a converted model's folder holds of where its weights are from.
ORIGIN_FILE = "origin.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]*")
_LINK = re.compile(r"https://[\w./~%#?=&-]+")
# What markdown could take for markup, and the colon that would make an address a link.
_MARKUP = re.compile(r"([\\`*_{}\[\]#!|~$:])")


LEGEND = "; a is an attention alone, m an MLP"


@dataclass(frozen=True)
class Perplexities:
    """Perplexity of the full, the pruned and the healed model on one text; None if not measured."""

    full: float
    pruned: float
    healed: float | None = None


@dataclass(frozen=True)
class Measured:
    """What was measured of a cut, and on which text."""

    text: TextInfo
    held_out: Perplexities
    calibration: Perplexities


@dataclass(frozen=True)
class Origin:
    """Where a model is from, as others may know it: never a path on this machine.

    Attributes:
        name: Hub id, "bundled", or a folder's or file's own name.
        base_model: the Hub id of its weights, where it is known.
        licence: licence entries for a model card's front matter, where the source states them.
    """

    name: str
    base_model: str | None
    licence: Mapping[str, str]

    @property
    def location(self) -> str:
        """What another machine would load it by."""
        return self.base_model or self.name


def origin(model: LayeredModel) -> Origin:
    """Where a model is from, by its source and the notes and card in its folder."""
    source = model.info.source
    folder = Path(model.module.name_or_path or "/nowhere")
    note = _origin_note(folder)
    if source == BUNDLED:
        name = BUNDLED
    elif _HUB_ID.fullmatch(source) and not Path(source).exists():
        name, note = source, {**note, "model": source}
    else:
        name = Path(source).name or model.info.name
    base = note.get("model")
    base_model = base if isinstance(base, str) and _HUB_ID.fullmatch(base) else None
    licence = _licence(folder, model.module.config, note.get("licence"))
    return Origin(name, base_model, licence)


def model_card(
    full: LayeredModel,
    pruned: LayeredModel,
    keep: NDArray[np.bool_],
    *,
    measured: Measured | None = None,
    healing: Healing | None = None,
    recipe: str | None = None,
) -> str:
    """A model card in markdown, with front matter that the Hugging Face Hub reads.

    Args:
        full: the model that layers were dropped from.
        pruned: the model that is saved.
        keep: the mask of what `pruned` has of `full`, of whole layers or of parts.
        measured: perplexities; without them the card says that nothing was measured.
        healing: how the model was trained after the cut, if it was.
        recipe: a mergekit recipe that makes the same model, if there is one.
    """
    came_from = origin(full)
    healed = healing is not None
    players = players_of_mask(len(keep), full.n_layers)
    dropped = dropped_players(keep)
    layers = players.labels(dropped) or "none"
    apart = players.whole_layers(dropped) is None
    count = len(dropped) if apart else len(dropped) // players.per_layer
    noun = "attention and MLP branches" if apart else "layers"
    total = players.count if apart else players.n_layers
    what = f"{count} of its {total} {noun} dropped"
    then = " and a short LoRA fine-tune after it" if healed else ""
    parts = [
        _front_matter(came_from, healed),
        f"# {plain(came_from.location)} without layers {layers}",
        f"{plain(came_from.location)} with {what}{then}. Plain "
        f"`{_loader(pruned)}.from_pretrained` loads it.",
        "## The cut",
        _table(
            ("", ""),
            [
                ("Source", plain(came_from.location)),
                ("Revision", plain(full.info.revision or "not named")),
                ("Fingerprint of the source", plain(full.info.fingerprint)),
                (f"Dropped layers (the first is 0{LEGEND if apart else ''})", layers),
                ("Layers left", f"{pruned.n_layers} of {full.n_layers}"),
                ("Number format", plain(pruned.info.quantization or pruned.info.dtype)),
            ],
        ),
        "## Measured",
        _measurements(full, pruned, measured, healed),
    ]
    if healing is not None:
        parts += ["## Healing", _healing(healing)]
    if recipe:
        parts += ["## The same cut as a mergekit recipe", _fenced("yaml", recipe)]
    packages = ("torch", "transformers", "peft") if healed else ("torch", "transformers")
    made_with = ", ".join(f"{package} {version(package)}" for package in packages)
    parts.append(f"Made with LayerShap, {made_with}.")
    return "\n\n".join(parts) + "\n"


def plain(text: object) -> str:
    """Text that markdown shows as it is: one line, nothing in it a link, a tag or markup."""
    shown = "".join(letter if letter.isprintable() else " " for letter in str(text))
    return _MARKUP.sub(r"\\\1", escape(" ".join(shown.split()), quote=False))


def _loader(model: LayeredModel) -> str:
    """The name of the transformers class that loads a saved cut."""
    found = auto_class(model.module.config)
    return "AutoModelForCausalLM" if found is None else found.__name__


def _front_matter(came_from: Origin, healed: bool) -> str:
    entries: dict[str, Any] = {"base_model": came_from.base_model} if came_from.base_model else {}
    entries |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    entries |= came_from.licence
    entries["tags"] = ["layershap", "layer-pruning", *(["lora-healed"] if healed else [])]
    return f"---\n{yaml.safe_dump(entries, sort_keys=False)}---"


def _measurements(
    full: LayeredModel, pruned: LayeredModel, measured: Measured | None, healed: bool
) -> str:
    names = ("full", "pruned", "healed") if healed else ("full", "pruned")
    rows = []
    if measured is not None:
        for title, of in (
            ("Held-out perplexity", measured.held_out),
            ("Calibration perplexity", measured.calibration),
        ):
            rows.append((title, *(_perplexity(getattr(of, name)) for name in names)))
    sizes = (full.info.parameters, *[pruned.info.parameters] * (len(names) - 1))
    rows.append(("Parameters", *(f"{size / 1e6:,.1f} M" for size in sizes)))
    table = _table(("", *names), rows)
    if measured is None:
        return f"{table}\n\nThe perplexity of this cut was not measured."
    text = measured.text
    trained = " or what it was trained on" if healed else ""
    return (
        f"{table}\n\nText: {plain(text.source)}; {text.blocks} calibration and "
        f"{text.held_out_blocks} held-out blocks of {text.block_length} tokens "
        f"(fingerprints {plain(text.calibration_fingerprint)} and "
        f"{plain(text.held_out_fingerprint)}). No held-out text is among the calibration "
        f"text{trained}."
    )


def _healing(healing: Healing) -> str:
    settings = [(name.replace("_", " "), str(v)) for name, v in asdict(healing.settings).items()]
    rows = [
        *settings,
        ("steps made", str(len(healing.curve.losses))),
        ("step whose weights were kept", str(healing.kept_step)),
        ("training blocks", f"{healing.training_blocks} of {healing.block_length} tokens"),
    ]
    return (
        "LoRA adapters on every linear layer of the remaining blocks, trained on next tokens of "
        "the calibration side of the text and merged into the weights.\n\n"
        + _table(("setting", "value"), rows)
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _fenced(language: str, content: str) -> str:
    """A code block whose fence is longer than any in its content."""
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"


def _perplexity(value: float | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:,.2f}" if math.isfinite(value) else "not finite"


def _origin_note(folder: Path) -> dict[str, Any]:
    try:
        note = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _licence(folder: Path, config: Any, noted: Any) -> dict[str, str]:
    """Front matter entries: from the model's own card, else from its note or configuration."""
    from huggingface_hub import ModelCard

    try:
        stated = ModelCard.load(folder / CARD_FILE).data.to_dict()
    except Exception:
        # No card, or one that is not a card: a licence is stated only where it is known.
        stated = {}
    name = stated.get("license") or noted or getattr(config, "license", None)
    if not isinstance(name, str) or not _LICENCE.fullmatch(name):
        return {}
    found = {"license": name.lower()}
    for key, form in (("license_name", _LICENCE), ("license_link", _LINK)):
        if isinstance(stated.get(key), str) and form.fullmatch(stated[key]):
            found[key] = stated[key]
    return found
