"""An adapter of B-LoRA by evidence that needs no training loop: its widths are decided from the start."""

from __future__ import annotations

import torch

from bayeslora import BLoraConfig
from bayeslora.methods.blora.gated_quantizers import Phase
from bayeslora.methods.blora.layer import BLoraLayer
from bayeslora.vocabulary import ACTIVATIONS

BITS = 16
"""Few enough for rounding to move the ranges, and enough for small activations beside a wide range."""

WIDE = 100.0
"""Range of the activations: upstream's inputs go up to 90, and outputs that are clipped pass no gradient on."""

_add_adapter = BLoraLayer.add_adapter


def add_decided_adapter(layer: BLoraLayer, name: str, config: BLoraConfig, rank: int) -> None:
    """Stand in for `BLoraLayer.add_adapter`: by evidence, every tensor has `BITS` bits and the ranges learn."""
    _add_adapter(layer, name, config, rank)
    if name not in layer.blora_evidence:
        return
    for kind in layer.quantized_kinds(name):
        bound = torch.tensor(WIDE) if kind in ACTIVATIONS else layer.weight_range(name, kind, BITS)
        layer.quantizers(name).set_width(kind, BITS, bound)
    layer.progress(name).advance(Phase.LEARN)
