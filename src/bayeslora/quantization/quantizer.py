r"""The Bayesian-bits quantizer: hard-concrete gates, nested grids, and their mixture.

A symmetric range $\beta > 0$ carries the grids $s_b = 2\beta / (2^b - 1)$ for $b \in \{2, 4, 8, 16, 32\}$ with codes
$\mathrm{clamp}(\mathrm{round}(x / s_b), \pm(2^{b-1} - 1))$: $2^b - 1$ levels with zero among them, so signed two bits
are ternary. The gated sum of Equations 5 and 6 of the Bayesian-LoRA paper,

$$ x_q = x_2 + z_4(\epsilon_4 + z_8(\epsilon_8 + z_{16}(\epsilon_{16} + z_{32}\epsilon_{32}))), $$

is computed with $\epsilon_{2b} = Q_{2b}(x) - Q_b(x)$ as the mixture $\sum_b w_b Q_b(x)$, $w_2 = 1 - z_4$,
$w_4 = z_4(1 - z_8)$ and so on. That departs from Algorithm 2's running residual (line 12) at rounding ties only, has
the same straight-through gradients, and makes training, evaluation and export agree to the last bit. Thirty-two bits
are the clipped identity, because float32 cannot resolve a 32-bit grid. All arithmetic is float32 whatever comes in.

A bit gate is a Bernoulli variable relaxed to the hard-concrete distribution (Louizos et al., 2018), as Bayesian Bits
(van Baalen et al., 2020) uses it: with $u \sim U(0, 1)$ and a logit $\phi$,

$$ z = \mathrm{clamp}((\zeta_1 - \zeta_2)\,\sigma((\log u - \log(1 - u) + \phi) / \tau) + \zeta_2, 0, 1). $$

Algorithm 2 prints the divisor as `b` (line 6) and as $\beta$ (line 9); both stand for the temperature $\tau$. Equation
9's $\sigma(\phi)$ stands for $P(z > 0) = \sigma(\phi - \tau \log(-\zeta_2 / \zeta_1))$.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bayeslora.quantization import kernels
from bayeslora.vocabulary import UNQUANTIZED, WIDTHS

TEMPERATURE = 2 / 3
STRETCH = (-0.1, 1.1)
CLOSED_THRESHOLD = 0.34

_SHIFT = TEMPERATURE * math.log(-STRETCH[0] / STRETCH[1])

OPEN_LOGIT = _SHIFT + math.log((1 - CLOSED_THRESHOLD) / CLOSED_THRESHOLD)
"""A gate is open in evaluation if and only if its logit exceeds this (about -0.9353)."""

SURE_LOGIT = 20.0
"""Logit of a gate that always stays open (or, negated, closed): the noise drawn in training is at most 14 in size."""

GATED_WIDTHS = WIDTHS[1:]
"""Widths that have a gate; the two-bit grid is always on."""

_WORTHWHILE = 1 << 18
"""Entries of an input from which on `linear` takes its outer products in bfloat16."""

_WHOLE = torch.ones(())
"""Weight of a single width."""


def hard_concrete(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw relaxed gates `z` in [0, 1] for `logits` of any shape, given `uniform` noise in (0, 1) of the same shape.

    The gates are differentiable in `logits`; the gradient is exactly zero where `z` is clamped to 0 or 1.
    """
    low, high = STRETCH
    noise = uniform.log() - (-uniform).log1p()
    return (torch.sigmoid((noise + logits) / TEMPERATURE) * (high - low) + low).clamp(0, 1)


def open_probability(logits: Tensor) -> Tensor:
    r"""$P(z > 0) = \sigma(\phi - \tau \log(-\zeta_2 / \zeta_1)) = \sigma(\phi + 1.5986)$, of the shape of `logits`."""
    return torch.sigmoid(logits - _SHIFT)


def opened(logits: Sequence[float]) -> int:
    """Return the number of open gates in evaluation and deployment, from the narrowest up to the first closed one.

    A gate is open if and only if $P(z = 0)$ is below 0.34, that is, if its logit exceeds `OPEN_LOGIT`.
    """
    closed = (position for position, logit in enumerate(logits) if not logit > OPEN_LOGIT)
    return next(closed, len(logits))


def evaluation_width(logits: Sequence[float]) -> int:
    """Return the bits of a tensor in evaluation, from the logits of its gates for 4, 8, 16 and 32 bits."""
    return WIDTHS[opened(logits)]


def fixed_logits(bits: int) -> list[float]:
    """Return gate logits that fix the width at `bits`: noise cannot change it, and the penalty has no gradient."""
    return [SURE_LOGIT if width <= bits else -SURE_LOGIT for width in GATED_WIDTHS]


def nested_probability(logits: Tensor) -> Tensor:
    r"""$\prod_{j \le b} P(z_j > 0)$ for `logits` of shape (..., widths), the factors of the penalty in Equation 15."""
    return open_probability(logits).cumprod(-1)


def rank_gates(logits: Tensor) -> Tensor:
    r"""$G_1 = 1$, $G_i = \mathrm{round}(\prod_{j=2}^{i} \sigma(\xi_j))$ for `logits` $\xi$ (r,): Algorithm 1, line 2.

    The rounding passes gradients straight through. The result never increases along the rank, so pruning takes from
    the tail. `logits[0]` has no effect (the paper's $\xi_1$ does not exist: every module starts at rank one), and
    Equation 11's further cumulative product of the rounded gates is left out because it would change nothing.
    """
    open_ = torch.sigmoid(logits[1:]).cumprod(0)
    gates = open_ + (torch.round(open_) - open_).detach()
    return torch.cat([torch.ones_like(logits[:1]), gates])


def rank_probability(logits: Tensor) -> Tensor:
    r"""$\prod_{j=2}^{i} \sigma(\xi_j)$ for `logits` (..., r), with 1 in the first place: the rank penalty's terms."""
    open_ = torch.sigmoid(logits[..., 1:]).cumprod(-1)
    return torch.cat([torch.ones_like(logits[..., :1]), open_], dim=-1)


def grid_step(range: Tensor, bits: int) -> Tensor:  # noqa: A002 - the field's name
    r"""Step $s_b = 2\beta / (2^b - 1)$ of the grid with `bits` bits, of the shape of `range`."""
    return range / ((1 << (bits - 1)) - 0.5)


def codes(x: Tensor, range: Tensor, bits: int) -> Tensor:  # noqa: A002
    """Return the integer codes (int32, in the shape of `x`) of `x`; `codes * grid_step` is the quantized value.

    Args:
        x: tensor of any shape.
        range: range of the grid, as for `quantize`.
        bits: width of the codes, from 2 to 16.
    """
    level, bound = (1 << (bits - 1)) - 1, repeated(range.float(), x)
    return torch.round(x.float() / grid_step(bound, bits)).clamp(-level, level).to(torch.int32)


def repeated(range: Tensor, x: Tensor) -> Tensor:  # noqa: A002
    """Return the ranges of groups, (rows, groups) or transposed, repeated for each entry of a group of the matrix."""
    if range.ndim == 2 and x.ndim == 2:
        for dim in (0, 1):
            if 1 < range.shape[dim] < x.shape[dim]:
                range = range.repeat_interleave(x.shape[dim] // range.shape[dim], dim)  # noqa: A001
    return range


def mixture_weights(gates: Tensor) -> Tensor:
    r"""Weights $w_b$ (..., 5) of the mixture for gates $z_4, z_8, z_{16}, z_{32}$ (..., 4); they sum to one."""
    reached = torch.cat([torch.ones_like(gates[..., :1]), gates.cumprod(-1)], dim=-1)
    return reached - torch.cat([reached[..., 1:], torch.zeros_like(gates[..., :1])], dim=-1)


def active_widths(gates: Sequence[float]) -> tuple[int, ...]:
    """Return the widths with non-zero weight, given the four gate values as Python numbers.

    The other widths contribute nothing to the output, nor to the gradient of a gate strictly between 0 and 1; a gate
    at 0 or 1 is clamped and has no gradient. Leaving them out is therefore exact.
    """
    active, reached = [], 1.0
    for width, gate in zip(WIDTHS, (*gates, 0.0), strict=True):
        if reached * (1.0 - gate) > 0.0:
            active.append(width)
        reached *= gate
    return tuple(active)


def quantize(x: Tensor, range: Tensor, bits: int) -> Tensor:  # noqa: A002
    r"""Round `x` to the grid of one width: $Q_b(x)$, straight-through in `x`, with the learned-range gradient.

    Args:
        x: tensor of any shape and floating dtype; the result has the same.
        range: positive range: 0-d, one element, broadcastable to `x` (``[d_out, 1]`` for per-channel ranges), or
            ``[d_out, groups]`` for a matrix ``[d_out, d_in]`` whose rows consist of equal groups.
        bits: any width from 2 to 16; 32 clips to the range without rounding.
    """
    return quantize_mixture(x, range, _WHOLE.to(x.device), (bits,))


def quantize_mixture(x: Tensor, range: Tensor, weights: Tensor, widths: tuple[int, ...]) -> Tensor:  # noqa: A002
    r"""$\sum_b w_b Q_b(x)$ for `weights` (5,) that sum to one and are zero outside `widths`; unused for one width.

    $\partial x_q / \partial x$ is 1 inside the range and 0 outside; $\partial x_q / \partial \beta$ is
    $\mathrm{sign}(x)$ on clipped entries, and inside it is
    $\sum_b w_b (\mathrm{round}(x/s_b) - x/s_b)\, \partial s_b / \partial \beta$.

    Saves only `x`, `range` and `weights` for the backward pass and recomputes the rest. Weights outside `widths` get
    a zero gradient; `active_widths` says when that is exact.
    """
    range = repeated(range, x)  # noqa: A001
    if torch.compiler.is_compiling():
        return _traced(x, range, weights, widths)
    return _Mixture.apply(x, range, weights, widths)


def _terms(weights: Tensor, widths: tuple[int, ...]) -> kernels.Terms:
    """Weight and largest code of each active width, as the kernels take them; a single width has weight one."""
    levels = [None if bits == UNQUANTIZED else (1 << (bits - 1)) - 1 for bits in widths]
    if len(widths) == 1:
        return [(None, levels[0])]
    rows = weights.tolist() if weights.device.type == "cpu" else weights.float()
    return [(rows[WIDTHS.index(bits)], level) for bits, level in zip(widths, levels, strict=True)]


def _traced(x: Tensor, range: Tensor, weights: Tensor, widths: tuple[int, ...]) -> Tensor:  # noqa: A002
    """The same function in differentiable operations, for a compiler that fuses forward and backward itself."""
    value, bound = x.float(), range.float()
    inside = value.abs() <= bound
    clipped = torch.where(inside, value, value.sign() * bound)
    out = torch.zeros_like(value)
    for bits in widths:
        weight = weights[WIDTHS.index(bits)].float() if len(widths) > 1 else 1.0
        if bits == UNQUANTIZED:
            out = out + weight * clipped
            continue
        step, level = grid_step(bound, bits), (1 << (bits - 1)) - 1
        code = torch.round(value / step).clamp(-level, level)
        fixed = value / step
        grid = (code - fixed).detach() * step + value  # round passes gradients straight through
        out = out + weight * torch.where(inside, grid, (code * step).detach() + clipped - clipped.detach())
    return out.to(x.dtype)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, range: Tensor, weights: Tensor, widths: tuple[int, ...]) -> Tensor:  # noqa: A002
        ctx.save_for_backward(x, range, weights)
        ctx.widths = widths
        flat, bound = _flatten(x, range)
        return kernels.quantize_mixture_kernel(flat, bound, _terms(weights, widths)).view(x.shape).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, range_, weights = ctx.saved_tensors
        need_x, need_range, need_weights, _ = ctx.needs_input_grad
        flat, bound = _flatten(x, range_)
        grad = grad.reshape(flat.shape).float()
        grad_range = grad_weights = None
        if need_range or need_weights:
            grad_x, of_range, of_terms = kernels.mixture_gradients(grad, flat, bound, _terms(weights, ctx.widths))
            grad_range = _like(range_, of_range)
            grad_weights = _scattered(weights, ctx.widths, of_terms)
        else:
            grad_x = kernels.input_gradient(grad, flat, bound)
        return (
            grad_x.view(x.shape).to(x.dtype) if need_x else None,
            grad_range if need_range else None,
            grad_weights if need_weights else None,
            None,
        )


def _like(tensor: Tensor, value: kernels.Number) -> Tensor:
    """`value` in the shape and type of `tensor`."""
    return (
        value.view(tensor.shape).to(tensor.dtype)
        if isinstance(value, Tensor)
        else tensor.new_full((), value).view(tensor.shape)
    )


def _scattered(weights: Tensor, widths: tuple[int, ...], gradients: list[kernels.Number]) -> Tensor:
    """The gradients of the active widths' weights among zeros; of a single width, whose weight is one, none."""
    if len(widths) == 1:
        return torch.zeros_like(weights)
    if all(isinstance(value, float) for value in gradients):
        by_width = dict(zip(widths, gradients, strict=True))
        return weights.new_tensor([by_width.get(bits, 0.0) for bits in WIDTHS])
    scattered = torch.zeros_like(weights)
    for bits, value in zip(widths, gradients, strict=True):
        scattered[WIDTHS.index(bits)] = value.sum() if isinstance(value, Tensor) else value
    return scattered


def _flatten(x: Tensor, range: Tensor) -> tuple[Tensor, kernels.Number]:  # noqa: A002
    """`x` as float32, one-dimensional where the range is one number, with a range that broadcasts to it."""
    if range.numel() != 1:
        return x.float(), range.float()
    return x.reshape(-1).float(), range.float().item() if range.device.type == "cpu" else range.reshape(()).float()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(x, weight, bias)` for `x` (..., d_in) and a quantized `weight` (d_out, d_in).

    The weight itself is frozen: its gradient is only summed into those of its range and gates, five numbers in all.
    Where the hardware multiplies bfloat16 faster, the outer products are therefore taken in bfloat16. For sums over
    thousands of tokens this changes the numbers in about the third digit, and saves most of the gradient's time.
    """
    if weight.requires_grad and x.dtype == torch.float32 and x.numel() >= _WORTHWHILE and _has_fast_bfloat16(x):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _has_fast_bfloat16(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    if x.device.type == "cpu":
        return torch.cpu._is_amx_tile_supported()
    return x.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, _, need_bias = ctx.needs_input_grad
        grad = grad.flatten(0, -2)
        rows = grad.to(torch.bfloat16)
        grad_weight = (rows.T @ x.flatten(0, -2).to(torch.bfloat16)).float()
        grad_x = (grad @ weight).view(x.shape) if need_x else None
        return grad_x, grad_weight, grad.sum(0) if need_bias else None


class Float32Module(nn.Module):
    """A module whose tensors stay float32 when the model around it is cast.

    Gate logits move in steps of about 1e-3 near 6. bfloat16 cannot represent such steps, so logits cast to it freeze.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Module:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def cast_parameters(self, dtype: torch.dtype) -> None:
        """Cast the tensors anyway, for a caller who has asked PEFT not to keep adapters in float32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
