r"""Rounding after training: a finished adapter, merged, with narrow weights and activations and no further training.

A chosen linear layer computes

$$ y = Q_{out}(Q_w(W)\, Q_{in}(x) + b) $$

with the grids of B-LoRA: symmetric, $2^b - 1$ levels at b bits. W has one range for each output channel, an activation
one static range. Every range is the one with the least squared error (`optimal_range`), an activation's over all
calibration rows. Codes of W are the nearest, or those that change the layer's output least on these rows
(`quantization/gptq.py`). Quantization is simulated in floating point.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeslora.cost.structure import ModelStructure, base_model, read_structure
from bayeslora.errors import BayesLoraError
from bayeslora.export.calibration import Activation, watch_layers
from bayeslora.export.formats import upright
from bayeslora.methods import LayerDescription, describe
from bayeslora.quantization import (
    FLOOR,
    gptq_codes,
    grid_step,
    magnitude_counts,
    optimal_range,
    quantize,
    range_of_counts,
)
from bayeslora.vocabulary import UNQUANTIZED

RoundingScope = Literal["adapted", "attention", "encoder"]
Rounding = Literal["nearest", "gptq"]
_NAMES = {"weight": "weight_bits", "in": "input_bits", "out": "output_bits"}
_FLOAT32_BYTES, _BYTE = 4, 8


@dataclass(frozen=True)
class RoundedModel:
    """A rounded model, with the ranks and widths that its cost depends on.

    ```python
    rounded = bayeslora.round_after_training(model, batches, weight_bits=4, input_bits=8, scope="attention")
    bayeslora.cost.relative_bops(rounded.model, layers=rounded.layers)
    ```

    Attributes:
        model: the rounded model, in evaluation mode, without an adapter.
        layers: descriptions of the rounded layers: rank 0, and bits for `weight`, `in` and `out`.
    """

    model: nn.Module
    layers: list[LayerDescription]

    @property
    def layer_bytes(self) -> int:
        """Bytes of the rounded layers: codes at their widths, ranges and biases in float32."""
        return sum(module.stored_bytes for module in self.model.modules() if isinstance(module, RoundedLinear))

    @property
    def model_bytes(self) -> int:
        """Bytes of the whole model: those of the rounded layers, and four for each other parameter."""
        inside = [m for m in self.model.modules() if isinstance(m, RoundedLinear)]
        own = {id(parameter) for module in inside for parameter in module.parameters()}
        return self.layer_bytes + _FLOAT32_BYTES * sum(p.numel() for p in self.model.parameters() if id(p) not in own)


class RoundedLinear(nn.Module):
    """Linear layer with a rounded weight (d_out, d_in) and rounded activations; 32 bits round nothing.

    Args:
        layer: a linear layer, or GPT-2's `Conv1D`.
        bits: widths of `weight`, `in` and `out`.
        input_range, output_range: positive, one element; None at 32 bits.
        moments: of the inputs (d_in, d_in), to choose codes of the weight by; None for the nearest.
    """

    input_range: Tensor | None
    output_range: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        bits: Mapping[str, int],
        input_range: Tensor | None,
        output_range: Tensor | None,
        moments: Tensor | None = None,
    ) -> None:
        super().__init__()
        weight = upright(layer).contiguous()
        if bits["weight"] < UNQUANTIZED:
            width = bits["weight"]
            bound = optimal_range(weight, width, dim=1)
            if moments is None:
                weight = quantize(weight, bound, width)
            else:
                codes = gptq_codes(weight, bound, width, moments.to(weight.device))
                weight = (codes * grid_step(bound, width)).to(weight.dtype)
        self.out_features, self.in_features = weight.shape
        self.bits = dict(bits)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = cast("Tensor | None", getattr(layer, "bias", None))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("input_range", input_range)
        self.register_buffer("output_range", output_range)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the codes at their width, and of ranges and biases in float32."""
        ranges = sum(each is not None for each in (self.input_range, self.output_range))
        ranges += self.out_features if self.bits["weight"] < UNQUANTIZED else 0
        biases = 0 if self.bias is None else self.bias.numel()
        return -(-self.weight.numel() * self.bits["weight"] // 8) + _FLOAT32_BYTES * (ranges + biases)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_range is not None:
            x = quantize(x, self.input_range, self.bits["in"])
        y = F.linear(x, self.weight, self.bias)
        return y if self.output_range is None else quantize(y, self.output_range, self.bits["out"])

    def extra_repr(self) -> str:
        widths = ", ".join(f"{kind}={bits}" for kind, bits in self.bits.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, {widths}"


class ActivationCounts:
    """Histograms of the activation magnitudes of linear layers over calibration rows.

    Pass them to `round_after_training` in place of the batches, to count once for several widths and scopes. One pass
    over the batches finds the maxima, and a second one counts magnitudes in bins up to them.

    Args:
        model: the model to round, as for `round_after_training`.
        batches: calibration rows, as for `round_after_training`.
        moments: also gather second moments of the inputs, d_in^2 numbers per layer, for `rounding="gptq"`.

    Raises:
        BayesLoraError: an activation is not finite.
    """

    def __init__(
        self, model: nn.Module, batches: Mapping[str, Any] | Iterable[Mapping[str, Any]], *, moments: bool = False
    ) -> None:
        given = [batches] if isinstance(batches, Mapping) else list(batches)
        merged = _merged(model) if isinstance(model, PeftModel) else model
        structure, root = read_structure(merged), base_model(merged)
        modules = {path: root.get_submodule(path) for path in structure.matrices}
        linear = {path for path, module in modules.items() if type(module) in (nn.Linear, Conv1D)}
        wanted: set[Activation] = {(path, "in") for path in linear}
        wanted |= {(path, "out") for path in structure.projections if path in linear}
        self._largest: dict[Activation, Tensor] = {}
        self._counts: dict[Activation, Tensor] = {}
        self._moments: dict[str, Tensor] | None = {} if moments else None
        watch_layers(merged, modules, wanted, given, self._see_largest)
        for (path, kind), value in self._largest.items():
            if not torch.isfinite(value):
                raise BayesLoraError(
                    f"an {kind}put of {path} is not finite, but must be: check the model and the batches"
                )
        watch_layers(merged, modules, wanted, given, self._see_counts)

    def range(self, path: str, kind: Literal["in", "out"], bits: int) -> Tensor:
        """Return the range (0-d) of a layer's input or output with the least squared error at `bits`.

        Raises:
            BayesLoraError: the forward passes over the batches did not use the layer.
        """
        if (path, kind) not in self._counts:
            raise BayesLoraError(
                f"the calibration batches do not reach {path}, but its {kind}put needs a range: give other batches, "
                "or choose another scope"
            )
        return range_of_counts(self._counts[path, kind], self._largest[path, kind], bits)

    def moments(self, path: str) -> Tensor:
        """Return the sum of $x x^T$ over the inputs of a layer (d_in, d_in).

        Raises:
            BayesLoraError: moments were not gathered.
        """
        if self._moments is None:
            raise BayesLoraError("rounding is 'gptq', but the activations were counted without moments: add them")
        self.range(path, "in", UNQUANTIZED)  # which the batches have reached
        return self._moments[path]

    def _see_largest(self, key: Activation, x: Tensor) -> None:
        found = x.abs().max().float().clamp_min(FLOOR)
        self._largest[key] = torch.maximum(self._largest.get(key, found), found)

    def _see_counts(self, key: Activation, x: Tensor) -> None:
        self._counts[key] = self._counts.get(key, 0) + magnitude_counts(x, self._largest[key]).double()
        path, kind = key
        if self._moments is not None and kind == "in":
            rows = x.reshape(-1, x.shape[-1]).float()
            self._moments[path] = self._moments.get(path, 0) + rows.T @ rows


def round_after_training(
    model: nn.Module,
    batches: Mapping[str, Any] | Iterable[Mapping[str, Any]] | ActivationCounts,
    weight_bits: int = 8,
    input_bits: int = 8,
    output_bits: int | None = None,
    *,
    scope: RoundingScope = "adapted",
    rounding: Rounding = "nearest",
) -> RoundedModel:
    """Merge the adapter into a copy of `model`, and round linear layers without training.

    Args:
        model: a PEFT model with one active adapter that can be merged, such as LoRA, or a model without adapters. It
            stays unchanged.
        batches: a batch or batches of inputs to calibrate the activation ranges, such as 128 training rows. Padding is
            left out if there is an `attention_mask`; labels are ignored. `ActivationCounts` of the same model replace
            the passes over the batches.
        weight_bits, input_bits: widths from 2 to 16, or 32 for no rounding.
        output_bits: width of the outputs of query, key and value projections, which attention multiplies with each
            other; by default they are not rounded. All other outputs are rounded only as inputs of the next layer.
        scope: layers to round: those with an adapter (`"adapted"`), the query, key and value projections
            (`"attention"`), or all linear layers of the transformer blocks (`"encoder"`). The head is never rounded.
        rounding: `"nearest"` rounds each weight to the nearest code; `"gptq"` chooses the codes that change a layer's
            output least on the batches, for weights of at most 8 bits.

    Raises:
        BayesLoraError: the width, scope or rounding is unknown, the scope has no layers, a layer is not linear or has
            a quantized base weight, or the batches do not use a layer or make its activations infinite.
    """
    bits = {"weight": weight_bits, "in": input_bits, "out": UNQUANTIZED if output_bits is None else output_bits}
    for kind, width in bits.items():
        if isinstance(width, bool) or not isinstance(width, int) or not (2 <= width <= 16 or width == UNQUANTIZED):
            raise BayesLoraError(f"{_NAMES[kind]} is {width!r}, but must be from 2 to 16, or 32: give such a width")
    if rounding not in get_args(Rounding):
        raise BayesLoraError(f"rounding is {rounding!r}, but must be 'nearest' or 'gptq': choose one")
    chosen = _chosen(model, scope)
    merged = _merged(model)
    structure = read_structure(merged)
    modules = {path: base_model(merged).get_submodule(path) for path in chosen}
    _check(structure, modules)
    widths = {path: {**bits, "out": bits["out"] if path in structure.projections else 32} for path in chosen}
    if bits["out"] < UNQUANTIZED and not set(chosen) & set(structure.projections):
        raise BayesLoraError(
            f"output_bits is {output_bits}, but scope {scope!r} has no query, key or value projection: leave it out"
        )
    by_output = rounding == "gptq" and weight_bits <= _BYTE
    seen = batches if isinstance(batches, ActivationCounts) else ActivationCounts(merged, batches, moments=by_output)
    rounded = {id(module): _rounded(path, module, widths[path], seen, by_output) for path, module in modules.items()}
    for parent in list(merged.modules()):
        for name, child in parent._modules.items():
            if id(child) in rounded:
                parent._modules[name] = rounded[id(child)]
    matrices = structure.matrices
    layers = [
        LayerDescription(path, matrices[path].in_features, matrices[path].out_features, 0, 0, 0, widths[path])
        for path in chosen
    ]
    return RoundedModel(merged.eval(), layers)


def _rounded(
    path: str, module: nn.Module, bits: Mapping[str, int], seen: ActivationCounts, by_output: bool
) -> RoundedLinear:
    input_range = seen.range(path, "in", bits["in"]) if bits["in"] < UNQUANTIZED else None
    output_range = seen.range(path, "out", bits["out"]) if bits["out"] < UNQUANTIZED else None
    return RoundedLinear(module, bits, input_range, output_range, seen.moments(path) if by_output else None)


def _chosen(model: nn.Module, scope: RoundingScope) -> list[str]:
    """Return the paths of the layers of a scope, in the order of the model."""
    if scope not in get_args(RoundingScope):
        raise BayesLoraError(
            f"scope is {scope!r}, but must be one of {', '.join(map(repr, get_args(RoundingScope)))}: choose one"
        )
    structure = read_structure(model)
    if scope == "adapted":
        found = [layer.name for layer in describe(model)]
    elif scope == "attention":
        found = list(dict.fromkeys(structure.projections))
    else:
        found = [name for name in structure.matrices if structure.region(name) != "model"]
    if not found:
        raise BayesLoraError(
            f"scope is {scope!r}, but {type(base_model(model)).__name__} has no such layers: choose another scope"
        )
    return found


def _merged(model: nn.Module) -> nn.Module:
    copied: Any = copy.deepcopy(model)
    return cast(nn.Module, copied.merge_and_unload(safe_merge=True)) if isinstance(copied, PeftModel) else copied


def _check(structure: ModelStructure, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        matrix = structure.matrices.get(path)
        if matrix is None or matrix.bits != UNQUANTIZED or type(module) not in (nn.Linear, Conv1D):
            stored = f" of {matrix.bits} bits" if matrix is not None and matrix.bits != UNQUANTIZED else ""
            raise BayesLoraError(
                f"{path} is a {type(module).__name__}{stored}, but must be a linear layer in floating point: "
                "load the base in float32, or choose another scope"
            )
