"""The layer of B-LoRA: its tensors, its forward pass, and what of it is deployed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.blora.components import Watch
from bayeslora.methods.blora.config import BLoraConfig
from bayeslora.methods.blora.evidence import Evidence, described_gates
from bayeslora.methods.blora.gated_quantizers import (
    Assignment,
    FrozenWeight,
    Observing,
    Phase,
    Progress,
    Quantizers,
    Quantizing,
    RankGates,
    Unquantized,
    calibration_bits,
    gathered,
    version_of,
)
from bayeslora.methods.blora.probe import Probe, probed_forward
from bayeslora.methods.description import LayerDescription
from bayeslora.methods.layer import BayesLayer, PackedTensors, add_update
from bayeslora.quantization import SURE_LOGIT, fixed_logits, linear, optimal_range
from bayeslora.vocabulary import ACTIVATIONS, BASE_WEIGHT, KINDS, MATRICES, UNQUANTIZED


class BLoraLayer(BayesLayer):
    """One linear layer under B-LoRA (Algorithm 1); the same in plain torch on one page: `tests/oracles/blora.py`.

    Tensors of an adapter: `blora_A` (r, d_in), `blora_B` (d_out, r), `blora_E` (r,), rank gate logits (r,), and the
    quantizers' gates and ranges. `blora_progress` holds its phase.
    """

    adapter_layer_names = ("blora_A", "blora_B", "blora_E", "blora_rank", "blora_quantizers")
    other_param_names = (*BayesLayer.other_param_names, "blora_progress", "blora_evidence", "configs")
    optional_state = (".blora_evidence.", ".blora_progress.penalty_scale")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.blora_A, self.blora_B, self.blora_E = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.blora_rank, self.blora_quantizers = nn.ModuleDict(), nn.ModuleDict()
        self.blora_progress, self.blora_evidence = nn.ModuleDict(), nn.ModuleDict()
        self.configs: dict[str, BLoraConfig] = {}
        self.training_adapters: set[str] = set()  # adapters whose calibration a training loop ends
        self.collects_ranges = True  # whether this step's activations count for their ranges
        self.frozen_weight = FrozenWeight()
        self.probe: Probe | None = None  # measures the evidence of one pass
        self.watch: Watch | None = None  # gathers that of the components in one training step
        self._weight_ranges: dict[tuple[Any, ...], Tensor] = {}

    def add_adapter(self, adapter_name: str, config: BLoraConfig, rank: int) -> None:
        self.configs[adapter_name] = config
        self.blora_A[adapter_name], self.blora_B[adapter_name] = self.initial_factors(config, rank)
        self.blora_E[adapter_name] = nn.Parameter(torch.ones(rank))
        self.blora_progress[adapter_name] = Progress()
        by_evidence = config.gates == "evidence"
        if config.learns_ranks:
            self.blora_rank[adapter_name] = RankGates(rank, config.initial_rank_logit, independent=by_evidence)
        if config.learns_bits:
            self.blora_quantizers[adapter_name] = self._make_quantizers(config, rank)
        if by_evidence:
            self.blora_evidence[adapter_name] = Evidence(len(self.quantized_kinds(adapter_name)), rank)

    def quantizers(self, name: str) -> Quantizers:
        return cast(Quantizers, self.blora_quantizers[name])

    def rank_gates(self, name: str) -> RankGates:
        return cast(RankGates, self.blora_rank[name])

    def evidence(self, name: str) -> Evidence:
        return cast(Evidence, self.blora_evidence[name])

    def quantized_kinds(self, name: str) -> tuple[str, ...]:
        """Kinds of tensors that have quantizers."""
        return self.quantizers(name).kinds if name in self.blora_quantizers else ()

    def progress(self, name: str) -> Progress:
        return cast(Progress, self.blora_progress[name])

    def _make_quantizers(self, config: BLoraConfig, rank: int) -> Quantizers:
        if not self.has_plain_weight and BASE_WEIGHT in (config.fixed_bits or {}):
            raise BayesLoraError(
                "fixed_bits names weight, but a base weight loaded in few bits keeps those: leave it out"
            )
        kinds = [BASE_WEIGHT] if self.has_plain_weight else []
        kinds += ["in"] if config.quantize_input else []
        kinds += [kind for kind in KINDS if kind != BASE_WEIGHT]
        config.require_something_to_learn(kinds)
        # Not for B: a range for its r entries a row would cost as much as the entries themselves.
        shapes = {BASE_WEIGHT: (self.out_features, 1), "A": (rank, 1)} if config.per_channel else {}
        if config.group_size is not None:
            shapes[BASE_WEIGHT] = (self.out_features, self._groups(config.group_size))
        by_evidence = config.gates == "evidence"  # which begins at full precision
        logits = [fixed_logits(UNQUANTIZED) if by_evidence else config.bit_logits(kind) for kind in kinds]
        return Quantizers(tuple(kinds), shapes, logits, learned=not by_evidence, transposed=self.is_transposed)

    def _groups(self, size: int) -> int:
        """Number of groups of this many inputs."""
        if not self.has_plain_weight:
            raise BayesLoraError(
                "group_size is given, but a base weight loaded in few bits keeps its own ranges: leave it out"
            )
        if self.in_features % size:
            raise BayesLoraError(
                f"group_size is {size}, but must divide the {self.in_features} inputs of a layer: choose a divisor"
            )
        return self.in_features // size

    def adapted(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(adapter_names) == 1:
            return self._adapted_by(adapter_names[0], x, *args, **kwargs)
        self._check_quantized_once(adapter_names)
        result = self.base_layer(x, *args, **kwargs)
        for name in adapter_names:
            a = self.blora_A[name]
            hidden = F.linear(self.adapter_input(name, x, a.dtype), a)
            hidden = hidden * self.gated(name, self.blora_E[name]).to(hidden.dtype)
            result = add_update(result, hidden, self.blora_B[name], self.scaling[name])
        return result

    def _check_quantized_once(self, adapter_names: list[str]) -> None:
        if len(adapter_names) > 1 and any(self.is_quantizing(name) for name in adapter_names):
            raise BayesLoraError(
                f"adapters {adapter_names} each quantize the same base weight: activate one of them at a time"
            )

    def _adapted_by(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        r"""$Q_{out}(Q_w(W_0) Q_{in}(x) + b + s Q_b(B) Q_E((Q_e(E) \circ G) \circ Q_A(Q_a(A) Q_{in}(x))))$."""
        if self.probe is not None:
            return probed_forward(self, name, x, self.probe, *args, **kwargs)
        quantized = self._quantization(name, x, *args, **kwargs)
        source, x = x, quantized("in", x)
        if quantized.replaces_weight:
            weight = quantized(BASE_WEIGHT, self.weight)
            inputs = x.reshape(-1, x.shape[-1])
            result = linear(inputs, weight.T if self.is_transposed else weight, self.bias)
        else:
            inputs, result = x, self.base_layer(x, *args, **kwargs)

        a, b = quantized("A", self.blora_A[name]), quantized("B", self.blora_B[name])
        e = self.gated(name, quantized("E", self._diagonal(name)))

        with quantized.saving("in", source, inputs):
            hidden = quantized("A_out", F.linear(self.adapter_input(name, inputs, a.dtype), a))
        scaled = hidden * e.to(hidden.dtype)
        if self.watch is not None:
            self.watch.diagonal(self.blora_E[name], hidden, scaled)
        hidden = quantized("E_out", scaled)
        result = add_update(result, hidden, b, self.scaling[name], in_place=quantized.replaces_weight)
        return quantized("out", result).view(*x.shape[:-1], self.out_features)

    def _diagonal(self, name: str) -> Tensor:
        """E (r,); without a gradient by it before gates close by evidence, so that training is LoRA's up to there."""
        diagonal = self.blora_E[name]
        if not (self.training and name in self.blora_evidence and name in self.training_adapters):
            return diagonal
        if name in self.blora_quantizers and self.progress(name).current != Phase.WARM_UP:
            return diagonal
        return diagonal.detach() + 0.0 * diagonal  # zero, not None: distributed training waits for it

    def gated(self, name: str, diagonal: Tensor) -> Tensor:
        r"""$E \circ G$ (r,) for the quantized diagonal E."""
        if name in self.blora_rank:
            diagonal = diagonal * self.rank_gates(name)().to(diagonal.dtype)
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            diagonal = diagonal + self._anchor(name)
        return diagonal

    def is_quantizing(self, name: str) -> bool:
        """True if a tensor may have fewer than 32 bits: after the warm-up, or as far as a given width came before."""
        if name not in self.blora_quantizers:
            return False
        if self.progress(name).current != Phase.WARM_UP:
            return True
        is_given = name in self.blora_evidence and BASE_WEIGHT in (self.configs[name].fixed_bits or {})
        return is_given and self.quantizers(name).is_narrow(BASE_WEIGHT)

    @torch.no_grad()
    def give_weight_its_width(self, name: str, bits: int) -> None:
        """Round the base weight from now on, so that all of training is that of factors beside the rounded weight."""
        if BASE_WEIGHT in self.quantized_kinds(name) and self.progress(name).current == Phase.WARM_UP:
            self.quantizers(name).set_width(BASE_WEIGHT, bits, self.weight_range(name, BASE_WEIGHT, bits))
            self.quantizers(name).chosen()  # a compiled pass finds the widths on the host

    def _quantization(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Unquantized:
        """Decide what happens to each tensor of this pass: nothing, being observed, or being quantized."""
        if name not in self.blora_quantizers:
            return _UNQUANTIZED
        quantizers, progress = self.quantizers(name), self.progress(name)
        if name in self.blora_evidence and progress.current != Phase.FROZEN:
            return self.current_quantization(name)
        if progress.current == Phase.WARM_UP:
            if not self.training:
                return _UNQUANTIZED
            if name in self.training_adapters or self.configs[name].phase_shares[0] > 0:
                return Observing(quantizers, self.configs[name].calibration) if self.collects_ranges else _UNQUANTIZED
            self._calibrate_on(name, x, *args, **kwargs)
        if progress.current != Phase.FROZEN:
            return Quantizing(quantizers, quantizers.sampled() if self.training else quantizers.fixed())
        return self._at_width(quantizers, quantizers.frozen())

    def current_quantization(self, name: str) -> Unquantized:
        """Every tensor at the width that evidence has chosen."""
        if not self.is_quantizing(name):
            return _UNQUANTIZED
        return self._at_width(self.quantizers(name), self.quantizers(name).chosen())

    def _at_width(self, quantizers: Quantizers, widths: Assignment) -> Quantizing:
        weight = self.frozen_weight.of(quantizers, self.weight, widths) if BASE_WEIGHT in quantizers.kinds else None
        return Quantizing(quantizers, widths, weight)

    def weight_range(self, name: str, kind: str, bits: int) -> Tensor:
        """Best range of a weight at `bits` bits: one, or one a channel (channels, 1) or group (channels, groups)."""
        if kind != BASE_WEIGHT:
            return self._best_range(name, kind, bits)
        shape, weight = self.quantizers(name).shape_of(kind), self.weight
        key = (bits, shape, self.configs[name].calibration, version_of(weight), id(weight))
        if key not in self._weight_ranges:
            self._weight_ranges[key] = self._best_range(name, kind, bits)
        return self._weight_ranges[key]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.frozen_weight.cached = None
        self._weight_ranges.clear()
        return super()._apply(fn, recurse)

    def _anchor(self, name: str) -> Tensor | float:
        """Zero that depends on every gate and range: distributed training waits for a gradient of each of them."""
        modules = [group[name] for group in (self.blora_rank, self.blora_quantizers) if name in group]
        return 0.0 * sum(p.sum() for module in modules for p in module.parameters())

    def _calibrate_on(self, name: str, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Calibrate on one batch: what happens without a warm-up and without a training loop attached."""
        self.training_adapters.add(name)
        with torch.no_grad():
            self._adapted_by(name, x, *args, **kwargs)
        self.training_adapters.discard(name)
        self.start_learning(name)

    @torch.no_grad()
    def start_learning(self, name: str) -> None:
        """Let the gates learn; those of the paper start with every range as observed, or from the tensor itself."""
        if name in self.blora_quantizers and name not in self.blora_evidence:
            quantizers = self.quantizers(name)
            for kind, observed in zip(quantizers.kinds, quantizers.observed.tolist(), strict=True):
                if kind in ACTIVATIONS:
                    # A layer that no batch has reached keeps a range wide enough to clip nothing it is likely to see.
                    quantizers.set_range(kind, torch.tensor(observed if observed > 0 else 10.0))
                else:
                    quantizers.set_range(kind, self._best_range(name, kind, calibration_bits(kind)))
        self.progress(name).advance(Phase.LEARN)

    def _best_range(self, name: str, kind: str, bits: int) -> Tensor:
        tensor = gathered(self.weight if kind == BASE_WEIGHT else getattr(self, f"blora_{kind}")[name])
        config = self.configs[name]
        if kind != BASE_WEIGHT and not tensor.any():
            # A factor that is still zero has no scale of its own; it will grow to about that of A's initial values.
            return torch.tensor(1 / math.sqrt(self.in_features))
        shape = self.quantizers(name).shape_of(kind)
        if not shape:
            return optimal_range(tensor, bits, config.calibration)
        rows = tensor.T if kind == BASE_WEIGHT and self.is_transposed else tensor
        groups = rows.reshape(math.prod(shape), rows.shape[1] // shape[1])
        return optimal_range(groups, bits, config.calibration, dim=1).view(shape)

    def _as_deployed(self, name: str, kind: str, tensor: Tensor) -> Tensor:
        tensor = gathered(tensor).float()
        if not self.is_quantizing(name):
            return tensor
        quantizers = self.quantizers(name)
        return quantizers.quantized(kind, tensor, quantizers.fixed())

    @torch.no_grad()
    def factors(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """A (r, d_in), gated E (r,) and B (d_out, r) as evaluation uses them, float32."""
        a = self._as_deployed(name, "A", self.blora_A[name])
        return a, self._gated_diagonal(name), self._as_deployed(name, "B", self.blora_B[name])

    def _gated_diagonal(self, name: str) -> Tensor:
        diagonal = self._as_deployed(name, "E", self.blora_E[name])
        return diagonal * self.rank_gates(name)() if name in self.blora_rank else diagonal

    @torch.no_grad()
    def kept(self, adapter_name: str) -> Tensor:
        return self._gated_diagonal(adapter_name) != 0

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        if self.is_quantizing(adapter_name):
            self.check_merge(adapter_name)
            weight = self._as_deployed(adapter_name, BASE_WEIGHT, weight).to(weight.dtype)
        return super().merged_weight(adapter_name, weight)

    def needs_backup(self, adapter_name: str) -> bool:
        return self.is_quantizing(adapter_name)

    def quantized_activations(self, adapter_name: str) -> dict[str, int]:
        """Widths below 32 bits of the activations, by kind: what no weight can absorb."""
        widths = self.widths(adapter_name)
        return {kind: widths[kind] for kind in ACTIVATIONS if widths.get(kind, 32) < 32}

    def check_merge(self, *adapter_names: str) -> None:
        super().check_merge(*adapter_names)
        self._check_quantized_once(list(dict.fromkeys([*self.merged_adapters, *adapter_names])))
        for name in adapter_names:
            narrow = self.quantized_activations(name)
            if narrow and not self.configs[name].allow_inexact_merge:
                raise BayesLoraError(
                    f"adapter {name!r} quantizes activations ({narrow} bits), which a merged weight cannot hold: "
                    "set allow_inexact_merge=True in its config, or export it instead"
                )

    def widths(self, adapter_name: str) -> dict[str, int]:
        widths = super().widths(adapter_name)
        if self.configs[adapter_name].quantize_input:
            widths["in"] = UNQUANTIZED
        if self.is_quantizing(adapter_name):
            quantizers = self.quantizers(adapter_name)
            widths.update(zip(quantizers.kinds, quantizers.evaluation_widths(), strict=True))
        return widths

    def describe(self, adapter_name: str, name: str) -> LayerDescription:
        described = super().describe(adapter_name, name)
        if adapter_name not in self.blora_evidence or not self.evidence(adapter_name).passes:
            return described
        return replace(described, gates=described_gates(self, adapter_name))

    @torch.no_grad()
    def shrink(self, adapter_name: str) -> int:
        """Cut the ranks that contribute nothing out of every tensor; ranges and scaling stay."""
        keep = self.kept(adapter_name)
        self.cut(self.blora_A, adapter_name, keep)
        self.cut(self.blora_E, adapter_name, keep)
        self.cut(self.blora_B, adapter_name, (slice(None), keep))
        if adapter_name in self.blora_rank:
            self.rank_gates(adapter_name).cut(keep)
        if adapter_name in self.blora_evidence and not keep.all():
            self.evidence(adapter_name).cut(keep)
        if adapter_name in self.blora_quantizers:
            self.quantizers(adapter_name).cut_channels("A", keep)
        if self.progress(adapter_name).current == Phase.LEARN:
            self.progress(adapter_name).advance(Phase.FROZEN)  # what has been cut cannot learn its rank any more
        return int(keep.sum())

    @torch.no_grad()
    def packed_tensors(self, adapter_name: str) -> PackedTensors:
        matrices = {kind: getattr(self, f"blora_{kind}")[adapter_name].detach().float() for kind in MATRICES}
        widths, has_rank_gates = self.widths(adapter_name), adapter_name in self.blora_rank
        if adapter_name not in self.blora_quantizers:
            return PackedTensors(matrices, {kind: widths[kind] for kind in matrices}, {}, {}, has_rank_gates)
        quantizers = self.quantizers(adapter_name)
        bounds = zip(quantizers.kinds, quantizers.ranges(), quantizers.shapes, strict=True)
        ranges = {kind: bound.reshape(shape) for kind, bound, shape in bounds}
        logarithms = {kind: quantizers.log_range(kind) for kind in quantizers.kinds}
        widths = {kind: widths[kind] for kind in quantizers.kinds}
        return PackedTensors(matrices, widths, logarithms, ranges, has_rank_gates)

    def remove_quantizers(self) -> list[str]:
        kinds = [kind for name in self.blora_quantizers for kind in self.quantizers(name).kinds]
        self.blora_quantizers.clear()
        return kinds

    @staticmethod
    def unpacked_state(packed: PackedTensors) -> dict[str, Tensor]:
        state = {f"blora_{kind}": matrix for kind, matrix in packed.matrices.items()}
        if packed.has_rank_gates:
            state["blora_rank.logits"] = torch.full((len(packed.matrices["E"]),), SURE_LOGIT)
        if packed.log_ranges:
            ranges = dict(packed.log_ranges)
            if BASE_WEIGHT in ranges:
                state["blora_quantizers.log_weight_range"] = ranges.pop(BASE_WEIGHT)
            state["blora_quantizers.log_ranges"] = torch.cat(list(ranges.values()))
            state["blora_quantizers.gates"] = torch.tensor([fixed_logits(bits) for bits in packed.widths.values()])
            state["blora_quantizers.observed"] = torch.zeros(len(packed.widths))
        state["blora_progress.phase"] = torch.tensor(int(Phase.FROZEN))
        return state


class Linear(BLoraLayer):
    """The name PEFT's `all-linear` recognises an adapted layer by."""


_UNQUANTIZED = Unquantized()
