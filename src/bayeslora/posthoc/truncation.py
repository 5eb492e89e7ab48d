r"""LoRA cut to lower ranks after training, by the singular value decomposition of its update.

With QR decompositions $B = Q_B R_B$ and $A^\top = Q_A R_A$, the decomposition of the r × r matrix
$R_B R_A^\top = U \Sigma V^\top$ gives that of the update,

$$ s B A = (Q_B U)\, s \Sigma\, (Q_A V)^\top, $$

without a d × d matrix. The k largest singular values are the best update of rank k in the Frobenius norm (Eckart and
Young, 1936). Over several layers the largest of all singular values are the best for a mean rank.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.config import KEPT_FIELDS
from bayeslora.posthoc.plain_lora import lora_factors, lora_layers, only_lora

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of the initializations that take the initial update out of the base weights."""


class _Update(NamedTuple):
    """The update of one layer: `left` (d_out, r), `values` (r,) without the scaling, `right` (r, d_in), float64."""

    left: Tensor
    values: Tensor
    right: Tensor
    scaling: float


def truncate_rank(
    model: nn.Module, rank: int | Mapping[str, int] | None = None, *, mean_rank: float | None = None
) -> PeftModel:
    """Return a LoRA model whose update is that of `model` cut to lower ranks, without training.

    The result is ordinary PEFT LoRA with a `rank_pattern`, and is saved and loaded as such. Singular values are
    divided equally between A and B, and every layer keeps its scaling. A layer at rank 0 has no adapter.

    Args:
        model: a PEFT model with one LoRA adapter on linear layers; left unchanged, its base model is copied.
        rank: maximum rank of every layer, or the rank of each layer by its path, as in `bayeslora.describe`; layers
            that are not named keep their rank.
        mean_rank: mean over all layers instead. The largest singular values of the scaled updates are kept, so a
            layer may have rank 0. At least one rank is kept.

    Raises:
        BayesLoraError: the model does not have exactly one LoRA adapter of A and B alone, its initialization has
            changed the base weights, a rank is impossible, a layer does not exist, or no rank would be left.
    """
    name, config = only_lora(model)
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise BayesLoraError(
            f"init_lora_weights is {start!r}, which changes the base weights, but the adapter alone must hold the "
            "update: convert it with save_pretrained(path_initial_model_for_weight_conversion=...) first"
        )
    if (rank is None) == (mean_rank is None):
        raise BayesLoraError(
            f"rank is {rank!r} and mean_rank {mean_rank!r}, but exactly one must be given: give one of them"
        )
    updates = {path: _decomposed(layer, name) for path, layer in lora_layers(model, name).items()}
    ranks = _by_values(updates, mean_rank) if mean_rank is not None else _by_layer(updates, rank)
    kept = {path: k for path, k in ranks.items() if k > 0}
    if not kept:
        raise BayesLoraError("every rank is 0, but at least 1 must be left: use the base model alone")
    return _rebuilt(model, name, config, updates, kept)


def _decomposed(layer: Any, name: str) -> _Update:
    a, b = lora_factors(layer, name)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, values, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return _Update(q_b @ u, values, vh @ q_a.T, float(layer.scaling[name]))


def _by_layer(updates: Mapping[str, _Update], rank: int | Mapping[str, int] | None) -> dict[str, int]:
    """Return the rank of each layer for one maximum or for given ranks."""
    largest = {path: len(update.values) for path, update in updates.items()}
    if isinstance(rank, Mapping):
        if unknown := sorted(set(rank) - set(largest)):
            raise BayesLoraError(
                f"rank names {unknown[0]!r}, but the adapted layers are {', '.join(sorted(largest)[:3])}, …: give "
                "paths as in bayeslora.describe(model)"
            )
        for path, value in rank.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= largest[path]:
                raise BayesLoraError(
                    f"the rank of {path} is {value!r}, but must be a whole number from 0 to {largest[path]}: give "
                    "such a rank"
                )
        return {**largest, **rank}
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise BayesLoraError(f"rank is {rank!r}, but must be a whole number of at least 1: give a rank")
    return {path: min(rank, most) for path, most in largest.items()}


def _by_values(updates: Mapping[str, _Update], mean_rank: float) -> dict[str, int]:
    """Return the ranks with which the largest singular values over all layers are kept."""
    values = [(float(v) * abs(u.scaling), path) for path, u in updates.items() for v in u.values]
    total = round(mean_rank * len(updates)) if 0 < mean_rank < float("inf") else 0
    if not 1 <= total <= len(values):
        raise BayesLoraError(
            f"mean_rank is {mean_rank!r}, but must be above 0, and at most {len(values) / len(updates):g} for this "
            "adapter: give such a mean"
        )
    kept = [path for _, path in sorted(values, key=lambda each: -each[0])[:total]]
    return {path: kept.count(path) for path in updates}


def _rebuilt(
    model: nn.Module, name: str, config: Any, updates: dict[str, _Update], ranks: dict[str, int]
) -> PeftModel:
    """Return a copy of `model` whose layers have the given ranks; layers that are not named lose their adapter."""
    copied: Any = copy.deepcopy(model)
    saved = get_peft_model_state_dict(copied, adapter_name=name)
    state = {key: value.clone() for key, value in saved.items() if ".lora_" not in key}
    for path, k in ranks.items():
        update = updates[path]
        roots = update.values[:k].sqrt()
        state[f"base_model.model.{path}.lora_A.weight"] = (roots.unsqueeze(1) * update.right[:k]).float().contiguous()
        state[f"base_model.model.{path}.lora_B.weight"] = (update.left[:, :k] * roots).float().contiguous()
    new = get_peft_model(copied.unload(), _config(config, updates, ranks), adapter_name=name).eval()
    set_peft_model_state_dict(new, state, adapter_name=name)
    return new


def _config(config: Any, updates: dict[str, _Update], ranks: dict[str, int]) -> LoraConfig:
    """Return the configuration with these ranks and the layers' own scalings."""
    shared = {field: getattr(config, field) for field in KEPT_FIELDS}
    if len(ranks) < len(updates):  # full paths, because names such as `query` would match the other layers too
        shared |= {"target_modules": sorted(ranks), **dict.fromkeys(("exclude_modules", "layers_to_transform"))}
        shared["layers_pattern"] = None
    largest = max(ranks.values())
    alphas = {p: updates[p].scaling * (k**0.5 if config.use_rslora else k) for p, k in ranks.items()}
    rounded = {p: round(a) if abs(a - round(a)) < 1e-9 * abs(a) else a for p, a in alphas.items()}
    alpha = rounded[max(ranks, key=lambda path: ranks[path])]
    return LoraConfig(
        **shared,
        r=largest,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float scales just as well
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        fan_in_fan_out=config.fan_in_fan_out,
        rank_pattern={path: k for path, k in ranks.items() if k != largest},
        alpha_pattern={path: a for path, a in rounded.items() if a != alpha},  # type: ignore[misc]
    )
