"""Cutting ranks out for real."""

from __future__ import annotations

from torch import nn

from bayeslora.methods.tuner import tuner_of


def shrink(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Remove every rank that contributes nothing from the tensors of an adapter, in place.

    A rank goes when its gate is closed or its diagonal entry is quantized to zero. Ranges and the scaling stay as they
    were trained, so outputs are equal to float rounding; `rank_pattern` in the adapter's config records what is left,
    and a saved adapter reloads with it. Optimizers built before hold the old tensors: shrink after training.

    Args:
        model: a PEFT model; one without an adapter of this library is left alone.
        adapter_name: by default the active adapter.

    Returns:
        The rank of each layer by name; ranks may be 0.
    """
    tuner = tuner_of(model)
    if tuner is None:
        return {}
    return tuner.shrink(adapter_name)
