"""Measure how far a model's answers move under noise of the size of float rounding.

A value halfway between two codes goes to either of them for a difference in its last digit. Where activations have few
codes, one such step grows through the layers that follow. Then no export agrees with the model better than the model
agrees with itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayeslora.export.agreement import MOST_DIVERGENCE, Agreement
from bayeslora.export.formats import inputs_for
from bayeslora.methods.layer import evaluation_mode
from bayeslora.methods.tuner import describe
from bayeslora.vocabulary import ACTIVATIONS, UNQUANTIZED

NOISE = 1e-6
"""Standard deviation of the noise, relative to each entry of the embedded tokens."""


def moved_by_noise(model: nn.Module, batches: Iterable[Mapping[str, Tensor] | None]) -> dict[str, float]:
    """Return how far noise of 1e-6 on the embedded tokens moves the answers of a model; warn if that is far.

    Args:
        model: a classifier or language model with an adapter, left unchanged.
        batches: of inputs, None for the model's `dummy_inputs`; the first 32 rows are read, twice.

    Returns:
        `noise_changed`, the share of other answers, and `noise_divergence`, the mean divergence in nats. Empty for a
        model whose activations are not quantized, which moves by float rounding alone, and for other outputs than
        logits of classes.
    """
    config: Any = getattr(model, "config", None)
    widths = [layer.bits.get(kind, UNQUANTIZED) for layer in describe(model) for kind in ACTIVATIONS]
    is_multi_label = getattr(config, "problem_type", None) == "multi_label_classification"
    is_other = is_multi_label or getattr(config, "is_encoder_decoder", False)
    if is_other or min(widths, default=UNQUANTIZED) == UNQUANTIZED:
        return {}
    batch = next((each for given in batches if (each := inputs_for(model, given)) is not None), None)
    if batch is None or "input_ids" not in batch:
        return {}
    embedding, agreement = cast(nn.Module, cast(Any, model).get_input_embeddings()), Agreement()
    with evaluation_mode(model), torch.no_grad():
        for number in range(min(32, len(batch["input_ids"]))):
            row = {name: values[number : number + 1] for name, values in batch.items()}
            before = model(**row)
            if "logits" not in before or before["logits"].shape[-1] == 1:
                return {}
            with embedding.register_forward_hook(_with_noise):
                after = model(**row)["logits"]
            agreement.add(*(_answers(logits, row) for logits in (before["logits"], after)))
    if not agreement.positions:
        return {}
    found = agreement.summary()
    if found["divergence"] > MOST_DIVERGENCE:
        warnings.warn(
            f"noise of {NOISE:g} on the embedded tokens changes {found['changed']:.1%} of this model's answers "
            f"(divergence {found['divergence']:.2g} nats), because its activations have few codes. No export can "
            "agree with it better than that: give its activations more bits or leave them at 32",
            stacklevel=2,
        )
    return {"noise_changed": found["changed"], "noise_divergence": found["divergence"]}


def _answers(logits: Tensor, row: Mapping[str, Tensor]) -> Tensor:
    """Return logits (answers, classes): of the row, or of each token that its `attention_mask` shows."""
    if logits.ndim == 2:
        return logits
    return logits[0][row["attention_mask"][0].bool()] if "attention_mask" in row else logits[0]


def _with_noise(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    return output * (1 + NOISE * noise.to(output))
