r"""Training-free Bayesianization (Shi et al., 2024, arXiv:2412.05723): a posterior for a trained LoRA adapter.

With the compact singular value decomposition $B = U \mathrm{diag}(d) V^\top$ of a layer, the same update is
$B' A'$ with $B' = U \mathrm{diag}(d)$ and $A' = V^\top A$. The posterior of the first factor is
$N(A'_{ij}, \Omega_{ij}^2)$ with $\Omega_{ij} = \sigma_q / d_i$: noise of one size $\sigma_q$ in every direction of
the update's column space. That one number is the largest for which the negative log-likelihood of an anchor set grows
by no more than a given share. $B'$ is deterministic, so the result is a BLoB adapter, and is saved, loaded, merged and
used for prediction as one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.export.formats import lora_layers
from bayeslora.methods.blob import BlobConfig
from bayeslora.methods.config import KEPT_FIELDS
from bayeslora.methods.variational import stochastic_layers
from bayeslora.posthoc.plain_lora import lora_factors, only_lora, with_adapter
from bayeslora.posthoc.temperature import check_classes, predictive_nll
from bayeslora.prediction import Logits, ModelPredictor, NotFiniteError, labels_of, sampled_logits

_log = logging.getLogger(__name__)

_FIRST_SCALE = 1e-3
_STEPS_OUT, _STRIDE = 6, 16  # two bisections of a stride make a factor of two


def bayesianize(
    model: nn.Module,
    anchor: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    tolerance: float = 0.003,
    samples: int = 10,
    seed: int = 0,
    steps: int = 8,
    logits: Logits | None = None,
) -> PeftModel:
    """Turn a LoRA adapter into a BLoB adapter with the same mean and a posterior around it, without training.

    The LoRA adapter is removed from `model`, and the base model is reused: do not use `model` afterwards.

    Args:
        model: a PEFT model with one LoRA adapter on linear layers.
        anchor: a batch or batches of a few hundred held-out examples; without labels, predicted classes are used.
        tolerance: relative increase of the anchor's negative log-likelihood that is allowed. The posterior gets the
            largest noise scale within it.
        samples, seed: number and seed of the draws that estimate this likelihood, the same for every scale.
        steps: number of bisections, after an interval of a factor of two that contains the scale has been found.
        logits: function from the model and a batch to class logits, as for `predict`.

    Raises:
        BayesLoraError: the model does not have exactly one LoRA adapter of A and B alone, on an unchanged base, the
            tolerance is not positive, or noise does not lower the likelihood (an untrained adapter, random labels).
    """
    if tolerance <= 0 or samples < 1 or steps < 0:
        raise BayesLoraError(
            f"tolerance is {tolerance}, samples {samples} and steps {steps}, but they must be above 0, at least 1 and "
            "at least 0: give others, or leave them out"
        )
    name, config = only_lora(model)
    batches = [anchor] if isinstance(anchor, Mapping) else list(anchor)
    before = sampled_logits(ModelPredictor(model), batches, 0, logits=logits)
    labels = _labels(batches, before)
    new, widths = _as_blob(model, name, config)
    limit = predictive_nll(before, labels) * (1 + tolerance)

    def allowed(scale: float) -> bool:
        _set_scale(new, name, widths, scale)
        try:
            found = sampled_logits(ModelPredictor(new), batches, samples, seed, logits=logits)
        except NotFiniteError:  # so much noise overflows half precision
            return False
        return predictive_nll(found, labels) <= limit

    scale = largest_allowed(allowed, steps)
    _set_scale(new, name, widths, scale)
    _log.info("training-free Bayesianization: scale %.3g for %d anchor examples", scale, len(labels))
    return new


def _as_blob(model: Any, name: str, config: Any) -> tuple[PeftModel, dict[str, Tensor]]:
    """Return a BLoB model with the same mean and without noise, and the singular values (k,) of B by layer.

    Every layer keeps its rank and its scaling.
    """
    layers = lora_layers(model, name)
    factors = {path: _decomposed(layer, name) for path, layer in layers.items()}
    matrices: dict[str, Tensor] = {}
    for path, (a, b, _) in factors.items():
        matrices |= {f"{path}.blob_M": a, f"{path}.blob_B": b, f"{path}.blob_G": torch.zeros_like(a)}
    divisor, given = config.r**0.5 if config.use_rslora else config.r, config.lora_alpha
    alphas: dict[str, Any] = {path: float(layer.scaling[name]) * divisor for path, layer in layers.items()}
    blob = BlobConfig(
        **{field: getattr(config, field) for field in (*KEPT_FIELDS, "r", "lora_alpha", "use_rslora")},
        rank_pattern={path: len(d) for path, (_, _, d) in factors.items() if len(d) != config.r},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if abs(alpha - given) > 1e-9 * abs(given)},
    )
    return with_adapter(model, name, blob, matrices), {path: d for path, (_, _, d) in factors.items()}


def largest_allowed(allowed: Callable[[float], bool], steps: int) -> float:
    """Return the largest scale that was tried and for which `allowed` holds.

    Raises:
        BayesLoraError: `allowed` holds, or fails, for every scale over two dozen factors of two.
    """
    scale, holds = _FIRST_SCALE, allowed(_FIRST_SCALE)
    for _ in range(_STEPS_OUT):
        following = scale * _STRIDE if holds else scale / _STRIDE
        if allowed(following) != holds:
            break
        scale = following
    else:
        effect = f"up to {scale:.0e} never" if holds else f"down to {scale:.0e} always"
        raise BayesLoraError(
            f"noise of scale {effect} lowers the anchor set's likelihood too much, but only large scales should: give "
            "a trained adapter, other anchor examples or another tolerance"
        )
    low, high = (scale, following) if holds else (following, scale)
    for _ in range(steps + 2):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def _labels(batches: list[Mapping[str, Any]], logits: Tensor) -> Tensor:
    check_classes(logits)
    if not any("label" in key and value is not None for batch in batches for key, value in batch.items()):
        return logits[0].argmax(dim=-1)
    return labels_of(batches)


def _decomposed(layer: Any, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return A' (k, d_in), B' (d_out, k) and the singular values (k,) of B, with k = min(r, d_out), float32."""
    a, b = lora_factors(layer, name)
    u, d, vh = torch.linalg.svd(b, full_matrices=False)
    return (vh @ a).float().contiguous(), (u * d).float().contiguous(), d.float()


@torch.no_grad()
def _set_scale(model: nn.Module, name: str, widths: dict[str, Tensor], scale: float) -> None:
    """Set the standard deviations to `scale` over the singular values; BLoB stores their square roots."""
    for path, layer in stochastic_layers(model).items():
        d = widths[path]
        largest = float(d.max())
        # Noise is not divided by zero. Without any update (B = 0) its scale does not matter: none reaches the output.
        d = d.clamp_min(1e-6 * largest) if largest else torch.ones_like(d)
        roots: Any = layer.blob_G
        roots[name].copy_((scale / d).sqrt().unsqueeze(1))
