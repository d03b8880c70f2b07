"""Really remove layers: a model without them, in memory, on disk, and as a mergekit recipe."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import yaml
from numpy.typing import ArrayLike
from torch import nn

from core.blocks import BlockStack, copy_sharing_weights
from core.errors import LayerShapError
from core.game import check_masks
from core.masks import dropped_layers
from core.models import LayeredModel, ModelInfo

# Names under which blocks and their parts remember their own position.
POSITION_NAMES = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
PROVENANCE_FILE = "layershap.json"


def prune(model: LayeredModel, keep: ArrayLike) -> LayeredModel:
    """The model without its dropped layers; weights are shared with `model`, not copied.

    Depth, per-layer lists in the configuration and every block's own position agree, so the result
    generates and saves like any other model.

    Args:
        keep: bool [n_layers], True = kept.

    Raises:
        LayerShapError: no layer is kept, or this architecture cannot be described without the
            dropped layers.
    """
    [mask] = check_masks(keep, model.n_layers)
    if not mask.any():
        raise LayerShapError("No layers are kept; keep at least one.")
    kept = [layer for layer, stays in enumerate(mask) if stays]
    module = copy_sharing_weights(model.module)
    parent_path, _, name = model.stack.path.rpartition(".")
    parent = module.get_submodule(parent_path)
    blocks = nn.ModuleList(getattr(parent, name)[layer] for layer in kept)
    setattr(parent, name, blocks)
    for position, block in enumerate(blocks):
        for part in block.modules():
            for attribute in POSITION_NAMES:
                if isinstance(part.__dict__.get(attribute), int):
                    setattr(part, attribute, position)
    config = _shortened_config(model, kept)
    for part in module.modules():
        if part.__dict__.get("config") is not None:
            part.config = _matching(part.config, config)
    _check_describable(module)
    return LayeredModel(
        module,
        model.tokenizer,
        BlockStack(
            model.stack.path, tuple(blocks), tuple(model.stack.returns[layer] for layer in kept)
        ),
        replace(
            model.info,
            n_layers=len(kept),
            parameters=sum(p.numel() for p in module.parameters()),
            block_parameters=tuple(model.info.block_parameters[layer] for layer in kept),
        ),
    )


def save_pruned(
    model: LayeredModel,
    keep: ArrayLike,
    folder: str | Path,
    progress: Callable[[str, float | None], None] | None = None,
) -> Path:
    """Write the pruned model, its tokenizer and the cut to a new folder.

    Plain `AutoModelForCausalLM.from_pretrained(folder)` loads it. The folder appears at once when
    it is whole.

    Raises:
        LayerShapError: the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder).expanduser()
    report = progress or (lambda stage, fraction: None)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LayerShapError(f"{folder} exists already; choose another name.")
    pruned = prune(model, keep)
    report("Writing the pruned model", None)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as scratch:
            made = Path(scratch) / "model"
            pruned.module.save_pretrained(made)
            if pruned.tokenizer is not None:
                pruned.tokenizer.save_pretrained(made)
            (made / PROVENANCE_FILE).write_text(json.dumps(_provenance(model, keep), indent=1))
            if folder.exists():
                folder.rmdir()
            shutil.move(made, folder)
    except OSError as error:
        raise LayerShapError(
            f"The pruned model could not be written to {folder} ({error.strerror or error}); free "
            "some space or choose another place."
        ) from error
    report("Saved", 1.0)
    return folder


def mergekit_yaml(info: ModelInfo, keep: ArrayLike, location: str | None = None) -> str:
    """A mergekit `passthrough` recipe of the same cut; layer ranges end before their last number.

    Args:
        location: the folder or Hub id to read the model from; by default where it came from.

    Raises:
        LayerShapError: no layer is kept.
    """
    [mask] = check_masks(keep, info.n_layers)
    if not mask.any():
        raise LayerShapError("No layers are kept; keep at least one.")
    runs = [
        [layer for layer, _ in run]
        for kept, run in groupby(enumerate(mask), key=lambda item: bool(item[1]))
        if kept
    ]
    recipe = {
        "merge_method": "passthrough",
        "dtype": info.dtype,
        "slices": [
            {"sources": [{"model": location or info.source, "layer_range": [run[0], run[-1] + 1]}]}
            for run in runs
        ],
    }
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=200)


def continue_prompt(
    model: LayeredModel,
    prompt: str,
    *,
    max_new_tokens: int = 40,
    stop: Callable[[], bool] | None = None,
) -> Iterator[str]:
    """Continue a prompt greedily; yield the continuation so far, again after every word.

    Raises:
        LayerShapError: the prompt is empty, or leaves no room in the model's context.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    if model.tokenizer is None:
        raise LayerShapError("This model has no tokenizer, so it cannot continue text.")
    inputs = model.tokenizer(prompt, return_tensors="pt").to(model.device)
    length, context = inputs["input_ids"].shape[1], model.info.context_length
    if length == 0:
        raise LayerShapError("The prompt is empty; type the beginning of a text.")
    if context is not None and length + max_new_tokens > context:
        raise LayerShapError(
            f"The prompt has {length} tokens; with {max_new_tokens} new ones that is more than "
            f"this model's context of {context}."
        )

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
            stopped = bool(stop and stop())
            return torch.full((len(input_ids),), stopped, device=input_ids.device)

    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[Exception] = []

    def generate() -> None:
        try:
            model.module.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([Stop()]),
                pad_token_id=model.tokenizer.pad_token_id or model.tokenizer.eos_token_id,
            )
        except Exception as error:
            failures.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    text = ""
    for piece in streamer:
        text += piece
        yield text
    thread.join()
    if failures:
        raise failures[0]


def _shortened_config(model: LayeredModel, kept: list[int]) -> Any:
    config = deepcopy(model.module.config)
    text = config.get_text_config()
    n = model.n_layers
    for name, value in list(vars(text).items()):
        # A list as long as the model is deep describes its layers one by one.
        if isinstance(value, list) and len(value) == n and not name.endswith("token_id"):
            setattr(text, name, [value[layer] for layer in kept])
    text.num_hidden_layers = len(kept)
    return config


def _matching(current: Any, config: Any) -> Any:
    """The shortened counterpart of one module's configuration."""
    if type(current) is type(config):
        return config
    text = config.get_text_config()
    return text if type(current) is type(text) else current


def _check_describable(module: nn.Module) -> None:
    """Build the architecture from the new configuration and see that it has the same weights."""
    message = (
        f"{type(module).__name__} derives what a layer is from its position, so this cut cannot be "
        "written as a model of its own; its measured perplexity still holds."
    )
    try:
        with torch.device("meta"):
            fresh = type(module)(deepcopy(module.config))
    except Exception as error:
        raise LayerShapError(message) from error
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in m.state_dict().items()}
        for m in (fresh, module)
    ]
    if shapes[0] != shapes[1]:
        raise LayerShapError(message)


def _provenance(model: LayeredModel, keep: ArrayLike) -> dict[str, Any]:
    [mask] = check_masks(keep, model.n_layers)
    return {
        "source": model.info.source or model.info.name,
        "revision": model.info.revision,
        "source_fingerprint": model.info.fingerprint,
        "source_layers": model.n_layers,
        "dropped_layers": dropped_layers(mask),
    }
