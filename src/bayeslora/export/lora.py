r"""Export to plain LoRA, for processes without this library.

The diagonal is folded into A, `lora_A = diag(E ∘ G) A` and `lora_B = B` at their deployed widths, and `alpha_pattern`
keeps the trained scaling of layers whose ranks were cut. This is exact if only the adapter's matrices are quantized.
LoRA cannot express a quantized base weight or activation: such an adapter is written only on request, with the
difference in outputs measured and returned.

The uniform form is for servers that read `r` and `lora_alpha` but no patterns: every layer is padded with ranks of
zeros to one r, its scaling is folded into B, and `lora_alpha` = r. docs/serving.md has the servers' rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.export.draws import Factors, check_draws, check_members, drawn
from bayeslora.export.formats import adapted_parts, inputs_for, only_active, output_error, output_of, saved_state
from bayeslora.methods.config import KEPT_FIELDS
from bayeslora.methods.layer import BayesLayer, evaluation_mode
from bayeslora.methods.tuner import BayesTuner, describe, tuner_of
from bayeslora.posterior import PosteriorSource
from bayeslora.vocabulary import ACTIVATIONS, BASE_WEIGHT, UNQUANTIZED

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values above 1 of vLLM's `--max-lora-rank`, which reserves that rank for every adapter."""


def export_lora(
    model: nn.Module,
    path: str | Path,
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
    *,
    uniform: bool = False,
    draws: int | None = None,
    seed: int = 0,
    posterior: PosteriorSource | None = None,
    members: bool = False,
    allow_error: bool = False,
) -> dict[str, Any]:
    """Write the adapter as a PEFT LoRA folder, or K draws of its posterior, or its K members, as K folders.

    Args:
        model: a PEFT model with an adapter of this library.
        path: folder to write `adapter_config.json` and `adapter_model.safetensors` into; created if missing.
        adapter_name: name of the adapter, by default the active one.
        batch: inputs on which the output error is measured; by default the model's `dummy_inputs`.
        uniform: use one rank for all layers, with `lora_alpha` equal to it, as vLLM, SGLang and llama.cpp need it: the
            smallest of `SERVED_RANKS` that is at least every layer's rank, or else the largest rank.
        draws: write this number K of draws of the weights instead of their mean (default), into the folders draw-0 …
            draw-(K - 1) of `path`. Their mean probabilities equal `predict(model, batch, samples=K, seed=seed)`.
        seed: seed of the draws, by default 0.
        posterior: posterior to draw from for a deterministic adapter: the `IVON` or `SWAG` that trained it, or
            `load_posterior(…)`.
        members: write each of the K cores of `MeLoraConfig(cores=K)`, at its mean, into the folders member-0 …
            member-(K - 1) of `path`. Their mean probabilities equal `predict(CoreEnsemble(model), batch)`.
        allow_error: leave out the quantizers of base weights and activations, by default False.

    Returns:
        `max_output_error` and `max_output`, over the outputs of this model and of the exported one on the batch (None
        without inputs), and `ranks` by layer. For draws and members, the maximum over them, and their number as
        `draws` or `members`.

    Raises:
        BayesLoraError: the model has no adapter of this library; the adapter quantizes more than its matrices and
            `allow_error` is False; it is deterministic and draws are wanted; it has a single core and members are
            wanted; or it trains more than its matrices (a head, biases) and `uniform` is given.
    """
    if draws is not None and not members:
        check_draws(model, draws, seed, posterior)
        if posterior is not None and not uniform and tuner_of(model) is None and isinstance(model, PeftModel):
            return _export_plain(model, Path(path), adapter_name or only_active(model), draws, seed, posterior)
    inner, tuner, name = adapted_parts(model, adapter_name)
    write = partial(_export_one, inner, tuner, name, batch=batch, uniform=uniform)
    if members:
        draw = partial(drawn, inner, name, 0, posterior=None, scale=0.0)
        return _export_each("member", check_members(inner, name, draws), draw, write, Path(path))
    if draws is not None:
        return _export_each("draw", draws, partial(drawn, inner, name, seed, posterior=posterior), write, Path(path))
    if not allow_error:
        _check_exact(tuner.named_layers(name), name)
    return write(Path(path), lambda _, layer: layer.factors(name))


def _export_plain(
    model: PeftModel, path: Path, name: str, draws: int, seed: int, posterior: PosteriorSource
) -> dict[str, Any]:
    """Write draws of the weights of PEFT's own LoRA, which IVON has learned."""

    def write(folder: Path, _: Factors) -> dict[str, Any]:
        _save(folder, saved_state(model, name), model.peft_config[name])
        return {**output_error(None, None), "ranks": {layer.name: layer.rank for layer in describe(model, name)}}

    return _export_each("draw", draws, partial(drawn, model, name, seed, posterior=posterior), write, path)


def _export_each(
    kind: str,
    count: int,
    draw: Callable[[int], AbstractContextManager[Factors]],
    write: Callable[[Path, Factors], dict[str, Any]],
    path: Path,
) -> dict[str, Any]:
    """Write each draw or member into a folder of its own, and return the maxima of their measurements and ranks."""
    found = []
    for number in range(count):
        with draw(number) as factors:
            found.append(write(path / f"{kind}-{number}", factors))
    ranks = {layer: max(each["ranks"][layer] for each in found) for layer in found[0]["ranks"]}
    largest = {k: None if v is None else max(each[k] for each in found) for k, v in found[0].items() if k != "ranks"}
    return {**largest, "ranks": ranks, f"{kind}s": count}


def _check_exact(layers: Mapping[str, BayesLayer], name: str) -> None:
    """Raise `BayesLoraError` if a layer quantizes its base weight or activations."""
    for key, layer in layers.items():
        full = {BASE_WEIGHT: layer.base_width} | dict.fromkeys(ACTIVATIONS, UNQUANTIZED)
        narrow = {kind: bits for kind, bits in layer.widths(name).items() if bits < full.get(kind, 0)}
        if narrow:
            listed = ", ".join(f"{kind} {bits}" for kind, bits in narrow.items())
            raise BayesLoraError(
                f"plain LoRA would have other outputs, because {key} quantizes more than the adapter's matrices "
                f"({listed} bits): export 'packed' or another format, or allow and measure the error with "
                "allow_error=True"
            )


def _export_one(
    model: PeftModel,
    tuner: BayesTuner,
    name: str,
    folder: Path,
    read: Factors,
    *,
    batch: Mapping[str, Tensor] | None,
    uniform: bool,
) -> dict[str, Any]:
    """Write the LoRA with the matrices that `read` returns, and measure its output error."""
    layers: dict[str, BayesLayer] = tuner.named_layers(name)
    factors = {key: _lora_factors(layer, read(key, layer)) for key, layer in layers.items()}
    if uniform:
        written, config = _uniform(tuner, name, layers, factors)
    else:
        written, config = factors, _config(tuner, name, layers, factors)
    state = _state_dict(model, name, written)
    if uniform:
        _check_served(config, state)
    _save(folder, state, config)
    measured = _measure(model, layers, factors, name, batch)
    return {**measured, "ranks": {key: len(a) for key, (a, _) in factors.items()}}


def _save(folder: Path, state: dict[str, Tensor], config: PeftConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _lora_factors(layer: BayesLayer, factors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return `lora_A` (r, d_in) and `lora_B` (d_out, r) without ranks that contribute nothing; at least one."""
    a, diagonal, b = (part.detach() for part in factors)
    kept = diagonal != 0
    a, b = (diagonal.unsqueeze(1) * a)[kept], b[:, kept]
    if not kept.any():  # PEFT's LoRA needs at least rank 1
        a, b = a.new_zeros(1, layer.in_features), b.new_zeros(layer.out_features, 1)
    return a.contiguous(), b.contiguous()


def _state_dict(model: PeftModel, name: str, factors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return LoRA's tensors under PEFT's keys, and the other tensors of the adapter (a trained head, biases)."""
    inside = tuple(f"base_model.model.{path}." for path in factors)
    state = saved_state(model, name)
    state = {key: tensor for key, tensor in state.items() if not key.startswith(inside) or key.endswith(".bias")}
    for path, (a, b) in factors.items():
        state[f"base_model.model.{path}.lora_A.weight"] = a.cpu()
        state[f"base_model.model.{path}.lora_B.weight"] = b.cpu()
    return state


def _config(
    tuner: BayesTuner, name: str, layers: dict[str, BayesLayer], factors: dict[str, tuple[Tensor, Tensor]]
) -> LoraConfig:
    """Return the LoRA configuration that gives the same update in PEFT."""
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
        **{key: getattr(config, key) for key in (*KEPT_FIELDS, "lora_dropout") if hasattr(config, key)},
    )


def _uniform(
    tuner: BayesTuner, name: str, layers: dict[str, BayesLayer], factors: dict[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, tuple[Tensor, Tensor]], LoraConfig]:
    """Return the matrices padded with ranks of zeros to one rank, the layers' scalings folded in, and their config."""
    largest = max(len(a) for a, _ in factors.values())
    rank = next((served for served in SERVED_RANKS if served >= largest), largest)
    padded = {}
    for path, (a, b) in factors.items():
        missing = rank - len(a)
        scaled = b * layers[path].scaling[name]
        padded[path] = (
            torch.cat([a, a.new_zeros(missing, a.shape[1])]),
            torch.cat([scaled, b.new_zeros(len(b), missing)], dim=1),
        )
    config = _config(tuner, name, layers, factors)
    config.r = config.lora_alpha = rank
    config.rank_pattern, config.alpha_pattern = {}, {}
    if isinstance(config.target_modules, str):
        # The last names of the adapted layers, or their full paths if other layers share these names.
        last = {path.rpartition(".")[2] for path in layers}
        matched = {path for path, _ in tuner.model.named_modules() if path.rpartition(".")[2] in last}
        config.target_modules = sorted(last if matched == set(layers) else layers)
    return padded, config


def _check_served(config: LoraConfig, state: dict[str, Tensor]) -> None:
    """Raise `BayesLoraError` if the adapter has tensors that LoRA servers do not load."""
    others = [key for key in state if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if config.modules_to_save or config.bias != "none" or others:
        whole = sorted({name for name in config.modules_to_save or () if any(f".{name}." in key for key in others)})
        what = ", ".join(whole) or (others[0] if others else f"bias={config.bias!r}")
        raise BayesLoraError(
            f"the adapter also trains {what}, but LoRA servers load only the matrices A and B: export it without "
            "uniform, for PEFT"
        )


@torch.no_grad()
def _measure(
    model: nn.Module,
    layers: dict[str, BayesLayer],
    factors: dict[str, tuple[Tensor, Tensor]],
    name: str,
    batch: Mapping[str, Tensor] | None,
) -> dict[str, float | None]:
    """Return the largest difference between the outputs of the model and of its LoRA form on `batch`."""
    inputs = inputs_for(model, batch)
    active = {path: layer._active_adapter for path, layer in layers.items()}
    with evaluation_mode(model):
        try:
            for layer in layers.values():
                layer._active_adapter = [name]
            ours = output_of(model, inputs)
            with _as_lora(layers, factors, name):
                exported = output_of(model, inputs)
        finally:
            for path, layer in layers.items():
                layer._active_adapter = active[path]
    return output_error(ours, exported, model, is_dummy=batch is None)


@contextmanager
def _as_lora(layers: dict[str, BayesLayer], factors: dict[str, tuple[Tensor, Tensor]], name: str) -> Iterator[None]:
    """Let every adapted layer compute plain LoRA on the raw base weight inside the context."""

    def replaced(path: str, layer: BayesLayer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        a, b = factors[path]
        update = args[0].to(a.dtype) @ a.T @ b.T * layer.scaling[name]
        return layer.base_layer(*args) + update.to(output.dtype)

    with ExitStack() as hooks:
        for path, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(replaced, path)))
        yield
