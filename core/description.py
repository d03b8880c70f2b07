"""The configuration of a model with fewer layers, and whether it describes what is left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from core.errors import LayerShapError
from core.models import LayeredModel
from core.quantization import quantization_settings

# Names under which blocks and their parts remember their own position.
POSITION_NAMES = (
    "layer_idx",
    "layer_id",
    "layer_number",
    "layer_num",
    "layer_index",
    "block_idx",
    "block_id",
)
# Names under which configurations state how many layers there are.
DEPTH_NAMES = (
    "num_hidden_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)
# Attributes that say how a module is being used, not what it computes.
USAGE_NAMES = ("training", "gradient_checkpointing")


def shortened_config(model: LayeredModel, kept: list[int]) -> Any:
    """A copy of the model's configuration that describes the kept layers only, in their order."""
    config = deepcopy(model.module.config)
    text = config.get_text_config()
    n = model.n_layers
    # Settings of single layers by their number; what they override can only be read without them.
    by_layer = text.to_dict().get("per_layer_config")
    if by_layer:
        text.per_layer_config = None
    for name, value in list(vars(text).items()):
        if _counts_first_layers(name, value, n):
            setattr(text, name, sum(layer < value for layer in kept))
        if not isinstance(value, list):
            continue
        if "layer" in name and _are_layer_numbers(value, n):
            setattr(text, name, [kept.index(layer) for layer in value if layer in kept])
        elif len(value) == n and not name.endswith("token_id"):
            # A list as long as the model is deep describes its layers one by one.
            setattr(text, name, [value[layer] for layer in kept])
    depths = [name for name in DEPTH_NAMES if getattr(text, name, None) == n]
    for name in depths or DEPTH_NAMES[:1]:
        setattr(text, name, len(kept))
    if by_layer:
        settings = {int(layer): values for layer, values in by_layer.items()}
        text.per_layer_config = {
            kept.index(layer): values for layer, values in settings.items() if layer in kept
        }
    return config


def _counts_first_layers(name: str, value: Any, n: int) -> bool:
    """Whether a setting says how many layers, from the first on, have no experts."""
    return "dense" in name and type(value) is int and 0 < value <= n


def _are_layer_numbers(values: Sequence[Any], n: int) -> bool:
    """Whether a list names some layers, such as those with experts, rather than describing all."""
    numbers = all(type(value) is int and 0 <= value < n for value in values)
    return numbers and all(first < second for first, second in pairwise(values))


def matching(current: Any, config: Any) -> Any:
    """The shortened counterpart of one module's configuration."""
    if type(current) is type(config):
        return config
    text = config.get_text_config()
    return text if type(current) is type(text) else current


def match_description(module: nn.Module, path: str) -> None:
    """Renumber the blocks under `path` as in a model built from the configuration alone.

    What plain transformers will build from the saved files must have the same weights and, in its
    blocks, the same settings.

    Raises:
        LayerShapError: it would not, because the architecture derives them from the position.
    """
    message = (
        f"{type(module).__name__} derives what a layer is from its position or from how many there "
        "are, so this cut cannot be written as a model of its own; its measured perplexity still "
        "holds."
    )
    config = module.config
    try:
        # As it would be read from a file, where transformers marks numbers that JSON does not have.
        settings = json.loads(config.to_json_string(), object_hook=_marked_number)
        saved = type(config).from_dict(settings)
        with torch.device("meta"):
            fresh = type(module)(saved)
    except Exception as error:
        raise LayerShapError(message) from error
    packed = quantization_settings(config) is not None
    if not packed and _shapes(fresh) != _shapes(module):
        raise LayerShapError(message)
    described = dict(fresh.get_submodule(path).named_modules())
    for name, part in module.get_submodule(path).named_modules():
        if type(described.get(name)) is not type(part):
            # In the place of a linear layer, a quantized model has one that unpacks its weights.
            if packed and isinstance(described.get(name), nn.Linear):
                continue
            raise LayerShapError(message)
        wanted = _settings(described[name])
        for position in POSITION_NAMES:
            if position in wanted:
                setattr(part, position, wanted[position])
        if _settings(part) != wanted:
            raise LayerShapError(message)


def _marked_number(part: dict) -> Any:
    return float(part["__float__"]) if part.keys() == {"__float__"} else part


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _settings(part: nn.Module) -> dict[str, Any]:
    """The plain values a module was built with."""
    return {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, bool | int | float | str | None)
        and not name.startswith("_")
        and name not in USAGE_NAMES
    }
