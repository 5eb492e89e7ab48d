r"""Linear and embedding layers on integer codes: what a frozen B-LoRA layer computes, without a trained quantizer.

With codes $q$ and steps $s$ fixed, the layer

$$ y = Q_{out}\bigl( Q_w(W_0) x_q + b + c\, Q_b(B)\, Q_E( E \circ Q_A( Q_a(A) x_q ) ) \bigr) $$

has two products with $x_q$, which are one: the rows of $A$ lie below those of $W_0$ in one matrix of codes, and each
row has a scale of its own. Where $x_q$ has at most 8 bits, the product is one of integers and exact. Base weight and
update are not added up: their sum lies on no grid, and the quantizers between the factors have no place in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.export.integer_kernels import (
    FEW_ROWS,
    WEIGHT_MULTIPLE,
    Prepacked,
    dequantized_product,
    has_integer_kernel,
    has_prepacked_kernel,
    has_weight_kernel,
    integer_product,
    scaled_product,
    weight_product,
)
from bayeslora.methods.layer import Float32Module
from bayeslora.quantization import WIDTHS, grid_step

_BYTE = 8
_UNQUANTIZED = WIDTHS[-1]
_GELU_MINIMUM = -0.17
_CACHED = 1 << 17  # numbers, half a megabyte of float32


class StaticQuantizer:
    """An activation's grid of `bits` bits with the range that was learned; 32 bits change nothing."""

    def __init__(self, bits: int, bound: float) -> None:
        self.bits = bits
        self.level = (1 << (bits - 1)) - 1
        # In float32, as in training: codes at rounding ties depend on the step's last digit.
        self.step = float(grid_step(torch.tensor(bound), bits)) if bits < _UNQUANTIZED else 1.0

    def nearest_(self, steps: Tensor) -> Tensor:
        """Replace float32 multiples of the step, not whole ones, by integer codes; with 32 bits nothing changes."""
        return steps if self.bits == _UNQUANTIZED else steps.round_().clamp_(-self.level, self.level)

    def float_codes(self, x: Tensor) -> Tensor:
        """Integer codes, in float32."""
        return self.nearest_(x.float() / self.step)

    def quantize(self, x: Tensor) -> Tensor:
        """The grid's values, in float32: for less than 32 bits."""
        return self.float_codes(x).mul_(self.step)

    def codes(self, x: Tensor) -> Tensor:
        """Integer codes of rows (n, d) as int8: for at most 8 bits."""
        return in_parts(self.float_codes, torch.int8, x)


def in_parts(function: Callable[..., Tensor], dtype: torch.dtype, *rows: Tensor) -> Tensor:
    """`function` of tensors of as many rows, as `dtype`: in parts, so that its passes stay in a processor's cache.

    It must return as many numbers as the first tensor has.
    """
    first = rows[0]
    count = max(1, _CACHED // first.shape[1])
    if len(first) <= count or first.device.type != "cpu":
        return function(*rows).to(dtype)
    result = torch.empty(first.shape, dtype=dtype)
    for into, *parts in zip(result.split(count), *(each.split(count) for each in rows), strict=True):
        into.copy_(function(*parts))
    return result


class IntegerLinear(Float32Module):
    """A linear layer (..., d_in) to (..., d_out) on codes; its activations have static ranges.

    Args:
        weight: codes (d_out, d_in), int8 up to 8 bits and int16 at 16; at 32 bits the float32 weight itself.
        steps: step of the weight's grid, one number or (d_out, 1); 1 at 32 bits.
        bias: (d_out,) or None.
        factors: codes of A (r, d_in), and float32 E (r,) and B (d_out, r); None without an adapter.
        a_steps: step of A's grid, one number or (r, 1).
        scaling: c, the factor of the update.
        activations: quantizers by kind, among `in`, `A_out`, `E_out` and `out`.
        is_learned: whether this is the arithmetic of an adapted layer, which is kept to float rounding wherever `x` is
            float32; any other layer of int8 codes may round its input to bfloat16.

    Tensors stay as they are when the model is cast; the output has the type of the input.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    sum_scales: Tensor
    down: Tensor
    diagonal: Tensor
    up: Tensor

    def __init__(
        self,
        weight: Tensor,
        steps: Tensor,
        bias: Tensor | None = None,
        factors: tuple[Tensor, Tensor, Tensor] | None = None,
        a_steps: Tensor | None = None,
        scaling: float = 1.0,
        activations: Mapping[str, StaticQuantizer] | None = None,
        is_learned: bool = True,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scaling, self.is_learned = scaling, is_learned
        none = StaticQuantizer(_UNQUANTIZED, 1.0)
        activations = activations or {}
        self.input = activations.get("in", none)
        self.after_a, self.after_e = activations.get("A_out", none), activations.get("E_out", none)
        self.output = activations.get("out", none)
        scales = steps.reshape(-1).expand(self.out_features)
        self.rank, self.is_stacked = 0, False
        if factors is not None and len(factors[1]):
            a, diagonal, b = factors
            self.rank, self.is_stacked = len(a), weight.dtype == a.dtype == torch.int8
            # Between the factors values are multiples of a step, so that one product leads from grid to grid.
            a_scales = (a_steps if a_steps is not None else torch.ones(())).reshape(-1) / self.after_a.step
            a_scales = a_scales.expand(self.rank)
            if self.is_stacked:
                weight, scales = torch.cat([weight, a]), torch.cat([scales, a_scales])
            else:
                self.register_buffer("down", a.float() * a_scales[:, None])
            self.register_buffer("diagonal", diagonal * (self.after_a.step / self.after_e.step))
            self.register_buffer("up", b.T.contiguous())
            self.scaling = scaling * self.after_e.step
        if bias is not None:
            bias = torch.cat([bias.float(), torch.zeros(len(scales) - len(bias))])
        self.register_buffer("codes", weight.contiguous())
        self.register_buffer("scales", scales.contiguous().float())
        self.scale = float(steps) if steps.numel() == 1 else None
        self.register_buffer("bias", bias)
        # Of the sums over codes of both operands; the input's step is a factor of every row.
        self.register_buffer("sum_scales", self.scales * self.input.step if self.takes_codes else self.scales)
        self._prepacked: Prepacked | None = None
        self._stream = torch.float32
        self._emitted: StaticQuantizer | None = None

    def can_feed(self, following: IntegerLinear) -> bool:
        """Whether `following` can be given the codes of GELU of this output.

        A kernel's codes go down to -128, the grid's to -127: no value of GELU may lie there.
        """
        is_bare = not self.rank and self.output.bits == _UNQUANTIZED
        grid = following.input
        is_wide = grid.bits == _BYTE and -_GELU_MINIMUM < grid.level * grid.step
        return is_bare and self.takes_codes and following.takes_codes and is_wide

    def feed(self, following: IntegerLinear, dtype: torch.dtype) -> None:
        """From now on return int8 codes of GELU of the output, on the grid of 8 bits that `following` reads.

        `following` takes such codes for its input, and returns `dtype`. This layer has no update and no range of its
        own output (`can_feed`).
        """
        self._emitted, following._stream, self._prepacked = following.input, dtype, None

    @property
    def emits_codes(self) -> bool:
        """Whether the output is codes, for the layer that it feeds."""
        return self._emitted is not None

    def __getstate__(self) -> dict[str, Any]:
        """Without oneDNN's layout of the codes, which can be neither copied nor pickled; it is made again."""
        return {**self.__dict__, "_prepacked": None}

    @property
    def takes_codes(self) -> bool:
        """Whether the product is one of integers."""
        return self.codes.dtype == torch.int8 and self.input.bits <= _BYTE

    @property
    def weight(self) -> Tensor:
        """The base weight (d_out, d_in) as values, float32: for code that looks at it; computing does not need it."""
        return self.codes[: self.out_features].float() * self.scales[: self.out_features, None]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        rows, are_codes = x.reshape(-1, self.in_features), x.dtype == torch.int8
        dtype = self._stream if are_codes else x.dtype
        within = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        if self.takes_codes:
            found, hidden = self._of_codes(rows if are_codes else self.input.codes(rows), within)
        else:
            found, hidden = self._of_values(rows.to(within))
        if self.rank or self.output.bits < _UNQUANTIZED:
            found = self._updated(found, hidden)
        if not self.emits_codes:
            found = found.to(dtype)
        return found.view(*x.shape[:-1], self.out_features)

    def _of_codes(self, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """W_0 x_q + b (n, d_out) in `dtype`, and A x_q (n, r) in steps and float32, from sums over codes.

        In float32 the sums are exact. A layer that feeds another returns that one's codes instead, of any `dtype`.
        """
        if len(codes) > FEW_ROWS and has_prepacked_kernel(codes.device.type):
            if self._prepacked is None:
                gelu_step = None if self._emitted is None else self._emitted.step
                self._prepacked = Prepacked(self.codes, self.input.step, self.scales, self.bias, gelu_step)
            found = self._prepacked.product(codes, dtype)
        else:
            if dtype == torch.bfloat16 and self._suits_weight_kernel(codes):
                sums = weight_product(codes, self.codes)  # rounded to bfloat16, as the result is
            elif has_integer_kernel(codes.device.type):
                sums = integer_product(codes, self.codes)
            else:
                sums = dequantized_product(codes.float(), self.codes)
            found, emitted = self._scaled(sums), self._emitted
            found = found.to(dtype) if emitted is None else emitted.codes(nn.functional.gelu(found))
        if self.rank and not self.is_stacked:
            return found, nn.functional.linear(codes * self.input.step, self.down)
        return self._split(found)

    def _of_values(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same of rows that have no codes."""
        if self.input.bits < _UNQUANTIZED:
            rows = self.input.quantize(rows).to(rows.dtype)
        is_narrow = self.codes.dtype == torch.int8
        may_round = rows.dtype == torch.bfloat16 or not self.is_learned
        if is_narrow and may_round and self._suits_weight_kernel(rows):
            found, hidden = self._split(self._scaled(weight_product(rows, self.codes)).to(rows.dtype))
        elif self.scale is not None and is_narrow:
            weight, below = self.codes.split([self.out_features, len(self.codes) - self.out_features])
            bias = None if self.bias is None else self.bias[: self.out_features]
            found, hidden = scaled_product(rows, weight, self.scale, bias), None
            if self.is_stacked:
                hidden = dequantized_product(rows, below).float() * self.scales[self.out_features :]
        else:
            sums = dequantized_product(rows if is_narrow else rows.float(), self.codes)
            found, hidden = self._split(self._scaled(sums.float()).to(rows.dtype))
        if self.rank and not self.is_stacked:
            hidden = nn.functional.linear(rows.float(), self.down)
        return found, hidden

    def _scaled(self, sums: Tensor) -> Tensor:
        return sums * self.sum_scales if self.bias is None else torch.addcmul(self.bias, sums, self.sum_scales)

    def _split(self, found: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = found[:, self.out_features :].float() if self.is_stacked else None
        return found[:, : self.out_features], hidden

    def _updated(self, found: Tensor, hidden: Tensor | None) -> Tensor:
        """The layer's output: the update added, and its range applied."""
        if hidden is not None:
            low = self.after_e.nearest_(self.after_a.nearest_(hidden) * self.diagonal)
            found = found.addmm_(low.to(found.dtype), self.up.to(found.dtype), alpha=self.scaling)
        if self.output.bits == _UNQUANTIZED:
            return found
        return in_parts(self.output.quantize, found.dtype, found)

    def _suits_weight_kernel(self, x: Tensor) -> bool:
        fits = len(x) <= FEW_ROWS and self.in_features % WEIGHT_MULTIPLE == 0
        return fits and has_weight_kernel(x.device.type)

    def extra_repr(self) -> str:
        inner = f"rank={self.rank}, " if self.rank else ""
        return f"{self.in_features}, {self.out_features}, {inner}codes={self.codes.dtype}, in={self.input.bits} bits"


class IntegerEmbedding(Float32Module):
    """An embedding on int8 codes with a scale a row; its rows come as `dtype`.

    Args:
        codes: (rows, d), int8.
        steps: (rows, 1).
        dtype: of the output.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, steps: Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes.shape
        self.dtype = dtype
        self.register_buffer("codes", codes)
        self.register_buffer("scales", steps.reshape(-1, 1).float())

    @property
    def weight(self) -> Tensor:
        """All rows as values (rows, d), float32."""
        return self.codes.float() * self.scales

    def forward(self, ids: Tensor) -> Tensor:
        return (self.codes[ids].float() * self.scales[ids]).to(self.dtype)

    def tied_linear(self, bias: Tensor | None) -> IntegerLinear:
        """The head that has the embedding's own codes, in the same memory."""
        head = IntegerLinear(self.codes, self.scales, bias, is_learned=False)
        head.codes = self.codes
        return head

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
