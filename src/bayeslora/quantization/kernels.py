r"""The loops over large tensors behind the quantizer, written for few passes over memory.

Inside the range $\partial Q_b / \partial \beta = (\mathrm{round}(x / s_b) - x / s_b)\, s_b / \beta$, which is
$(Q_b(x) - x) / \beta$, and outside it is $\mathrm{sign}(x) = \mathrm{clamp}(x) / \beta$. With $\bar{g}$ the gradient
of $x$, which is the incoming $g$ inside and 0 outside, the gradient of the range is therefore

$$ (\sum_b w_b \langle \bar{g}, Q_b(x) - x \rangle + \langle g - \bar{g}, \mathrm{clamp}(x) \rangle) / \beta: $$

inner products and no masks. All tensors are float32. Scalars are Python numbers on the CPU, where a 0-d tensor costs
more than what it holds, and 0-d tensors elsewhere, where reading them would wait for the device. A range is a scalar
for a flat `x`, or a tensor that broadcasts to a matrix. Small CPU tensors go through NumPy, whose operations cost a
fraction of torch's where there is little to compute: most quantizers of a model have a few thousand entries.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Number: TypeAlias = Tensor | float
"""A scalar where reading it is free, a tensor elsewhere."""

Array: TypeAlias = NDArray[np.float32]

Terms: TypeAlias = list[tuple[Number | None, int | None]]
"""Weight of each grid (None for 1) and its largest code (None for the clipped identity)."""

_BLOCK = 1 << 18
_SMALL = 1 << 14
_kept = threading.local()


def quantize_mixture_kernel(x: Tensor, bound: Number, terms: Terms) -> Tensor:
    """Weighted sum of the grids in `terms`."""
    if isinstance(bound, float) and _is_small(x):
        return torch.from_numpy(_small_mixture(_array(x), bound, terms))
    out = torch.empty_like(x)
    spare = _scratch(x, bound, 1)[0] if len(terms) > 1 else out
    steps = [_step(bound, level) for _, level in terms]
    for source, target in _blocks(bound, x, out):
        for index, ((weight, level), step) in enumerate(zip(terms, steps, strict=True)):
            term = _rounded(source, bound, step, level, spare[: len(source)] if index else target)
            factor = weight if level is None else step if weight is None else step * weight
            if index:
                _add_scaled(target, term, factor)
            elif factor is not None:
                term.mul_(factor)
    return out


def input_gradient(grad: Tensor, x: Tensor, bound: Number) -> Tensor:
    """Straight through inside the range, boundary included, and 0 outside."""
    return _inside(grad, x, bound, torch.empty_like(x))


def mixture_gradients(grad: Tensor, x: Tensor, bound: Number, terms: Terms) -> tuple[Tensor, Number, list[Number]]:
    r"""Gradients of the mixture with respect to x, to the range (of its shape) and to each term's weight.

    The weights' gradients lack the same $\langle \bar{g}, x \rangle$ each: weights that sum to one do not feel it, and
    without it no digits are lost in the difference of two nearly equal sums.
    """
    if isinstance(bound, float) and _is_small(x):
        small, clipped_sum, sums = _small_sums(_array(grad), _array(x), bound, terms)
        return torch.from_numpy(small), *_collected(bound, terms, clipped_sum, sums)
    grad_x = torch.empty_like(x)
    first, second = _scratch(x, bound, 2)
    steps = [_step(bound, level) for _, level in terms]
    outside: Number = 0.0
    inside: list[Number] = [0.0] * len(terms)
    for source, incoming, straight in _blocks(bound, x, grad, grad_x):
        work = first[: len(source)]
        _inside(incoming, source, bound, straight)
        clipped = torch.sub(incoming, straight, out=second[: len(source)])
        outside = outside + _inner(clipped, _rounded(source, bound, 1.0, None, work), bound)
        for index, ((_, level), step) in enumerate(zip(terms, steps, strict=True)):
            if level is not None:
                error = _rounded(source, bound, step, level, work).mul_(step).sub_(source)
                inside[index] = inside[index] + _inner(straight, error, bound)
    return grad_x, *_collected(bound, terms, outside, inside)


def _collected(bound: Number, terms: Terms, outside: Number, inside: list[Number]) -> tuple[Number, list[Number]]:
    """Gradients of the range and of the weights from the inner products over clipped and over other entries."""
    grad_bound, grad_weights = outside, []
    for (weight, level), error_sum in zip(terms, inside, strict=True):
        if level is not None:
            grad_bound = grad_bound + (error_sum if weight is None else weight * error_sum)
            error_sum = error_sum + outside * (level / (level + 0.5))
        grad_weights.append(outside if level is None else error_sum)
    return grad_bound / bound, grad_weights


def _is_small(x: Tensor) -> bool:
    return len(x) <= _SMALL and type(x) in (Tensor, nn.Parameter)


def _array(x: Tensor) -> Array:
    """Return `x` for NumPy, as a copy under a distributed run: FSDP could not free what NumPy has seen."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    array: Array = (x.detach().clone() if is_distributed else x.detach()).numpy()
    return array


def _small_mixture(x: Array, bound: float, terms: Terms) -> Array:
    out: Array | None = None
    for weight, level in terms:
        term = _small_term(x, bound, level)
        if weight is not None:
            term *= np.float32(weight)
        out = term if out is None else np.add(out, term, out=out)
    assert out is not None
    return out


def _small_sums(grad: Array, x: Array, bound: float, terms: Terms) -> tuple[Array, Number, list[Number]]:
    straight: Array = np.where(np.abs(x) <= np.float32(bound), grad, np.float32(0))
    outside: Number = float(np.dot(grad - straight, _small_term(x, bound, None)))
    inside: list[Number] = [
        0.0 if level is None else float(np.dot(straight, _small_term(x, bound, level) - x)) for _, level in terms
    ]
    return straight, outside, inside


def _small_term(x: Array, bound: float, level: int | None) -> Array:
    """`x` on one grid."""
    if level is None:
        return _clipped(x, bound)
    step = np.float32(_step(bound, level))
    codes = np.divide(x, step)
    _clipped(np.rint(codes, out=codes), level, codes)
    codes *= step
    return codes


def _clipped(x: Array, limit: float, out: Array | None = None) -> Array:
    """`np.clip` between -`limit` and `limit`, without its overhead."""
    return np.maximum(np.minimum(x, np.float32(limit), out=out), np.float32(-limit), out=out)


def _blocks(bound: Number, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of flat CPU tensors that stay in the cache from one pass to the next; elsewhere all at once."""
    length = len(tensors[0])
    if not isinstance(bound, float) or length <= _BLOCK:
        yield tensors
        return
    for start in range(0, length, _BLOCK):
        yield tuple(tensor[start : start + _BLOCK] for tensor in tensors)


def _scratch(x: Tensor, bound: Number, count: int) -> list[Tensor]:
    """Room for `count` blocks; on the CPU the same in every call: fresh pages cost more than the arithmetic."""
    if not isinstance(bound, float):
        return [torch.empty_like(x) for _ in range(count)]
    if not hasattr(_kept, "blocks"):
        with torch.inference_mode(False):
            _kept.blocks = [torch.empty(_BLOCK) for _ in range(2)]
    return _kept.blocks[:count]


def _rounded(x: Tensor, bound: Number, step: Number, level: int | None, out: Tensor) -> Tensor:
    """Codes of `x`, or `x` clipped to the range, written into `out`."""
    if level is None:
        return torch.clamp(x, -bound, bound, out=out)  # type: ignore[arg-type]
    return torch.div(x, step, out=out).round_().clamp_(-level, level)


def _inside(grad: Tensor, x: Tensor, bound: Number, out: Tensor) -> Tensor:
    if isinstance(bound, float):  # one pass, no mask in memory
        limit = float(np.nextafter(np.float32(bound), np.float32(np.inf)))
        torch.ops.aten.hardtanh_backward.grad_input(grad, x, -limit, limit, grad_input=out)
        return out
    return torch.where(x.abs() > bound, torch.zeros((), device=x.device), grad, out=out)


def _step(bound: Number, level: int | None) -> Number:
    r"""$2 \beta / (2^b - 1)$ for level $2^{b-1} - 1$, in float32 on every path, so that codes agree everywhere."""
    if level is None:
        return 1.0
    return float(np.float32(bound) / np.float32(level + 0.5)) if isinstance(bound, float) else bound / (level + 0.5)


def _add_scaled(out: Tensor, term: Tensor, factor: Number | None) -> Tensor:
    if factor is None:
        return out.add_(term)
    return out.addcmul_(term, factor) if isinstance(factor, Tensor) else out.add_(term, alpha=factor)


def _inner(a: Tensor, b: Tensor, bound: Number) -> Number:
    """Inner product of `a` and `b` over everything that shares one entry of the range."""
    if isinstance(bound, float):
        return torch.dot(a, b).item()
    return torch.dot(a, b) if bound.ndim == 0 else (a * b).sum_to_size(bound.shape)
