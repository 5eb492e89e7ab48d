"""Checks and factors of a trained LoRA adapter that plain matrices A and B describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.posterior.saved import check_unmerged

_UNUSUAL = (
    *("use_dora", "lora_bias", "target_parameters", "trainable_token_indices"),
    *("layer_replication", "alora_invocation_tokens"),
)
"""Fields of a LoRA config that make the adapter more than A and B beside linear layers."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of the initializations that take the initial update out of the base weights."""


def only_lora(model: nn.Module) -> tuple[str, Any]:
    """Return the name and the configuration of the only adapter of `model`.

    Raises:
        BayesLoraError: the model does not have exactly one adapter, unmerged and of A and B on unchanged base weights.
    """
    configs = getattr(model, "peft_config", None) if isinstance(model, PeftModel) else None
    kinds = [str(getattr(config.peft_type, "value", config.peft_type)) for config in (configs or {}).values()]
    if configs is None or kinds != ["LORA"]:
        raise BayesLoraError(
            f"the model ({type(model).__name__}) has the adapters {', '.join(kinds) or 'none'}, but must have exactly "
            "one LORA: load that one alone"
        )
    check_unmerged(model)
    name, config = next(iter(configs.items()))
    unusual = [field for field in _UNUSUAL if getattr(config, field, None)]
    if config.bias not in ("none", "all"):
        unusual.append(f"bias={config.bias!r}")
    if unusual:
        raise BayesLoraError(f"the adapter has {', '.join(unusual)}, but must be plain LoRA: train one without")
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise BayesLoraError(
            f"init_lora_weights is {start!r}, which changes the base weights, but the adapter alone must hold the "
            "update: convert it with save_pretrained(path_initial_model_for_weight_conversion=...) first"
        )
    return name, config


def lora_factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return A (r, d_in) and B (d_out, r) of a linear layer in float64.

    Raises:
        BayesLoraError: the layer is not linear.
    """
    if name not in layer.lora_A or not isinstance(layer.lora_A[name], nn.Linear):
        raise BayesLoraError(
            f"the adapter is on a {type(layer.get_base_layer()).__name__}, but must be on linear layers: retrain it"
        )
    return layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double()


def with_adapter(model: Any, name: str, config: PeftConfig, matrices: Mapping[str, Tensor]) -> PeftModel:
    """Return the base of `model` with another adapter, whose matrices are given by their paths in the base.

    Other trained tensors, such as a head, stay.
    """
    saved = get_peft_model_state_dict(model, adapter_name=name)
    state = {key: value.clone() for key, value in saved.items() if ".lora_" not in key}
    state |= {f"base_model.model.{path}": matrix for path, matrix in matrices.items()}
    new = get_peft_model(model.unload(), config, adapter_name=name).eval()
    set_peft_model_state_dict(new, state, adapter_name=name)
    return new
