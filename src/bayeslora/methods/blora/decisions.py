"""Decisions of an evidence run: when they are made, from what, and what they change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayeslora.methods.allocation import (
    Allocation,
    CostModel,
    Evidence,
    Product,
    TensorKey,
    allocate,
    check_target,
    falling,
)
from bayeslora.methods.blora.components import close_together, taken_over
from bayeslora.methods.blora.config import BLoraConfig
from bayeslora.methods.blora.evidence import RANGED, width_table
from bayeslora.methods.tuner import summed_over_ranks
from bayeslora.posterior.draws import whole, write
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
    def of(cls, begin: int, end: int, total_steps: int, *, learns_bits: bool) -> Schedule:
        """Return the schedule of a run whose gates may move in steps `begin` to `end` - 1.

        Widths and ranks that are learned together are decided several times, and ranges then learn at the final ones.
        Ranks alone are decided once, after the last of these steps: components are chosen together and those that stay
        take over, so there is nothing to approach by degrees, and to train on at lower ranks only forgets.
        """
        length = end - begin
        count = max(1, min(DECISIONS, length // 2)) if learns_bits else 1
        last = max(count, math.ceil(DECIDED * length)) if learns_bits else length
        decisions = tuple(begin + math.ceil(last * k / count) - 1 for k in range(1, count + 1))
        each = max(1, int(EVIDENCE_SHARE * total_steps / PASS_COST / count))
        starts = (begin, *(step + 1 for step in decisions[:-1]))
        passes = (range(max(start, step + 1 - each), step + 1) for start, step in zip(starts, decisions, strict=True))
        return cls(decisions, frozenset(step for group in passes for step in group))

    def progress(self, step: int) -> float:
        """Return how far prices and budgets have come after `step`, which is that of a decision: 1 in the last two.

        The last decision sees the network that the one before it has made. A gate that looked worthless when it was
        open, because the layers after it had saturated, shows its worth when it is closed, and opens again.
        """
        return min(1.0, (self.decisions.index(step) + 1) / max(1, len(self.decisions) - 1))


@dataclass
class Choice:
    """Widths and open components of every layer, and the prices at which they were decided."""

    widths: dict[TensorKey, int]
    open: dict[str, list[bool]]
    prices: tuple[float, float]

    @property
    def ranks(self) -> dict[str, int]:
        """Number of open components of each layer."""
        return {path: sum(components) for path, components in self.open.items()}


def choose(
    layers: Mapping[str, Any], name: str, config: BLoraConfig, costs: Mapping[str, CostModel], progress: float
) -> Choice:
    """Choose what the evidence of `layers` and the budgets or prices of `config` ask for at `progress` in [0, 1].

    Ranks are closed under their own budget or price first; then widths under theirs, which may close further ranks.
    """
    deltas = _rank_deltas(layers, name)
    found = Choice({}, {path: [True] * len(row) for path, row in deltas.items()}, (0.0, 0.0))
    if config.learns_ranks:
        found.open, price = _close_components(layers, name, costs["rank"], config, progress)
        found.prices = (0.0, price)
    if config.learns_bits:
        kept = {
            path: [delta for delta, stays in zip(row, found.open[path], strict=True) if stays]
            for path, row in deltas.items()
        }
        evidence = _with_widths(layers, name, config, kept)
        currency, target = config.currency
        # Components that the rotation has left at zero cost nothing, in a run that is resumed after it as well.
        ranks = {path: int(layer.kept(name).sum()) for path, layer in layers.items()}
        cost = replace(costs[currency], default_ranks=ranks)
        chosen = _allocate(evidence, cost, target, config.bops_price, progress)
        found.widths, found.prices = chosen.widths, (chosen.price, found.prices[1])
        for path, components in chosen.open.items():
            stays = iter(components)
            found.open[path] = [was_open and next(stays) for was_open in found.open[path]]
    return found


def _close_components(
    layers: Mapping[str, Any], name: str, cost: CostModel, config: BLoraConfig, progress: float
) -> tuple[dict[str, list[bool]], float]:
    """Return the components that stay open in each layer, and the price of a rank at which the last one closed."""
    sizes = {path: len(layer.evidence(name).rank_deltas) for path, layer in layers.items()}
    columns = _columns([layer.evidence(name) for layer in layers.values()])
    unit = cost.share({}, {**dict.fromkeys(sizes, 0), next(iter(sizes)): 1})  # all ranks cost the same
    if config.target_rank is None:
        price = config.price_of_rank * progress**3
        is_open, _ = close_together(columns, price=price * unit)
    else:
        start = cost.share({}, sizes)
        share = min(start, falling(progress, start, config.target_rank)) if start > config.target_rank else start
        is_open, rise = close_together(columns, limit=math.floor(share / unit + 1e-9))
        price = rise / unit
    return {path: part.tolist() for path, part in zip(sizes, is_open.split(list(sizes.values())), strict=True)}, price


def _columns(evidence: Sequence[Any]) -> Tensor:
    """Return the columns (m, K) of a square root of F, for all layers' components: of the sketch, where there is one.

    The trace of F is that of the passes, whose labels are the model's own.
    """
    deltas = torch.cat([each.rank_deltas for each in evidence]).double().clamp_min(0)
    if all(len(each.rank_sketch) for each in evidence):
        columns = torch.cat([each.rank_sketch for each in evidence], dim=1).double()
        trace = columns.square().sum()
        if trace > 0 and deltas.sum() > 0:
            return columns * (2 * deltas.sum() / trace).sqrt()
    return (2 * deltas).sqrt().diag()


def _allocate(evidence: Evidence, cost: CostModel, target: float | None, price: float, progress: float) -> Allocation:
    if target is None:
        return allocate(evidence, cost, price=price * progress**3)
    widest = {key: max(table) for key, table in evidence.widths.items()}
    start = cost.share(widest, {path: len(row) for path, row in evidence.ranks.items()})
    if start <= target:
        return allocate(evidence, cost, price=0.0)
    return allocate(evidence, cost, target=falling(progress, start, target))


def check_reachable(layers: Mapping[str, Any], name: str, config: BLoraConfig, cost: CostModel, target: float) -> None:
    """Raise BayesLoraError if not even the narrowest widths reach `target`."""
    evidence = _with_widths(layers, name, config, _rank_deltas(layers, name))
    check_target(evidence, cost, target, f"target_{config.currency[0]}")


def _rank_deltas(layers: Mapping[str, Any], name: str) -> dict[str, list[float]]:
    return {path: layer.evidence(name).rank_deltas.tolist() for path, layer in layers.items()}


def _with_widths(
    layers: Mapping[str, Any], name: str, config: BLoraConfig, ranks: Mapping[str, list[float]]
) -> Evidence:
    """Return the evidence for all widths, and for the components in `ranks` where ranks are learned."""
    tables = {
        (path, kind): table for path, layer in layers.items() for kind, table in width_table(layer, name, config)
    }
    return Evidence(tables, ranks if config.learns_ranks else {})


@torch.no_grad()
def apply(layers: Mapping[str, Any], name: str, choice: Choice) -> None:
    """Give every layer its new widths and ranks; a tensor whose width changes gets the best range for it."""
    if all(name in layer.blora_rank for layer in layers.values()):
        _set_components(layers, name, choice)
    for path, layer in layers.items():
        present = layer.widths(name)
        for kind in layer.quantized_kinds(name):
            bits = choice.widths[path, kind]
            if bits != present[kind]:
                layer.quantizers(name).set_width(kind, bits, best_range(layer, name, kind, bits))


def _set_components(layers: Mapping[str, Any], name: str, choice: Choice) -> None:
    """Open and close components; those that stay take over from those that go, where it is known how."""
    open_now = [torch.tensor(choice.open[path], dtype=torch.bool) for path in layers]
    columns = _columns([layer.evidence(name) for layer in layers.values()])
    was_open = torch.cat([layer.kept(name).cpu() for layer in layers.values()])
    factors = taken_over(columns, was_open, torch.cat(open_now)).split([len(mask) for mask in open_now])
    for layer, is_open, factor in zip(layers.values(), open_now, factors, strict=True):
        diagonal = layer.blora_E[name]
        layer.rank_gates(name).set_open(is_open.to(diagonal.device))
        write(diagonal, whole(diagonal) * factor.to(diagonal.device, diagonal.dtype))


def best_range(layer: Any, name: str, kind: str, bits: int) -> Tensor:
    """Return the range with the least squared error at `bits` bits: of a weight, or of the activations observed."""
    if kind not in ACTIVATIONS:
        return layer.weight_range(name, kind, bits)
    evidence = layer.evidence(name)
    index = layer.quantizers(name).kinds.index(kind)
    column = RANGED.index(min(bits, RANGED[-1]))
    if not evidence.passes or not evidence.ranges[index, column]:
        return torch.tensor(10.0)  # no batch has reached the layer: clip nothing it is likely to see
    return evidence.ranges[index, column] / evidence.passes


@torch.no_grad()
def pooled(found: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the sums of every layer over all ranks of a distributed run."""
    flat = summed_over_ranks(torch.cat([tensor.flatten() for sums in found for tensor in sums.values()]))
    parts = iter(flat.split([tensor.numel() for sums in found for tensor in sums.values()]))
    return [{key: next(parts).view(tensor.shape) for key, tensor in sums.items()} for sums in found]


def record(
    layers: Mapping[str, Any], name: str, choice: Choice, cost: CostModel | None, num_examples: int | None
) -> None:
    """Keep with the evidence of each layer what its gates save, and the prices at which they were decided."""
    by_layer: dict[str, list[Product]] = {path: [] for path in layers}
    cost = cost or CostModel((), 0.0)
    for product in cost.products:
        for path in {side[0] for side in (product.left, product.right) if not isinstance(side, int)} & layers.keys():
            by_layer[path].append(product)
    for path, layer in layers.items():
        evidence = layer.evidence(name)
        price, rank_price = choice.prices
        rank_saving = 1 / len(layers)
        # A rank must be worth both prices; the one that decides it is kept.
        own = replace(cost, products=tuple(p for p in by_layer[path] if p.rank_of == path))
        saving = own.share(choice.widths, {**choice.ranks, path: 1})
        if cost.baseline and price * saving > rank_price * rank_saving:
            rank_price, rank_saving = price, saving
        evidence.prices.copy_(torch.tensor([price, rank_price]))
        evidence.examples.fill_(num_examples or 0)
        evidence.rank_savings.fill_(rank_saving)
        for row, kind in enumerate(layer.quantized_kinds(name)):
            key = (path, kind)
            own = replace(cost, products=tuple(p for p in by_layer[path] if key in (p.left, p.right)))
            shares = [own.share({**choice.widths, key: bits}, choice.ranks) for bits in WIDTHS]
            savings = [wide - narrow for narrow, wide in zip(shares, shares[1:], strict=False)]
            evidence.width_savings[row] = torch.tensor(savings)
