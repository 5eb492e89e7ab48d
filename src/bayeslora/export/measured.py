"""What an export changes in a model's outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn


def inputs_for(model: nn.Module, batch: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """`batch`, or the model's own `dummy_inputs`, on its device and without labels; None where there is neither."""
    found = batch if batch is not None else getattr(model, "dummy_inputs", None)
    if found is None:
        return None
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in found.items() if key not in ("labels", "label")}


@torch.no_grad()
def output_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits, or the first output of a model without, in float32 and in evaluation mode."""
    outputs = model.eval()(**inputs)
    return cast(Tensor, outputs["logits"] if "logits" in outputs else outputs[0]).float()


def output_error(expected: Tensor | None, found: Tensor | None) -> dict[str, float | None]:
    """`max_output_error` and `max_output`, the largest difference and the largest expected output; None without."""
    if expected is None or found is None:
        return {"max_output_error": None, "max_output": None}
    return {"max_output_error": float((found - expected).abs().max()), "max_output": float(expected.abs().max())}
