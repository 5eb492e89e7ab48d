"""Describe any adapted model: ours by their own word, PEFT's LoRA as 32-bit matrices of its rank."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.description import LayerDescription
from bayeslora.methods.tuner import BayesTuner


def tuner_of(model: nn.Module) -> BayesTuner | None:
    """The method's tuner inside `model` (a PEFT model, possibly wrapped for distributed training), or None."""
    for module in model.modules():
        if isinstance(module, BayesTuner):
            return module
    return None


def describe(model: nn.Module, adapter_name: str | None = None) -> list[LayerDescription]:
    """One `LayerDescription` for every adapted layer of `model`, in model order; empty for a model without adapters.

    Args:
        model: a PEFT model, with one of this library's methods or with LoRA.
        adapter_name: which adapter; by default the active one.

    Raises:
        BayesLoraError: if the model has no adapter of that name.
    """
    tuner = tuner_of(model)
    if tuner is not None:
        found = tuner.describe(adapter_name)
    else:
        root = getattr(getattr(model, "base_model", model), "model", model)
        layers = [(path, m) for path, m in root.named_modules() if isinstance(m, LoraLayer)]
        found = [_describe_lora(path, layer, adapter_name) for path, layer in layers]
        found = [layer for layer in found if layer.initial_rank or adapter_name is None]
    if adapter_name is not None and not found:
        raise BayesLoraError(f"the model has no adapter {adapter_name!r}: name one of its adapters")
    return found


def _describe_lora(path: str, layer: LoraLayer, adapter_name: str | None) -> LayerDescription:
    name = adapter_name or layer.active_adapters[0]
    rank = layer.r.get(name, 0)
    d_in, d_out = int(layer.in_features or 0), int(layer.out_features or 0)
    return LayerDescription(path, d_in, d_out, rank, rank, parameters=rank * (d_in + d_out))
