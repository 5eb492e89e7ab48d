r"""Export to plain LoRA: what a process that has never heard of this library can load.

The diagonal is folded into A, `lora_A = diag(E ∘ G) A` and `lora_B = B` at their deployed widths, and `alpha_pattern`
keeps the trained scaling where a rank was cut. That is the same function where only the adapter's own matrices are
quantized; a quantized base weight or activation cannot be expressed, and the difference is measured and reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.describe import tuner_of
from bayeslora.methods.layer import BayesLayer
from bayeslora.methods.tuner import BayesTuner

_SHARED_FIELDS = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "bias",
    "modules_to_save",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_dropout",
)


def export_lora(
    model: nn.Module,
    path: str | Path,
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write the adapter as a PEFT LoRA folder.

    Args:
        model: a PEFT model with an adapter of this library.
        path: folder to write `adapter_config.json` and `adapter_model.safetensors` into; created if missing.
        adapter_name: by default the active adapter.
        batch: inputs to measure the output error on; by default the model's own `dummy_inputs`.

    Returns:
        `max_output_error` and `max_output`, over the outputs of this model and of the exported one on the batch (None
        where there was nothing to measure on), and `ranks` by layer.

    Raises:
        BayesLoraError: if the model has no adapter of this library.
    """
    tuner = tuner_of(model)
    if tuner is None:
        raise BayesLoraError(f"{type(model).__name__} has no adapter of bayeslora: plain LoRA needs no export")
    name = adapter_name or tuner.active_adapters[0]
    layers = _named_layers(tuner, name)
    factors = {key: _lora_factors(layer, name) for key, layer in layers.items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_state_dict(model, name, factors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _config(tuner, name, layers, factors).save_pretrained(str(folder))
    measured = _measure(model, layers, factors, name, batch)
    return {**measured, "ranks": {key: len(a) for key, (a, _) in factors.items()}}


def _named_layers(tuner: BayesTuner, name: str) -> dict[str, BayesLayer]:
    found = tuner.named_layers(name)
    if not found:
        raise BayesLoraError(f"the model has no adapter {name!r}: name one of its adapters")
    return found


def _lora_factors(layer: BayesLayer, name: str) -> tuple[Tensor, Tensor]:
    """`lora_A` (r, d_in) and `lora_B` (d_out, r) without ranks that contribute nothing; one of zeros if none does."""
    a, diagonal, b = layer.factors(name)
    kept = diagonal != 0
    a, b = (diagonal.unsqueeze(1) * a)[kept], b[:, kept]
    if not kept.any():  # PEFT's LoRA has no rank 0
        a, b = a.new_zeros(1, layer.in_features), b.new_zeros(layer.out_features, 1)
    return a.contiguous(), b.contiguous()


def _state_dict(model: nn.Module, name: str, factors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """LoRA's tensors under PEFT's keys, and what else the adapter saves (a trained head, biases) as it is."""
    inside = tuple(f"base_model.model.{path}." for path in factors)
    state = {
        key: tensor.detach().cpu().contiguous()
        for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items()
        if not key.startswith(inside) or key.endswith(".bias")
    }
    for path, (a, b) in factors.items():
        state[f"base_model.model.{path}.lora_A.weight"] = a.cpu()
        state[f"base_model.model.{path}.lora_B.weight"] = b.cpu()
    return state


def _config(
    tuner: BayesTuner, name: str, layers: dict[str, BayesLayer], factors: dict[str, tuple[Tensor, Tensor]]
) -> LoraConfig:
    """The LoRA configuration under which PEFT computes the same update."""
    config = tuner.peft_config[name]
    ranks = {path: len(a) for path, (a, _) in factors.items()}
    default = max(ranks.values())
    scalings = {path: layer.scaling[name] for path, layer in layers.items()}
    alpha = scalings[next(iter(layers))] * default
    return LoraConfig(
        r=default,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float scales just as well
        rank_pattern={path: rank for path, rank in ranks.items() if rank != default},
        alpha_pattern={path: scalings[path] * r for path, r in ranks.items() if scalings[path] * r != alpha},
        fan_in_fan_out=any(layer.is_transposed for layer in layers.values()),
        inference_mode=True,
        **{key: getattr(config, key) for key in _SHARED_FIELDS if hasattr(config, key)},
    )


@torch.no_grad()
def _measure(
    model: nn.Module,
    layers: dict[str, BayesLayer],
    factors: dict[str, tuple[Tensor, Tensor]],
    name: str,
    batch: Mapping[str, Tensor] | None,
) -> dict[str, float | None]:
    """Largest difference between the outputs of the model and of its LoRA form on `batch`."""
    inputs = batch if batch is not None else getattr(model, "dummy_inputs", None)
    if inputs is None:
        return {"max_output_error": None, "max_output": None}
    device = next(model.parameters()).device
    inputs = {key: value.to(device) for key, value in inputs.items() if key not in ("labels", "label")}
    was_training = model.training
    active = {path: layer._active_adapter for path, layer in layers.items()}
    model.eval()
    try:
        for layer in layers.values():
            layer._active_adapter = [name]
        ours = _output(model(**inputs))
        with _as_lora(layers, factors, name):
            exported = _output(model(**inputs))
    finally:
        model.train(was_training)
        for path, layer in layers.items():
            layer._active_adapter = active[path]
    return {
        "max_output_error": float((ours - exported).abs().max()),
        "max_output": float(ours.abs().max()),
    }


@contextmanager
def _as_lora(layers: dict[str, BayesLayer], factors: dict[str, tuple[Tensor, Tensor]], name: str) -> Iterator[None]:
    """Inside, every adapted layer computes what plain LoRA on the raw base weight would."""

    def replace(path: str) -> Any:
        a, b = factors[path]

        def hook(layer: BayesLayer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x = args[0]
            update = x.to(a.dtype) @ a.T @ b.T * layer.scaling[name]
            return layer.base_layer(*args) + update.to(output.dtype)

        return hook

    handles = [layer.register_forward_hook(replace(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output(outputs: Any) -> Tensor:
    return (outputs["logits"] if "logits" in outputs else outputs[0]).float()
