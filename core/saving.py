"""Cuts as folders that plain transformers loads.

A branch that is dropped alone is written with zeros for weights, so that any program computes the
same; the folder also says which those are, and `load_pruned` skips them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from torch import nn

from core.blocks import copy_sharing_weights
from core.card import CARD_FILE, Measured, model_card, origin
from core.cut import Cut, one_mask
from core.errors import LayerShapError
from core.loading import auto_class, load_model
from core.models import LayeredModel
from core.players import ATTENTION, BRANCH_NAMES, MLP
from core.pruning import prune
from core.quantization import check_packing
from core.recipe import mergekit_yaml
from core.sub_blocks import Silenced

PROVENANCE_FILE = "layershap.json"
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def load_pruned(source: str, **settings: Any) -> LayeredModel:
    """Load a model as `load_model` does; of a folder that `save_pruned` made, branches that the
    cut dropped are skipped instead of computed with zeros.

    Raises:
        LayerShapError: the model cannot be loaded, or what it says of its cut is damaged.
    """
    model = load_model(source, **settings)
    saved = Path(model.module.name_or_path) / PROVENANCE_FILE
    if not saved.is_file():
        return model
    keep = np.ones((model.n_layers, 2), dtype=bool)
    try:
        skipped = json.loads(saved.read_text(encoding="utf-8")).get("skipped_branches", {})
        for branch, name in ((ATTENTION, "attention"), (MLP, "mlp")):
            keep[[_position(layer, model.n_layers) for layer in skipped.get(name, [])], branch] = (
                False
            )
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise LayerShapError(
            f"{saved} is damaged ({error}); delete it to load the model without skipping."
        ) from error
    if keep.all():
        return model
    with _speaking(model.blocks):
        model.branches  # noqa: B018 (found now, and remembered)
    return prune(model, keep.ravel())


def save_pruned(
    model: LayeredModel,
    keep: ArrayLike,
    folder: str | Path,
    progress: Callable[[str, float | None], None] | None = None,
    measured: Measured | None = None,
) -> Path:
    """Write the pruned model, its tokenizer, the cut and a model card to a new folder.

    Plain `AutoModelForCausalLM.from_pretrained(folder)` loads it; `load_pruned(folder)` also skips
    branches that were dropped alone. The folder appears at once when it is whole.

    Args:
        measured: what the card may say of this cut.

    Raises:
        LayerShapError: the folder exists and is not empty, or cannot be written.
    """
    pruned = prune(model, keep)
    whole = Cut.of(model, keep).whole
    check_saving(pruned)
    # mergekit knows layers of text models.
    known = whole and not model.info.tower_parameters
    recipe = mergekit_yaml(model.info, keep, origin(model).location) if known else None
    card = model_card(
        model,
        pruned,
        one_mask(keep, model.n_layers),
        measured=measured,
        recipe=recipe,
    )
    return write_model(pruned, folder, provenance(model, keep), card, progress)


def check_saving(pruned: LayeredModel) -> None:
    """Refuse to save a pruned model that could not be read back as it is.

    Raises:
        LayerShapError: it could not.
    """
    check_packing(pruned.module, pruned.stack.path)
    silenced = any(isinstance(part, Silenced) for part in pruned.module.modules())
    if silenced and pruned.info.quantization:
        raise LayerShapError(
            "Quantized weights cannot be made zero, which a saved model needs where a part of a "
            "layer is dropped; drop whole layers, or cut the unquantized model."
        )
    if auto_class(pruned.module.config) is None:
        raise LayerShapError(
            f"transformers cannot read a {type(pruned.module).__name__} by itself, so this cut "
            "cannot be saved; its measured perplexity still holds."
        )


def write_model(
    model: LayeredModel,
    folder: str | Path,
    made_by: Mapping[str, Any],
    card: str,
    progress: Callable[[str, float | None], None] | None = None,
) -> Path:
    """Write a model that is already pruned, its tokenizer, provenance and card to a new folder.

    Raises:
        LayerShapError: the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder).expanduser()
    report = progress or (lambda stage, fraction: None)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LayerShapError(f"{folder} exists already; choose another name.")
    report("Writing the model", None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as scratch:
            made = Path(scratch) / "model"
            # Packed weights cannot be turned back into the format they were first read from.
            _neutral(model.module).save_pretrained(
                made, save_original_format=not model.info.quantization
            )
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(made)
            _copy_processors(Path(model.module.name_or_path), made)
            (made / PROVENANCE_FILE).write_text(json.dumps(made_by, indent=1), encoding="utf-8")
            (made / CARD_FILE).write_text(card, encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            shutil.move(made, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LayerShapError(
            f"The model could not be written to {folder} ({reason}); free some space or choose "
            "another place."
        ) from error
    report("Saved", 1.0)
    return folder


def _copy_processors(source: Path, made: Path) -> None:
    """Take along what prepares images and sound for a model's towers, which a cut leaves as is."""
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, made / name)


def _neutral(module: nn.Module) -> nn.Module:
    """The model with zeros for the weights of skipped branches, which plain transformers needs."""
    if not any(isinstance(part, Silenced) for part in module.modules()):
        return module
    whole = copy_sharing_weights(module)
    for parent in list(whole.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Silenced):
                # A deep copy of what was silenced, because its weights are not the module's.
                for parameter in child.part.parameters():
                    parameter.data.zero_()
                setattr(parent, name, child.part)
    return whole


@contextmanager
def _speaking(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Give weights that are all zero others for a while: what a branch does shows only then."""
    silent = [p for block in blocks for p in block.parameters() if not p.any()]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in silent:
            noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            parameter.data.copy_(noise)
        yield
    finally:
        for parameter in silent:
            parameter.data.zero_()


def _position(layer: Any, n_layers: int) -> int:
    if type(layer) is not int or not 0 <= layer < n_layers:
        raise ValueError(f"{layer!r} is not one of its layers")
    return layer


def provenance(model: LayeredModel, keep: ArrayLike) -> dict[str, Any]:
    """What a cut was made of; a local model goes by its name, for the file may be shared."""
    cut = Cut.of(model, keep)
    gone = [layer for layer in range(model.n_layers) if layer not in cut.layers]
    made_of = {
        "source": origin(model).name,
        "revision": model.info.revision,
        "source_fingerprint": model.info.fingerprint,
        "source_layers": model.n_layers,
        "dropped_layers": gone,
    }
    if cut.whole:
        return made_of
    kept = np.array(cut.layers)
    return {
        **made_of,
        **{
            f"dropped_{BRANCH_NAMES[branch].lower()}": kept[cut.skipping(branch)].tolist()
            for branch in (ATTENTION, MLP)
        },
        # Numbers of the pruned model's own blocks: what `load_pruned` skips.
        "skipped_branches": {
            BRANCH_NAMES[branch].lower(): cut.skipping(branch) for branch in (ATTENTION, MLP)
        },
    }
