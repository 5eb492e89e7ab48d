"""Decisions of an evidence run: when they are made, from what, and what they change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayeslora.methods import allocation
from bayeslora.methods.allocation import Allocation, CostModel
from bayeslora.methods.blora.config import BLoraConfig
from bayeslora.methods.blora.evidence import MEASURED, RANGED, Evidence
from bayeslora.vocabulary import ACTIVATIONS, WIDTHS

DECISIONS = 4
"""Times at which widths and ranks are chosen; a gate that one of them closes may be opened by the next."""

DECIDED = 0.6
"""Share of the gates' phase after which the last decision is made: ranges then learn at the final widths."""

EVIDENCE_SHARE = 0.03
"""Most of a run's time that evidence may take."""

PASS_COST = 2.0
"""Steps of training that one pass for evidence takes, about."""

MEMORY = 0.5
"""Weight of earlier evidence beside that of the latest passes."""


@dataclass(frozen=True)
class Schedule:
    """Steps, counted from 0, after which a decision is made, and those in which evidence is gathered."""

    decisions: tuple[int, ...]
    passes: frozenset[int]

    @classmethod
    def of(cls, begin: int, end: int, total_steps: int) -> Schedule:
        """Return the schedule of a run whose gates may move in steps `begin` to `end` - 1."""
        length = end - begin
        count = max(1, min(DECISIONS, length // 3))
        last = max(count, math.ceil(DECIDED * length))
        decisions = tuple(begin + math.ceil(last * k / count) - 1 for k in range(1, count + 1))
        each = max(1, int(EVIDENCE_SHARE * total_steps / PASS_COST / count))
        starts = (begin, *(step + 1 for step in decisions[:-1]))
        passes = (range(max(start, step + 1 - each), step + 1) for start, step in zip(starts, decisions, strict=True))
        return cls(decisions, frozenset(step for group in passes for step in group))

    def progress(self, step: int) -> float:
        """Return the share of the decisions that are made after `step`, which is that of a decision."""
        return (self.decisions.index(step) + 1) / len(self.decisions)


def falling(progress: float, start: float, target: float) -> float:
    """Return the budget at `progress` in [0, 1], from `start` to `target`: AdaLoRA's cubic schedule."""
    return target + (start - target) * (1 - progress) ** 3


@torch.no_grad()
def choose(
    layers: Mapping[str, Any], name: str, config: BLoraConfig, costs: Mapping[str, CostModel], progress: float
) -> tuple[Allocation | None, Allocation | None]:
    """Return the choice of widths and that of ranks at `progress`; None where they are not learned."""
    ranks = widths = None
    if config.learns_ranks:
        found = allocation.Evidence({}, {path: layer.evidence(name).rank_deltas.tolist() for path, layer in layers.items()})
        ranks = _allocate(found, costs["rank"], config.target_rank, config.rank_price, progress, _ranks(layers, name))
    if config.learns_bits:
        tables = {(path, kind): table for path, layer in layers.items() for kind, table in width_table(layer, name, config)}
        kept = ranks.ranks if ranks is not None else _ranks(layers, name)
        currency = "bytes" if config.target_bytes is not None else "bops"
        target = config.target_bytes if config.target_bytes is not None else config.target_bops
        cost = replace(costs[currency], default_ranks=kept)
        widths = _allocate(allocation.Evidence(tables, {}), cost, target, config.bops_price, progress, kept)
    return widths, ranks


def _allocate(
    evidence: allocation.Evidence,
    cost: CostModel,
    target: float | None,
    price: float,
    progress: float,
    ranks: Mapping[str, int],
) -> Allocation:
    if target is None:
        return allocation.allocate(evidence, cost, price=price * progress**3)
    start = cost.share({key: max(table) for key, table in evidence.widths.items()}, ranks)
    if start <= target:
        return allocation.allocate(evidence, cost, price=0.0)
    return allocation.allocate(evidence, cost, target=falling(progress, start, target))


def _ranks(layers: Mapping[str, Any], name: str) -> dict[str, int]:
    return {path: len(layer.blora_E[name]) for path, layer in layers.items()}


def width_table(layer: Any, name: str, config: BLoraConfig) -> list[tuple[str, dict[int, float]]]:
    """Return for each kind of tensor the rise of the mean loss by width; only the given width where it is fixed."""
    fixed = config.fixed_bits or {}
    tables = []
    for kind, deltas in zip(layer.quantizers(name).kinds, layer.evidence(name).width_deltas.tolist(), strict=True):
        if kind in fixed:
            tables.append((kind, {fixed[kind]: 0.0}))
            continue
        known = dict(zip(MEASURED, deltas, strict=True))
        tables.append((kind, {**known, 16: known[8] / 2**16, 32: 0.0}))
    return tables


@torch.no_grad()
def apply(layers: Mapping[str, Any], name: str, widths: Allocation | None, ranks: Allocation | None) -> None:
    """Give every layer its new widths and ranks; a tensor whose width changes gets the best range for it."""
    for path, layer in layers.items():
        if ranks is not None:
            layer.rank_gates(name).set_open(torch.tensor(ranks.open[path], device=layer.blora_E[name].device))
        if widths is None:
            continue
        quantizers, present = layer.quantizers(name), layer.widths(name)
        for kind in quantizers.kinds:
            bits = widths.widths[path, kind]
            if bits != present[kind]:
                quantizers.set_width(kind, bits, best_range(layer, name, kind, bits))


def best_range(layer: Any, name: str, kind: str, bits: int) -> Tensor:
    """Return the range with the least squared error at `bits` bits: of a weight, or of the activations observed."""
    if kind not in ACTIVATIONS:
        return layer.weight_range(name, kind, bits)
    evidence: Evidence = layer.evidence(name)
    index = layer.quantizers(name).kinds.index(kind)
    column = RANGED.index(min(bits, RANGED[-1]))
    if not evidence.passes or not evidence.ranges[index, column]:
        return torch.tensor(10.0)  # no batch has reached the layer: clip nothing it is likely to see
    return evidence.ranges[index, column] / evidence.passes


@torch.no_grad()
def pooled(found: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the sums of every layer over all ranks of a distributed run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(found)
    flat = torch.cat([tensor.flatten() for sums in found for tensor in sums.values()])
    backend_device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    flat = flat.to(backend_device)
    torch.distributed.all_reduce(flat)
    parts = iter(flat.cpu().split([tensor.numel() for sums in found for tensor in sums.values()]))
    return [{key: next(parts).view(tensor.shape) for key, tensor in sums.items()} for sums in found]


def record_prices(
    layers: Mapping[str, Any], name: str, widths: Allocation | None, ranks: Allocation | None, costs: Mapping[str, CostModel], currency: str
) -> None:
    """Keep with the evidence of each layer what its gates save, and at which price they were decided."""
    for path, layer in layers.items():
        evidence = layer.evidence(name)
        if ranks is not None:
            evidence.prices[1] = ranks.price
            evidence.rank_savings.fill_(1 / len(layers))
        if widths is None:
            continue
        evidence.prices[0] = widths.price
        kept = ranks.ranks if ranks is not None else _ranks(layers, name)
        cost = costs[currency]
        own = [p for p in cost.products if any(isinstance(side, tuple) and side[0] == path for side in (p.left, p.right))]
        for row, kind in enumerate(layer.quantizers(name).kinds):
            key = (path, kind)
            partial = CostModel(tuple(p for p in own if key in (p.left, p.right)), cost.baseline)
            shares = [partial.share({**widths.widths, key: bits}, kept) for bits in WIDTHS]
            evidence.width_savings[row] = torch.tensor([b - a for a, b in zip(shares, shares[1:], strict=False)])
