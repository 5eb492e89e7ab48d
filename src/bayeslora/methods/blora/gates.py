"""The gates of a layer in numbers, as the last decision by evidence left them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from bayeslora.methods.allocation import open_probability
from bayeslora.methods.blora.decisions import width_table
from bayeslora.methods.description import GateDescription
from bayeslora.vocabulary import WIDTHS

RANK = "rank"
"""Kind of the gates of components."""


def described_gates(layer: Any, name: str) -> list[GateDescription]:
    """Return the gates of adapter `name` in a B-LoRA layer: of widths by kind, then of ranks; empty if undecided."""
    if name not in layer.blora_evidence or not layer.evidence(name).is_decided:
        return []
    return [*_width_gates(layer, name), *_rank_gates(layer, name)]


def _width_gates(layer: Any, name: str) -> Iterator[GateDescription]:
    if not layer.quantized_kinds(name):
        return
    evidence, present = layer.evidence(name), layer.widths(name)
    price, examples = float(evidence.prices[0]), float(evidence.examples)
    savings = evidence.width_savings.tolist()
    for (kind, table), saved in zip(width_table(layer, name, layer.configs[name]), savings, strict=True):
        if len(table) == 1:
            continue  # a fixed width has no gates
        # A narrower width counts as no better than a wider one, as in the decision.
        losses = list(accumulate((max(table[bits], 0.0) for bits in reversed(WIDTHS)), max))[::-1]
        for column, bits in enumerate(WIDTHS[1:]):
            delta = losses[column] - losses[column + 1]
            yield _gate(kind, bits, bits <= present[kind], delta, saved[column], price, examples)


def _rank_gates(layer: Any, name: str) -> Iterator[GateDescription]:
    if name not in layer.blora_rank:
        return
    evidence = layer.evidence(name)
    price, examples = float(evidence.prices[1]), float(evidence.examples)
    kept = iter(layer.kept(name).tolist())
    is_open = [next(kept) if present else False for present in evidence.is_present.tolist()]
    savings = evidence.rank_savings.tolist()
    for index, (delta, saved) in enumerate(zip(evidence.all_rank_deltas.tolist(), savings, strict=True)):
        yield _gate(RANK, index, is_open[index], delta, saved, price, examples)


def _gate(
    kind: str, gate: int, is_open: bool, delta: float, saving: float, price: float, examples: float
) -> GateDescription:
    probability = open_probability(delta, price, saving, examples) if examples else None
    return GateDescription(kind, gate, is_open, delta, saving, price, probability)
