r"""Evidence of the gates: by how much the mean loss rises when a gate closes, as it is kept and described.

`probe.py` measures it, `decisions.py` decides by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bayeslora.methods.allocation import open_probability
from bayeslora.methods.blora.config import BLoraConfig
from bayeslora.methods.description import GateDescription
from bayeslora.quantization import Float32Module
from bayeslora.vocabulary import WIDTHS

MEASURED = (2, 4, 8)
"""Widths whose error is measured; at 16 bits it is 2^-16 of that at 8 in the square, and at 32 there is none."""

RANGED = (*MEASURED, 16)
"""Widths for which the best ranges of activations are kept."""

RANK = "rank"
"""Kind of the gates of components."""


class Evidence(Float32Module):
    """Evidence gathered for one layer, kept with the adapter: a run resumes with it, `describe` reports it.

    Tensors: `width_sums` (kinds, 3), sums over rows of squared directional derivatives for 2, 4 and 8 bits;
    `rank_sums` (r,), the same for each component; `terms`, the number of terms of the loss in these sums;
    `rank_sketch` (m, r), derivatives along the components (`components.py`), empty when they are not needed; `ranges`
    (kinds, 4), sums of the best ranges of activations for 2, 4, 8 and 16 bits, and `passes`, their number;
    `width_savings` (kinds, 4) and `rank_savings` (r,), the cost that closing a gate saves; `prices` (2,), in nats of
    mean loss for a unit of that cost, of widths and of ranks; `examples`, N, 0 where it is unknown; `present` (r,), 0
    for components that have been cut since: r is the rank before the cut, so that their numbers stay.
    """

    width_sums: Tensor
    rank_sums: Tensor
    rank_sketch: Tensor
    terms: Tensor
    ranges: Tensor
    passes: Tensor
    width_savings: Tensor
    rank_savings: Tensor
    prices: Tensor
    examples: Tensor
    present: Tensor

    def __init__(self, kinds: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("width_sums", torch.zeros(kinds, len(MEASURED)))
        for name in ("ranges", "width_savings"):
            self.register_buffer(name, torch.zeros(kinds, len(RANGED)))
        for name in ("rank_sums", "rank_savings"):
            self.register_buffer(name, torch.zeros(rank))
        for name in ("terms", "passes", "examples"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("rank_sketch", torch.zeros(0, rank))
        self.register_buffer("prices", torch.zeros(2))
        self.register_buffer("present", torch.ones(rank))

    @property
    def width_deltas(self) -> Tensor:
        """Rise of the mean loss (kinds, 3) when a tensor has 2, 4 or 8 bits instead of none."""
        return self.width_sums / (2 * self.terms).clamp_min(1)

    @property
    def rank_deltas(self) -> Tensor:
        """Rise of the mean loss when a component is left out, of those that have not been cut."""
        return self.all_rank_deltas[self.is_present]

    @property
    def all_rank_deltas(self) -> Tensor:
        """Rise of the mean loss (r,) when a component is left out, cut ones included."""
        return self.rank_sums / (2 * self.terms).clamp_min(1)

    @property
    def is_present(self) -> Tensor:
        """Boolean mask (r,) of the components that have not been cut."""
        return self.present > 0

    @property
    def is_decided(self) -> bool:
        """True once the last decision has been made: what the gates save is known from then on."""
        return bool(self.width_savings.any() or self.rank_savings.any())

    @torch.no_grad()
    def add(self, found: Mapping[str, Tensor]) -> None:
        """Add one step's sums, by the names of the buffers."""
        for name, value in found.items():
            buffer = getattr(self, name)
            if name == "rank_sums":
                buffer[self.is_present] += value.to(buffer)
            else:
                buffer.add_(value.to(buffer))

    @torch.no_grad()
    def add_sketch(self, sketch: Tensor) -> None:
        """Add one step's sketch (m, components that have not been cut)."""
        if not len(self.rank_sketch):
            self.rank_sketch = self.rank_sketch.new_zeros(len(sketch), self.rank_sketch.shape[1])
        self.rank_sketch += sketch.to(self.rank_sketch)

    def drop_sketch(self) -> None:
        self.rank_sketch = self.rank_sketch.new_zeros(0, self.rank_sketch.shape[1])

    @torch.no_grad()
    def forget(self, share: float) -> None:
        """Give what was found until now the weight `share` beside what will be."""
        self.rank_sketch.mul_(share**0.5)
        for name in ("width_sums", "rank_sums", "terms", "ranges", "passes"):
            getattr(self, name).mul_(share)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        """Load what is there; what a file lacks keeps its initial value."""
        for name, tensor in self._buffers.items():
            given = state.setdefault(prefix + name, tensor)
            if tensor is not None and name in ("rank_sums", "rank_sketch", "rank_savings", "present"):
                self._buffers[name] = tensor.new_zeros(given.shape)  # with the components that have been cut
        super()._load_from_state_dict(state, prefix, *args)

    def cut(self, keep: Tensor) -> None:
        """Mark the components that `keep` does not name as cut; before the last decision, drop them.

        Args:
            keep: mask of those that have not been cut before.
        """
        if self.is_decided:
            self.present[self.is_present] = keep.to(self.present)
            return
        for name in ("rank_sums", "rank_sketch", "rank_savings", "present"):
            self._buffers[name] = getattr(self, name)[..., keep].contiguous()


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
