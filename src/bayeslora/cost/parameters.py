"""Parameter counts of a model with or without adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from bayeslora.cost.structure import is_adapted


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count a model's parameters.

    Returns:
        trainable: parameters that the optimizer changes (`requires_grad`), including the task head.
        adapter: parameters of the adapters, trainable or frozen: the low-rank matrices, and the diagonal, gates and
            ranges of the methods that have them.
        total: all parameters, including the base model; weights packed in 4 bits count at their original number.

    A tensor that several modules share counts once.
    """
    layers = [module for module in model.modules() if is_adapted(module)]
    adapter = {id(parameter) for layer in layers for parameter in added_parameters(layer)}
    sizes = {id(parameter): (_size(parameter), parameter.requires_grad) for parameter in model.parameters()}
    return {
        "trainable": sum(size for size, trainable in sizes.values() if trainable),
        "adapter": sum(size for key, (size, _) in sizes.items() if key in adapter),
        "total": sum(size for size, _ in sizes.values()),
    }


def added_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters that an adapter layer adds to its base layer."""
    yield from layer.parameters(recurse=False)
    for name, child in layer.named_children():
        if name != "base_layer":
            yield from child.parameters()


def _size(parameter: nn.Parameter) -> int:
    # bitsandbytes packs two 4-bit weights in a byte and keeps the original shape.
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)
