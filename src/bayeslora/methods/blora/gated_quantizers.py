"""The quantizers of one adapted layer and its rank gates: their parameters, phases and noise, but no forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bayeslora.posterior.draws import whole, write
from bayeslora.quantization import (
    FLOOR,
    SURE_LOGIT,
    Calibration,
    Float32Module,
    active_widths,
    evaluation_width,
    fixed_logits,
    hard_concrete,
    mixture_weights,
    optimal_range,
    quantize,
    quantize_mixture,
    rank_gates,
)
from bayeslora.vocabulary import ACTIVATIONS, BASE_WEIGHT, UNQUANTIZED, WIDTHS

_LOG_LIMIT = 20.0  # keeps a range finite and non-zero whatever an optimizer does to its logarithm


class Phase(IntEnum):
    """Phase of an adapter's training; stored with it, because evaluation depends on it."""

    WARM_UP = 0  # full precision; ranges are being observed
    LEARN = 1  # gates are sampled and penalised
    FROZEN = 2  # gates are fixed at their evaluation values, ranges where they are; the weights train on


class Assignment(NamedTuple):
    """Ranges, mixture weights (None at one fixed width each) and widths of a layer's tensors in one forward pass."""

    ranges: tuple[Tensor, ...]
    weights: tuple[Tensor, ...] | None
    widths: tuple[tuple[int, ...], ...]


class Unquantized:
    """Take every tensor of a forward pass as it is."""

    replaces_weight = False
    """True if the pass multiplies by another weight than the base layer's."""

    def __call__(self, kind: str, tensor: Tensor) -> Tensor:
        return tensor

    def saving(self, kind: str, tensor: Tensor, quantized: Tensor) -> AbstractContextManager[Any]:
        """Let the backward pass of what is computed inside quantize `tensor` again, instead of keeping `quantized`.

        The input is kept anyway; its quantized form would take as much memory again.
        """
        return nullcontext()


class Observing(Unquantized):
    """Take every tensor as it is, and widen the observed ranges by the activations among them."""

    def __init__(self, quantizers: Quantizers, method: Calibration) -> None:
        self.quantizers, self.method = quantizers, method

    def __call__(self, kind: str, tensor: Tensor) -> Tensor:
        if kind in ACTIVATIONS and kind in self.quantizers.kinds:
            self.quantizers.observe(kind, tensor.detach(), calibration_bits(kind), self.method)
        return tensor


class Quantizing(Unquantized):
    """Quantize every tensor as `assignment` says; `weight` is the base weight where it is known already."""

    def __init__(self, quantizers: Quantizers, assignment: Assignment, weight: Tensor | None = None) -> None:
        self.quantizers, self.assignment, self.weight = quantizers, assignment, weight
        self.replaces_weight = BASE_WEIGHT in quantizers.kinds

    def __call__(self, kind: str, tensor: Tensor) -> Tensor:
        if kind == BASE_WEIGHT and self.weight is not None:
            return self.weight
        return self.quantizers.quantized(kind, tensor, self.assignment)

    def saving(self, kind: str, tensor: Tensor, quantized: Tensor) -> AbstractContextManager[Any]:
        mixed = self.assignment.weights is not None  # of several widths, to quantize again costs too much
        if mixed or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nullcontext()
        place, size, source, version = quantized.data_ptr(), quantized.numel(), tensor.detach(), tensor._version
        if place == tensor.data_ptr():  # not quantized at all
            return nullcontext()

        def pack(saved: Tensor) -> Tensor | torch.Size:
            same = saved.data_ptr() == place and saved.numel() == size and saved.is_contiguous()
            return saved.shape if same else saved

        @torch.no_grad()
        def unpack(kept: Tensor | torch.Size) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            if source._version != version:
                raise RuntimeError("the input of an adapted layer was changed in place after it had been used")
            return self.quantizers.quantized(kind, source, self.assignment).reshape(kept)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class FrozenWeight:
    """The base weight at its final width, computed once: neither it nor its range changes any more."""

    def __init__(self) -> None:
        self.cached: tuple[tuple[Any, ...], Tensor] | None = None

    @torch.no_grad()
    def of(self, quantizers: Quantizers, weight: Tensor, assignment: Assignment) -> Tensor:
        if torch.compiler.is_exporting():  # a traced tensor has no address
            return quantizers.quantized(BASE_WEIGHT, weight, assignment)
        key = (quantizers.version, version_of(weight), weight.data_ptr(), weight.dtype)
        if self.cached is None or self.cached[0] != key:
            self.cached = (key, quantizers.quantized(BASE_WEIGHT, weight, assignment).detach())
        return self.cached[1]


class FrozenWidths:
    """Widths under frozen gates, read from the device once for every write to them.

    Gates that learn are read each time: fused optimizers write to parameters without raising their version.
    """

    def __init__(self) -> None:
        self._cached: tuple[tuple[Any, ...], tuple[int, ...]] | None = None

    def of(self, quantizers: Quantizers) -> tuple[int, ...]:
        known = self._cached
        if known is None or not (torch.compiler.is_compiling() or known[0] == quantizers.version):
            known = self._cached = (quantizers.version, quantizers.evaluation_widths())
        return known[1]


class DrawnWidths:
    """Widths with a part in one draw of the gates, read from the device once for all passes of an optimizer step."""

    def __init__(self) -> None:
        self._cached: tuple[Tensor | None, Any, tuple[tuple[int, ...], ...]] | None = None

    def of(self, quantizers: Quantizers, gates: Tensor) -> tuple[tuple[int, ...], ...]:
        if torch.compiler.is_compiling():  # no branch on values in a traced graph: every term takes part
            return (WIDTHS,) * len(quantizers.kinds)
        noise, version = quantizers.noise, version_of(quantizers.gates)
        known = self._cached
        if noise is None or known is None or known[0] is not noise or known[1] != version:
            known = (noise, version, tuple(active_widths(row) for row in gates.detach().tolist()))
            self._cached = known
        return known[2]


class Progress(Float32Module):
    """Progress of one adapter: its `phase`."""

    phase: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.tensor(int(Phase.WARM_UP)))
        self._known: tuple[Tensor, Any, Phase] | None = None

    @property
    def current(self) -> Phase:
        """The phase, read from the device only when it has changed."""
        if torch.compiler.is_compiling():
            return self._known[2] if self._known is not None else Phase.WARM_UP
        if self._known is None or self._known[0] is not self.phase or self._known[1] != version_of(self.phase):
            self._known = (self.phase, version_of(self.phase), Phase(int(self.phase)))
        return self._known[2]

    @torch.no_grad()
    def advance(self, phase: Phase) -> None:
        self.phase.fill_(int(phase))
        _ = self.current


class Quantizers(Float32Module):
    """Bit gates, ranges and calibration of the `kinds` of tensors of one layer.

    Args:
        kinds: names of the quantized tensors, in order.
        shapes: shape of the range of each kind that has one a channel, such as (d_out, 1), or one a group of inputs,
            (d_out, groups); the others have one number.
        transposed: whether the base weight is (d_in, d_out).
        initial_logits: for each kind the starting logits of the gates of 4, 8, 16 and 32 bits.
        learned: gates and the base weight's range are trained; otherwise evidence sets them, and they are buffers.

    Tensors (all float32 whatever the model is cast to): `gates` (kinds, 4) logits; `log_weight_range`, the logarithm
    of the base weight's range, which stops learning when gates freeze; `log_ranges`, those of the other kinds, always
    trained; `observed` (kinds,), the largest range seen in calibration, 0 where none was.
    """

    gates: Tensor
    log_weight_range: Tensor
    observed: Tensor

    def __init__(
        self,
        kinds: tuple[str, ...],
        shapes: dict[str, tuple[int, int]],
        initial_logits: Sequence[Sequence[float]],
        learned: bool = True,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.kinds = kinds
        self.shapes: list[tuple[int, ...]] = [shapes.get(kind, ()) for kind in kinds]
        self.channels = [math.prod(shape) for shape in self.shapes]
        _hold(self, "gates", torch.tensor([list(row) for row in initial_logits], dtype=torch.float32), learned)
        if BASE_WEIGHT in kinds:
            if kinds[0] != BASE_WEIGHT:
                raise ValueError(f"the base weight comes first among the quantized tensors, not {kinds}")
            _hold(self, "log_weight_range", torch.zeros(self.channels[0]), learned)
        self.log_ranges = nn.Parameter(torch.zeros(sum(self.channels[BASE_WEIGHT in kinds :])))
        self.register_buffer("observed", torch.zeros(len(kinds)))
        self.generation = 0  # counts writes to the ranges other than an optimizer's
        self.noise: Tensor | None = None  # (kinds, 4) uniform, shared by every forward pass of one optimizer step
        self._frozen_widths, self._drawn_widths = FrozenWidths(), DrawnWidths()

    def shape_of(self, kind: str) -> tuple[int, ...]:
        """Shape of the range of `kind`, () for one number."""
        return self.shapes[self.kinds.index(kind)] if kind in self.kinds else ()

    def is_narrow(self, kind: str) -> bool:
        """True if `kind` is quantized to fewer than 32 bits."""
        return kind in self.kinds and self._frozen_widths.of(self)[self.kinds.index(kind)] < UNQUANTIZED

    def evaluation_widths(self) -> tuple[int, ...]:
        """Width of each kind with its gates at their evaluation values."""
        return tuple(evaluation_width(row) for row in self.gate_logits.detach().tolist())

    @property
    def gate_logits(self) -> Tensor:
        """Logits (kinds, 4) of the bit gates, gathered where they are sharded; checkpoints know them as `gates`."""
        return gathered(self.gates)

    def ranges(self) -> tuple[Tensor, ...]:
        """Positive ranges, one tensor a kind, differentiable: exp of the stored logarithms."""
        ranges = _exp(self.log_ranges).split(self.channels[BASE_WEIGHT in self.kinds :])
        return (_exp(self.log_weight_range), *ranges) if BASE_WEIGHT in self.kinds else ranges

    def sampled(self) -> Assignment:
        """Gates drawn with the step's noise, or with fresh noise where no step was announced."""
        noise = self.noise if self.noise is not None else _uniform(self.gate_logits)
        gates = hard_concrete(self.gate_logits.float(), noise)
        return Assignment(self.ranges(), mixture_weights(gates).unbind(), self._drawn_widths.of(self, gates))

    def fixed(self) -> Assignment:
        """Every tensor at its evaluation width, while gates may still learn."""
        return Assignment(self.ranges(), None, tuple((bits,) for bits in self.evaluation_widths()))

    def frozen(self) -> Assignment:
        """Every tensor at its final width and range."""
        ranges = tuple(bound.detach() for bound in self.ranges())
        return Assignment(ranges, None, tuple((bits,) for bits in self._frozen_widths.of(self)))

    def chosen(self) -> Assignment:
        """Every tensor at the width that evidence has chosen; ranges of all but the base weight learn."""
        ranges = self.ranges()
        if BASE_WEIGHT in self.kinds:
            ranges = (ranges[0].detach(), *ranges[1:])
        return Assignment(ranges, None, tuple((bits,) for bits in self._frozen_widths.of(self)))

    @torch.no_grad()
    def set_width(self, kind: str, bits: int, value: Tensor) -> None:
        """Give `kind` another width, and `value` as its range."""
        self.gates[self.kinds.index(kind)] = torch.tensor(fixed_logits(bits)).to(self.gates)
        self.set_range(kind, value)

    @property
    def version(self) -> tuple[Any, ...]:
        """Changes with every write to the gates, or to the base weight's range, but an optimizer's."""
        learned = [self.gates, self.log_weight_range] if BASE_WEIGHT in self.kinds else [self.gates]
        return (self.generation, *map(version_of, learned), *(id(p) for p in learned))

    def draw(self, noise: Tensor) -> None:
        """Fix the gates' noise, uniform of shape (kinds, 4), until the next draw."""
        self.noise = noise.to(self.gates.device).clamp(1e-6, 1 - 1e-6)

    def quantized(self, kind: str, x: Tensor, assignment: Assignment) -> Tensor:
        """`x` as `assignment` has it; unchanged where `kind` is not quantized in this layer."""
        if kind not in self.kinds:
            return x
        index = self.kinds.index(kind)
        widths = assignment.widths[index]
        if widths == (UNQUANTIZED,):  # 32 bits mean that nothing is rounded, and then nothing is clipped either
            return x
        bound = assignment.ranges[index].view(self.shapes[index])
        if kind == BASE_WEIGHT and self.transposed:
            bound = bound.t()
        if assignment.weights is None:
            return quantize(x, bound, widths[0])
        return quantize_mixture(x, bound, assignment.weights[index], widths)

    @torch.no_grad()
    def observe(self, kind: str, x: Tensor, bits: int, method: Calibration) -> None:
        """Widen the observed range of `kind` to the best range of `x`: the largest over batches, calls and ranks."""
        index = self.kinds.index(kind)
        best = optimal_range(x, bits, method)
        self.observed[index] = torch.maximum(self.observed[index], best)

    @torch.no_grad()
    def set_range(self, kind: str, value: Tensor) -> None:
        """Set the range of `kind` to `value` (its number of channels, or one number for all)."""
        value = value.reshape(-1).clamp_min(FLOOR).log()
        self.generation += 1
        if kind == BASE_WEIGHT:
            write(self.log_weight_range, value.expand(self.log_weight_range.shape))
            return
        index = self.kinds.index(kind)
        start = sum(self.channels[BASE_WEIGHT in self.kinds : index])
        logarithms = gathered(self.log_ranges.detach()).clone()
        logarithms[start : start + self.channels[index]] = value.to(logarithms)
        write(self.log_ranges, logarithms)

    def log_range(self, kind: str) -> Tensor:
        """Logarithms of the range of `kind`, limited as `ranges` limits them: one number a channel."""
        if kind == BASE_WEIGHT:
            return gathered(self.log_weight_range.detach()).float().clamp(-_LOG_LIMIT, _LOG_LIMIT)
        parts = gathered(self.log_ranges.detach()).split(self.channels[BASE_WEIGHT in self.kinds :])
        part = parts[self.kinds.index(kind) - (BASE_WEIGHT in self.kinds)]
        return part.float().clamp(-_LOG_LIMIT, _LOG_LIMIT)

    @torch.no_grad()
    def cut_channels(self, kind: str, keep: Tensor) -> None:
        """Drop the channels of a per-channel range that `keep` (rows,) does not name; one range for all stays."""
        index = self.kinds.index(kind)
        if self.shapes[index] == ():
            return
        parts = list(self.log_ranges.detach().split(self.channels[BASE_WEIGHT in self.kinds :]))
        position = index - (BASE_WEIGHT in self.kinds)
        parts[position] = parts[position][keep]
        self.shapes[index] = (int(keep.sum()), 1)
        self.channels[index] = int(keep.sum())
        self.log_ranges = nn.Parameter(torch.cat(parts), self.log_ranges.requires_grad)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.generation += 1


class RankGates(Float32Module):
    """Logits (r,) of the rank gates of one layer; float32 whatever the model is cast to.

    Gates are nested and learned, as the paper has them, or `independent`: open where their logit is positive, which
    evidence sets.
    """

    logits: Tensor

    def __init__(self, rank: int, initial_logit: float, independent: bool = False) -> None:
        super().__init__()
        self.independent = independent
        _hold(self, "logits", torch.full((rank,), initial_logit, dtype=torch.float32), not independent)

    @torch.no_grad()
    def cut(self, keep: Tensor) -> None:
        """Drop the gates that `keep` (r,) does not name."""
        left = self.logits.detach()[keep].contiguous()
        self.logits = left if self.independent else nn.Parameter(left, self.logits.requires_grad)

    def forward(self) -> Tensor:
        if self.independent:
            return (self.logits > 0).float()
        return rank_gates(self.all_logits.float())

    @property
    def all_logits(self) -> Tensor:
        """The logits (r,), gathered where they are sharded."""
        return gathered(self.logits)

    @torch.no_grad()
    def set_open(self, is_open: Tensor) -> None:
        """Open the gates that `is_open` (r,) names, and close the others."""
        self.logits.copy_(torch.where(is_open, SURE_LOGIT, -SURE_LOGIT))


def calibration_bits(kind: str) -> int:
    """Width at which a range starts out best: where its tensor is likely to end."""
    return 8 if kind in (BASE_WEIGHT, "in", "out") else 4


def _hold(module: nn.Module, name: str, value: Tensor, learned: bool) -> None:
    if learned:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


def gathered(tensor: Tensor) -> Tensor:
    """Return `whole(tensor)`, and leave a forward pass in this file where nothing is sharded."""
    return whole(tensor) if isinstance(tensor, DTensor) else tensor


def version_of(tensor: Tensor) -> Any:
    """Return a value that changes with every write to `tensor`: of one made in inference mode, with every call."""
    return object() if tensor.is_inference() else tensor._version


def _exp(logarithm: Tensor) -> Tensor:
    return gathered(logarithm).float().clamp(-_LOG_LIMIT, _LOG_LIMIT).exp()


def _uniform(like: Tensor) -> Tensor:
    return torch.rand_like(like, dtype=torch.float32).clamp(1e-6, 1 - 1e-6)
