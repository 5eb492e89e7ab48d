r"""The Bayesian-bits quantizer in mixture form.

A symmetric range $\beta > 0$ carries the nested grids $s_b = 2\beta / (2^b - 1)$ for $b \in \{2, 4, 8, 16, 32\}$ with
codes $\mathrm{clamp}(\mathrm{round}(x / s_b), \pm(2^{b-1} - 1))$: $2^b - 1$ levels with zero among them, so signed two
bits are ternary. The gated sum of Equations 5 and 6,

$$ x_q = x_2 + z_4(\epsilon_4 + z_8(\epsilon_8 + z_{16}(\epsilon_{16} + z_{32}\epsilon_{32}))), $$

is computed with $\epsilon_{2b} = Q_{2b}(x) - Q_b(x)$ as the mixture $\sum_b w_b Q_b(x)$, $w_2 = 1 - z_4$,
$w_4 = z_4(1 - z_8)$ and so on. That departs from Algorithm 2's running residual (line 12) at rounding ties only, has
the same straight-through gradients, and makes training, evaluation and export agree to the last bit. Thirty-two bits
are the clipped identity, because float32 cannot resolve a 32-bit grid. All arithmetic is float32 whatever comes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bayeslora.quantization import kernels
from bayeslora.vocabulary import UNQUANTIZED, WIDTHS

_IDENTITY = UNQUANTIZED
_ONE_HOT = dict(zip(WIDTHS, torch.eye(len(WIDTHS)), strict=True))


def grid_step(range: Tensor, bits: int) -> Tensor:  # noqa: A002 - the field's name
    r"""Step $s_b = 2\beta / (2^b - 1)$ of the grid with `bits` bits, of the shape of `range`."""
    return range / ((1 << (bits - 1)) - 0.5)


def codes(x: Tensor, range: Tensor, bits: int) -> Tensor:  # noqa: A002
    """Integer codes (int32, shape of `x`) of `x` at `bits` < 32 bits; `codes * grid_step` is the quantized value."""
    level = (1 << (bits - 1)) - 1
    return torch.round(x.float() / grid_step(range.float(), bits)).clamp(-level, level).to(torch.int32)


def mixture_weights(gates: Tensor) -> Tensor:
    r"""Weights $w_b$ (..., 5) of the mixture for gates $z_4, z_8, z_{16}, z_{32}$ (..., 4); they sum to one."""
    reached = torch.cat([torch.ones_like(gates[..., :1]), gates.cumprod(-1)], dim=-1)
    return reached - torch.cat([reached[..., 1:], torch.zeros_like(gates[..., :1])], dim=-1)


def active_widths(gates: Sequence[float]) -> tuple[int, ...]:
    """Widths with non-zero weight for the four gate values, known on the host.

    The other widths add nothing to the output, and nothing to the gradient of any gate that lies strictly between 0
    and 1; a gate at 0 or 1 is clamped there and has no gradient. Leaving them out is therefore exact.
    """
    active, reached = [], 1.0
    for width, gate in zip(WIDTHS, (*gates, 0.0), strict=True):
        if reached * (1.0 - gate) > 0.0:
            active.append(width)
        reached *= gate
    return tuple(active)


def quantize(x: Tensor, range: Tensor, bits: int) -> Tensor:  # noqa: A002
    r"""`x` on the grid of one fixed width: $Q_b(x)$, straight-through in `x`, with the learned-range gradient.

    Args:
        x: any shape and floating dtype; the result has the same.
        range: positive, 0-d, one element, or broadcastable to `x` (``[d_out, 1]`` for per-channel ranges).
        bits: one of `WIDTHS`; 32 clips to the range and rounds nothing.
    """
    return quantize_mixture(x, range, _ONE_HOT[bits].to(x.device), (bits,))


def quantize_mixture(x: Tensor, range: Tensor, weights: Tensor, widths: tuple[int, ...]) -> Tensor:  # noqa: A002
    r"""$\sum_b w_b Q_b(x)$ for `weights` (5,) that sum to one and are zero outside `widths`.

    $\partial x_q / \partial x$ is 1 inside the range and 0 outside; $\partial x_q / \partial \beta$ is
    $\mathrm{sign}(x)$ on clipped entries, and inside it is
    $\sum_b w_b (\mathrm{round}(x/s_b) - x/s_b)\, \partial s_b / \partial \beta$.

    Saves only `x`, `range` and `weights` for the backward pass and recomputes the rest. Weights outside `widths` get
    a zero gradient; `active_widths` says when that is exact.
    """
    if torch.compiler.is_compiling():
        return _traced(x, range, weights, widths)
    return _Mixture.apply(x, range, weights, widths)


def _terms(weights: Tensor, widths: tuple[int, ...]) -> kernels.Terms:
    """Weight and largest code of each active width, as the kernels take them; a single width has weight one."""
    levels = [None if bits == _IDENTITY else (1 << (bits - 1)) - 1 for bits in widths]
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
        weight = weights[WIDTHS.index(bits)].float()
        if bits == _IDENTITY:
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
