"""A second model over the same base weights, for an export to cut and merge while the caller's stays as it is."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from torch import nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.tuner import BayesTuner, tuner_of


def adapted_parts(model: nn.Module, adapter_name: str | None) -> tuple[PeftModel, BayesTuner, str]:
    """The PEFT model inside `model`, its tuner, and the name of the adapter, by default the active one.

    Raises:
        BayesLoraError: if the model has no adapter of this library, or none of that name.
    """
    tuner = tuner_of(model)
    inner = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if tuner is None or inner is None:
        raise BayesLoraError(f"{type(model).__name__} has no adapter of bayeslora: there is nothing of it to export")
    name = adapter_name or tuner.active_adapters[0]
    if name not in inner.peft_config:
        raise BayesLoraError(f"the model has no adapter {name!r}: name one of its adapters")
    return inner, tuner, name


def sharing_base(model: PeftModel, tuner: BayesTuner) -> PeftModel:
    """A copy of `model` with adapters of its own, whose base weights are in the memory of the original's."""
    own = {
        id(tensor)
        for layer in tuner.adapted_layers()
        for name, child in layer.named_children()
        if name != "base_layer"
        for tensor in (*child.parameters(), *child.buffers())
    }
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers() if id(buffer) not in own}
    for parameter in model.parameters():
        if id(parameter) not in own:
            shared[id(parameter)] = _second(parameter)
    for layer in tuner.adapted_layers():
        cached = getattr(getattr(layer, "frozen_weight", None), "cached", None)
        if cached is not None:
            shared[id(cached)] = cached
    return copy.deepcopy(model, shared)


def _second(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter over the same memory, whose `.data` can be replaced; those of other classes stay shared."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
