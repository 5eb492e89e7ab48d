r"""Linear and embedding layers on integer codes: the arithmetic of a frozen B-LoRA layer with fixed ranges.

With codes $q$ and steps $s$ fixed, the layer

$$ y = Q_{out}\bigl( Q_w(W_0) x_q + b + c\, Q_b(B)\, Q_E( E \circ Q_A( Q_a(A) x_q ) ) \bigr) $$

has two products with $x_q$, computed as one: the rows of $A$ follow those of $W_0$ in one matrix of codes, and each
row has its own scale. If $x_q$ has at most 8 bits, the product uses integers and is exact; for 16 bits the high and
low bytes are two rows of such a product. Base weight and update stay separate, because their sum is not on a grid and
would lose the quantizers between the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.quantization import WIDTHS, Float32Module, grid_step
from bayeslora.runtime.integer_kernels import (
    FEW_ROWS,
    SMALL_BATCH,
    WEIGHT_MULTIPLE,
    ZERO_POINT,
    FewRowsWeight,
    PrepackedWeight,
    dequantized_product,
    fused_product,
    has_few_rows_kernel,
    has_integer_kernel,
    has_prepacked_kernel,
    has_weight_kernel,
    int8_weight_product,
    int16_product,
    integer_product,
    scaled_product,
)

_BYTE = 8
_UNQUANTIZED = WIDTHS[-1]
_GELU_MINIMUM = -0.17
CACHE_BLOCK = 1 << 18
"""Numbers that stay in a processor's cache during several passes: a megabyte of float32."""

Bounds = tuple[Tensor, Tensor] | tuple[float, float]
"""The lowest and the highest code."""


class StaticQuantizer:
    """The grid of an activation with its learned range; a quantizer of 32 bits changes nothing."""

    def __init__(self, bits: int, bound: float) -> None:
        self.bits = bits
        self.level = (1 << (bits - 1)) - 1
        # float32 as in training, because codes at rounding ties depend on the step's last digit.
        self.step = float(grid_step(torch.tensor(bound), bits)) if bits < _UNQUANTIZED else 1.0

    def round_to_codes_(self, steps: Tensor) -> Tensor:
        """Round float32 values in steps of the grid to codes, in place."""
        return steps if self.bits == _UNQUANTIZED else steps.round_().clamp_(-self.level, self.level)

    def fake_quantize_(self, steps: Tensor) -> Tensor:
        """Replace rows (n, d) in steps of the grid by the grid's values, in place and in their type."""
        if self.bits == _UNQUANTIZED:
            return steps
        for part in _cache_blocks(steps):
            values = self.round_to_codes_(part.float()).mul_(self.step)
            if values is not part:
                part.copy_(values)
        return steps

    def codes(self, x: Tensor, zero_point: int = 0) -> Tensor:
        """Return the codes of rows (n, d) for at most 8 bits: int8, or uint8 with a `zero_point` of 128."""
        if x.dtype == torch.float32 and len(_cache_blocks(x)) == 1:
            return as_codes(self.round_to_codes_(x / self.step), zero_point)
        found = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        for into, steps in self._in_steps(x, found):
            into.copy_(steps)
        return as_codes(found, zero_point)

    def quantize(self, x: Tensor) -> Tensor:
        """Return rows (n, d) rounded to the grid, in the type of `x`; for fewer than 32 bits."""
        found = torch.empty_like(x)
        for into, steps in self._in_steps(x, found):
            into.copy_(steps.mul_(self.step))
        return found

    def _in_steps(self, x: Tensor, found: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks of `found` with the float32 codes of their rows of `x`; a float32 block is its own buffer."""
        parts = _cache_blocks(x)
        narrow = found.dtype != torch.float32
        room = torch.empty(len(parts[0]) if narrow else 0, x.shape[1], device=x.device)
        for into, part in zip(found.split(max(1, len(parts[0]))), parts, strict=True):
            steps = room[: len(part)] if narrow else into
            if part.dtype == torch.float32:
                torch.div(part, self.step, out=steps)
            else:
                steps.copy_(part).div_(self.step)
            yield into, self.round_to_codes_(steps)


def as_codes(codes: Tensor, zero_point: int) -> Tensor:
    """Return codes of at most 8 bits as int8, or as uint8 with a `zero_point` of 128, in place if they are int8."""
    found = codes.to(torch.int8)
    # In two's complement c and c + 128 differ only in the highest bit.
    return found.view(torch.uint8).bitwise_xor_(zero_point) if zero_point else found


def _cache_blocks(rows: Tensor) -> tuple[Tensor, ...]:
    """Split rows into blocks that stay in a processor's cache during several passes."""
    if torch.compiler.is_compiling():  # fused into one pass
        return (rows,)
    count = max(1, CACHE_BLOCK // rows.shape[1])
    return (rows,) if rows.shape[0] <= count or rows.device.type != "cpu" else rows.split(count)


def zero_point_for(rows: Tensor) -> int:
    """Return the offset of activation codes: 128 if `PrepackedWeight` will run (many rows, not compiled), else 0."""
    is_many = rows.shape[0] > SMALL_BATCH and not torch.compiler.is_compiling()
    return ZERO_POINT if is_many and has_prepacked_kernel(rows.device.type) else 0


def are_few(rows: Tensor) -> bool:
    """Return whether `FewRowsWeight` computes products of these rows (n, d_in) with codes."""
    return rows.shape[0] <= FEW_ROWS and not torch.compiler.is_compiling() and has_few_rows_kernel(rows.device.type)


class SmallBatch:
    """The arithmetic of a layer in as few calls as possible, for a few rows at a time as in generation.

    With few rows, calls and buffer look-ups take longer than the product, so the buffers are plain attributes here.
    Layers with integer products need a device with `FewRowsWeight` or `integer_product`, and those with 16-bit inputs
    run here for any number of rows; other layers run here only when compiled.

    All values that differ between layers of one shape are tensors, so that these layers share compiled code.
    """

    __slots__ = (
        "bias", "bounds", "codes", "diagonal", "down", "few_rows", "has_gelu", "input_range", "input_step",
        "output_step", "row_sums", "scales", "takes_codes", "up", "widths",
    )  # fmt: skip

    def __init__(self, layer: IntegerLinear) -> None:
        self.codes, self.scales, self.bias = layer.codes, layer.sum_scales, layer.bias
        steps, lowest, highest = layer.grids.unbind()
        # Tensors, because torch divides by a tensor in half the time.
        self.input_step, *_, self.output_step = steps.unbind()
        bounds = zip(layer.quantizers, lowest.unbind(), highest.unbind(), strict=True)
        self.bounds = [None if grid.bits == _UNQUANTIZED else (low, high) for grid, low, high in bounds]
        self.takes_codes, self.row_sums = layer.takes_codes, layer.row_sums
        if not layer.takes_codes:
            self.scales = self.scales * self.input_step
        self.widths = (layer.out_features, layer.rank) if layer.is_stacked else None
        self.down = None if layer.is_stacked or not layer.rank else layer.down * self.input_step
        if layer.rank:
            self.diagonal, self.up = layer.diagonal, layer.up
        # The kernel has the code -128 too, which a fed layer's input does not reach (see `can_feed`).
        self.input_range = None if layer.is_fed else layer.input.level * layer.input.step
        self.has_gelu = layer.emits_codes
        self.few_rows: FewRowsWeight | None = None

    def product(self, rows: Tensor) -> Tensor:
        """Return the layer's output (n, d_out), float32, for rows (n, d_in)."""
        steps = self._steps(rows.float())
        sums = self._sums(steps)
        found = sums * self.scales if self.bias is None else torch.addcmul(self.bias, sums, self.scales)
        return self._finished(found, steps)

    def product_of_few(self, rows: Tensor) -> Tensor:
        """Return the same for rows that `are_few`, of a layer that takes codes."""
        values = rows.float()
        found = self.of_few_rows(values)
        return self._finished(found, None if self.down is None else self._steps(values))

    def _finished(self, found: Tensor, steps: Tensor | None) -> Tensor:
        """Return the output from W_0 x_q + b, perhaps with A x_q beside it, and the input's codes if A has none."""
        _, after_a, after_e, out = self.bounds
        hidden = None
        if self.widths is not None:
            found, hidden = found.split_with_sizes(self.widths, 1)
        elif self.down is not None and steps is not None:
            hidden = nn.functional.linear(steps, self.down)
        if hidden is not None:
            low = rounded(after_e, rounded(after_a, hidden).mul_(self.diagonal))
            # In a compiled graph a loop over r numbers costs less than the call of a library's product.
            if torch.compiler.is_compiling() and len(low) <= SMALL_BATCH:
                found = found + (low[:, :, None] * self.up).sum(1)
            else:
                found = found.addmm_(low, self.up)
        if self.has_gelu:
            return torch.ops.aten.gelu_(found)
        return found if out is None else rounded(out, found).mul_(self.output_step)

    def of_few_rows(self, values: Tensor) -> Tensor:
        """Return W_0 x_q + b and, if A has codes too, A x_q beside it: (n, d_out + r), in steps of their grids."""
        if self.few_rows is None:
            step = float(self.input_step)
            self.few_rows = FewRowsWeight(self.codes, self.scales / step, self.bias, step)
        if self.input_range is not None:
            values = values.clamp(-self.input_range, self.input_range)
        return self.few_rows.product(values)

    def _steps(self, values: Tensor) -> Tensor:
        """Return the input's codes, as float32 numbers; its values in steps if it has no grid."""
        return rounded(self.bounds[0], values.div(self.input_step))

    def _sums(self, steps: Tensor) -> Tensor:
        """Return the product of the input, in steps of its grid, and the weight's codes or values."""
        if self.codes.is_floating_point():
            return nn.functional.linear(steps, self.codes)
        if not (torch.compiler.is_compiling() and len(steps) == 1):
            if self.takes_codes:
                return integer_product(steps.to(torch.int8), self.codes)
            if self.row_sums is not None:
                return int16_product(steps, self.codes, self.row_sums)
        return fused_product(steps, self.codes)  # one loop in the graph, which reads the codes once


def rounded(bounds: Bounds | None, steps: Tensor) -> Tensor:
    """Round values in steps of a grid to its codes, in place; without bounds, return them unchanged."""
    return steps if bounds is None else steps.round_().clamp_(*bounds)


class IntegerLinear(Float32Module):
    """A linear layer (..., d_in) to (..., d_out) on codes, with static ranges for its activations.

    Args:
        weight: codes (d_out, d_in), int8; for more than 8 bits, the values in float32.
        steps: step of the weight's grid, one number or (d_out, 1); 1 for values.
        bias: (d_out,) or None.
        factors: codes of A (r, d_in), and float32 E (r,) and B (d_out, r); None without an adapter.
        a_steps: step of A's grid, one number or (r, 1).
        scaling: factor c of the update.
        activations: quantizers by kind, among `in`, `A_out`, `E_out` and `out`.
        is_learned: True (default) for an adapted layer, which is exact to float rounding if `x` is float32; any other
            layer of int8 codes may round its input to bfloat16.

    Tensors keep their types when the model is cast; the output has the type of the input.

    Attributes:
        takes_codes: whether the product uses int8 codes of weight and input.
        takes_int16: whether the product uses the high and low bytes of 16-bit input codes.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    sum_scales: Tensor
    row_sums: Tensor | None
    grids: Tensor
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
        self.is_learned = is_learned
        none = StaticQuantizer(_UNQUANTIZED, 1.0)
        activations = activations or {}
        self.input = activations.get("in", none)
        self.after_a, self.after_e = activations.get("A_out", none), activations.get("E_out", none)
        self.output = activations.get("out", none)
        # Products return values in steps of the next grid, the output's or that of A's output.
        step = self.output.step
        scales = steps.reshape(-1).expand(self.out_features)
        if weight.dtype == torch.float32:
            weight, scales = weight / step, scales * step
        sum_scales = scales / step
        grids = [(grid.step, -grid.level, grid.level) for grid in self.quantizers]
        self.register_buffer("grids", torch.tensor(grids).T.contiguous())
        self.rank, self.is_stacked = 0, False
        if factors is not None and len(factors[1]):
            a, diagonal, b = factors
            self.rank, self.is_stacked = len(a), weight.dtype == a.dtype == torch.int8
            a_scales = (a_steps if a_steps is not None else torch.ones(())).reshape(-1) / self.after_a.step
            a_scales = a_scales.expand(self.rank)
            if self.is_stacked:
                weight, sum_scales = torch.cat([weight, a]), torch.cat([sum_scales, a_scales])
            else:
                self.register_buffer("down", a.float() * a_scales[:, None])
            self.register_buffer("diagonal", diagonal * (self.after_a.step / self.after_e.step))
            self.register_buffer("up", b.T.contiguous() * (scaling * self.after_e.step / step))
        if bias is not None:
            bias = torch.cat([bias.float() / step, torch.zeros(len(sum_scales) - len(bias))])
        self.register_buffer("codes", weight.contiguous())
        self.takes_codes = weight.dtype == torch.int8 and self.input.bits <= _BYTE
        self.takes_int16 = weight.dtype == torch.int8 and self.input.bits == 16
        self.register_buffer("row_sums", self.codes.sum(1).float() if self.takes_int16 else None)
        self.register_buffer("scales", scales.contiguous().float())
        self.scale = float(steps) / step if steps.numel() == 1 else None
        self.register_buffer("bias", bias)
        # Sums of code times code still need the input's step.
        self.register_buffer("sum_scales", sum_scales.float() * (self.input.step if self.takes_codes else 1.0))
        self._prepacked_weight: PrepackedWeight | None = None
        self._small_batch: SmallBatch | None = None
        self._stream: torch.dtype | None = None
        self._emitted: StaticQuantizer | None = None

    def can_feed(self, following: IntegerLinear) -> bool:
        """Return whether `following` can read the codes of GELU of this output.

        The kernel's lowest code is -128 and the grid's is -127, so GELU must not reach -128.
        """
        is_bare = not self.rank and self.output.bits == _UNQUANTIZED
        grid = following.input
        is_wide = grid.bits == _BYTE and -_GELU_MINIMUM < grid.level * grid.step
        return is_bare and self.takes_codes and following.takes_codes and is_wide

    def feed(self, following: IntegerLinear, dtype: torch.dtype) -> None:
        """Let the layer return GELU of its output, for many rows as 8-bit codes on the grid that `following` reads.

        `following` then takes either and returns `dtype`. Call this only if `can_feed` returns True.
        """
        self._emitted, following._stream = following.input, dtype
        self._prepacked_weight = self._small_batch = None

    @property
    def quantizers(self) -> tuple[StaticQuantizer, StaticQuantizer, StaticQuantizer, StaticQuantizer]:
        """The quantizers of the input, of A's and E's output, and of the layer's output."""
        return self.input, self.after_a, self.after_e, self.output

    @property
    def emits_codes(self) -> bool:
        """True if the output is codes for the next layer."""
        return self._emitted is not None

    @property
    def is_fed(self) -> bool:
        """True if the input is what another layer emits."""
        return self._stream is not None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without caches: oneDNN's memory layout cannot be copied or pickled."""
        return {**self.__dict__, "_prepacked_weight": None, "_small_batch": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerLinear:
        self._prepacked_weight = self._small_batch = None  # the caches have tensors on the old device
        super()._apply(fn, recurse)
        return self

    @property
    def weight(self) -> Tensor:
        """The base weight (d_out, d_in) as float32 values, for code that inspects it; `forward` does not use it."""
        return self.codes[: self.out_features].float() * self.scales[:, None]

    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        if torch.is_grad_enabled():  # asked, because entering the context takes as long as a call of the arithmetic
            with torch.no_grad():
                found = self._of_rows(rows)
        else:
            found = self._of_rows(rows)
        return found if x.dim() == 2 else found.view(*x.shape[:-1], self.out_features)

    def _of_rows(self, rows: Tensor) -> Tensor:
        dtype = self._stream or rows.dtype
        if self.takes_codes and rows.dtype.is_floating_point and are_few(rows):
            found = self._small_batch_forward().product_of_few(rows)
        elif self._suits_small_batch(rows):
            found = self._small_batch_forward().product(rows)
        else:
            within = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
            if self.takes_codes:
                codes = self.input.codes(rows, zero_point_for(rows)) if rows.dtype.is_floating_point else rows
                # bfloat16 resolves large codes only to half a step, which could change a code.
                exact = self.output.bits < _UNQUANTIZED
                found = self._finished(*self._of_codes(codes, torch.float32 if exact else within))
            else:
                found = self._finished(*self._of_values(rows.to(within)))
        return found if found.dtype == dtype or self.emits_codes else found.to(dtype)

    def sums_of_codes(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return W_0 x_q + b and, if A has codes too, A x_q beside it: (n, d_out + r) in `dtype`.

        Values are in steps of their grids. Codes are int8, or uint8 with `ZERO_POINT` added (see `zero_point_for`).
        Sums are exact in float32. A layer that feeds another returns codes for it instead, for any `dtype`.
        """
        if zero_point_for(codes):
            if self._prepacked_weight is None:
                gelu_step = None if self._emitted is None else self._emitted.step
                self._prepacked_weight = PrepackedWeight(self.codes, self.sum_scales, self.bias, gelu_step)
            return self._prepacked_weight.product(codes, dtype)
        if has_integer_kernel(codes.device.type):
            sums = integer_product(codes, self.codes)
        else:
            sums = dequantized_product(codes.float(), self.codes)
        found, emitted = self._scaled(sums), self._emitted
        return found.to(dtype) if emitted is None else emitted.codes(nn.functional.gelu(found))

    def few_rows_sums(self, rows: Tensor) -> Tensor:
        """Return the same for float32 values that `are_few`."""
        return self._small_batch_forward().of_few_rows(rows)

    def _of_codes(self, codes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return W_0 x_q + b (n, d_out) in `dtype` and A x_q (n, r) in float32; codes as in `sums_of_codes`."""
        found = self.sums_of_codes(codes, dtype)
        if self.rank and not self.is_stacked:
            return found, nn.functional.linear((codes.float() - zero_point_for(codes)) * self.input.step, self.down)
        return self._split(found)

    def _of_values(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the same as `_of_codes` for rows of values."""
        if self.input.bits < _UNQUANTIZED:
            rows = self.input.quantize(rows)
        may_round = rows.dtype == torch.bfloat16 or not self.is_learned
        if self.codes.dtype == torch.float32:
            found, hidden = nn.functional.linear(rows.float(), self.codes, self.bias).to(rows.dtype), None
        elif may_round and self._suits_weight_kernel(rows):
            found, hidden = self._split(self._scaled(int8_weight_product(rows, self.codes)).to(rows.dtype))
        elif self.scale is not None:
            weight, below = self.codes.split([self.out_features, len(self.codes) - self.out_features])
            bias = None if self.bias is None else self.bias[: self.out_features]
            found, hidden = scaled_product(rows, weight, self.scale, bias), None
            if self.is_stacked:
                hidden = dequantized_product(rows, below).float() * self.sum_scales[self.out_features :]
        else:
            found, hidden = self._split(self._scaled(dequantized_product(rows, self.codes).float()).to(rows.dtype))
        if self.rank and not self.is_stacked:
            hidden = nn.functional.linear(rows.float(), self.down)
        return found, hidden

    def _scaled(self, sums: Tensor) -> Tensor:
        return sums * self.sum_scales if self.bias is None else torch.addcmul(self.bias, sums, self.sum_scales)

    def _split(self, found: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.is_stacked:
            return found, None
        found, hidden = found.split_with_sizes((self.out_features, self.rank), 1)
        return found, hidden.float()

    def _finished(self, found: Tensor, hidden: Tensor | None) -> Tensor:
        """Return the layer's output from values in steps: add the update and apply the output's range."""
        if hidden is not None:
            low = self.after_e.round_to_codes_(self.after_a.round_to_codes_(hidden) * self.diagonal)
            found = found.addmm_(low.to(found.dtype), self.up.to(found.dtype))
        return self.output.fake_quantize_(found)

    def _small_batch_forward(self) -> SmallBatch:
        if torch.compiler.is_compiling():  # look-ups are free in a graph, and a cached object would need guards
            return SmallBatch(self)
        if self._small_batch is None:
            self._small_batch = SmallBatch(self)
        return self._small_batch

    def _suits_small_batch(self, rows: Tensor) -> bool:
        if self.emits_codes or not rows.dtype.is_floating_point:
            return False
        is_compiled, are_integers = torch.compiler.is_compiling(), self.takes_codes or self.takes_int16
        if is_compiled and len(rows) <= (1 if are_integers else SMALL_BATCH):
            return True
        if not are_integers or (self.takes_codes and len(rows) > SMALL_BATCH and not is_compiled):
            return False
        return self._small_batch is not None or has_integer_kernel(rows.device.type)

    def _suits_weight_kernel(self, x: Tensor) -> bool:
        fits = len(x) <= SMALL_BATCH and self.in_features % WEIGHT_MULTIPLE == 0
        return fits and has_weight_kernel(x.device.type)

    def extra_repr(self) -> str:
        inner = f"rank={self.rank}, " if self.rank else ""
        return f"{self.in_features}, {self.out_features}, {inner}codes={self.codes.dtype}, in={self.input.bits} bits"


class IntegerEmbedding(Float32Module):
    """An embedding on int8 codes with one scale per row.

    Args:
        codes: (rows, d), int8.
        steps: (rows, 1).
        dtype: type of the output.
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
        """All rows as float32 values (rows, d)."""
        return self.codes.float() * self.scales

    def forward(self, ids: Tensor) -> Tensor:
        values = nn.functional.embedding(ids, self.codes).float().mul_(nn.functional.embedding(ids, self.scales))
        return values.to(self.dtype)

    def tied_linear(self, bias: Tensor | None) -> IntegerLinear:
        """Return a head that shares the embedding's codes in memory."""
        head = IntegerLinear(self.codes, self.scales, bias, is_learned=False)
        head.codes = self.codes
        return head

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
