r"""B-LoRA on one page: quantizer, gates, Algorithm 1 and the penalty, in plain autograd and in any dtype.

Reference for the tests, written from the paper's equations in their original form and sharing no code with the
package. What is read differently from the printed text:

- The range is symmetric, $[-\beta, \beta]$, with $2^b - 1$ levels at $b$ bits; 32 bits is the clipped identity.
- The divisor in line 6 of Algorithm 2 is the temperature 2/3, and $\sigma(\phi)$ in Equation 9 is $P(z > 0)$.
- $\sigma(\xi_1)$ is 1; scale and bias stand inside the output quantizer, where Algorithm 1 leaves them out.
- An entry outside the range has the derivative $\mathrm{sign}(x)$ with respect to $\beta$, whatever the width. Pure
  straight-through differentiation would give $\mathrm{sign}(x)\,(2^b - 2) / (2^b - 1)$, the slope of the last level.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

WIDTHS = (2, 4, 8, 16, 32)


class Quantizer(NamedTuple):
    """The state of one quantizer: `range` is $\\beta$, `gates` are $z_4, z_8, z_{16}, z_{32}$."""

    range: Tensor
    gates: Tensor


def step(range: Tensor, bits: int) -> Tensor:
    return 2 * range / (2**bits - 1)


def clip(x: Tensor, range: Tensor) -> Tensor:
    return torch.where(x.abs() <= range, x, x.sign() * range)


def round_through(value: Tensor, step: Tensor, largest: int, inside: Tensor) -> Tensor:
    """`step * round(value / step)`, where the rounding error in steps is a constant to the gradient."""
    error = ((value / step).round().clamp(-largest, largest) - value / step).detach()
    return value + error * torch.where(inside, step, step.detach())


def fixed_width(x: Tensor, range: Tensor, bits: int) -> Tensor:
    """Equation 3 at one width."""
    clipped = clip(x, range)
    if bits == 32:
        return clipped
    return round_through(clipped, step(range, bits), 2 ** (bits - 1) - 1, x.abs() <= range)


def mixture(x: Tensor, range: Tensor, gates: Tensor) -> Tensor:
    """Equations 4 and 6 as printed: each residual is what the sum of all coarser widths has left over."""
    inside, clipped = x.abs() <= range, clip(x, range)
    scale = step(range, 2)
    partial = round_through(clipped, scale, 1, inside)
    output, opened = partial, torch.ones_like(gates[0])
    for bits, gate in zip(WIDTHS[1:], gates, strict=True):
        coarse = bits // 2
        scale = scale / (2**coarse + 1)
        residual = clipped - partial
        if bits != 32:
            residual = round_through(residual, scale, 2 ** (coarse - 1), inside)
        opened = opened * gate
        partial, output = partial + residual, output + opened * residual
    return output


def hard_concrete(logits: Tensor, uniform: Tensor) -> Tensor:
    """Algorithm 2, lines 6 and 7."""
    smooth = torch.sigmoid((torch.log(uniform / (1 - uniform)) + logits) / (2 / 3))
    return torch.clamp(smooth * (1.1 - -0.1) + -0.1, min=0, max=1)


def open_probability(logits: Tensor) -> Tensor:
    """`z > 0` iff the sigmoid exceeds 1/12; its noise `log(u / (1 - u))` has the logistic distribution."""
    boundary = 2 / 3 * math.log((1 / 12) / (1 - 1 / 12)) - logits
    return 1 - 1 / (1 + torch.exp(-boundary))


def rank_gates(logits: Tensor) -> Tensor:
    """Algorithm 1, line 2."""
    gates, product = [torch.ones_like(logits[0])], torch.ones_like(logits[0])
    for logit in logits[1:]:
        product = product * torch.sigmoid(logit)
        gates.append(product + (product.round() - product).detach())
    return torch.stack(gates)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    E: Tensor,
    B: Tensor,
    scaling: float,
    gates: Tensor | None,
    quantizers: dict[str, Quantizer],
) -> Tensor:
    """Algorithm 1 for one linear layer; a name missing from `quantizers` is not quantized.

    Shapes: `x` (..., d_in), `weight` (d_out, d_in), `A` (r, d_in), `E` (r,), `B` (d_out, r), `gates` (r,).
    """

    def q(name: str, value: Tensor) -> Tensor:
        return mixture(value, *quantizers[name]) if name in quantizers else value

    x = q("in", x)
    diagonal = q("E", E)
    if gates is not None:
        diagonal = diagonal * gates
    low = q("A_out", x @ q("A", A).T)
    low = q("E_out", low * diagonal)
    y = x @ q("weight", weight).T + scaling * (low @ q("B", B).T)
    return q("out", y if bias is None else y + bias)


def bit_weights(weighting: str, macs: Tensor) -> Tensor:
    """$w_b$ for 4 to 32 bits, shape (quantizers, 4); `macs` are the multiply-accumulates each quantizer feeds."""
    bits = torch.tensor(WIDTHS[1:], dtype=macs.dtype).repeat(len(macs), 1)
    if weighting == "const":
        return torch.ones_like(bits)
    return bits if weighting == "bits" else bits * (macs / macs.max())[:, None]


def bit_penalty(logits: Tensor, weights: Tensor) -> Tensor:
    """The quantization sum of Equation 15, as a loss, for `logits` of shape (quantizers, 4)."""
    total = logits.new_zeros(())
    for quantizer, weight in zip(logits, weights, strict=True):
        for last in range(4):
            total = total + weight[last] * open_probability(quantizer[: last + 1]).prod()
    return total


def rank_penalty(logits: Tensor) -> Tensor:
    """The rank sum of Equation 15 for one module's `logits` of shape (r,), with 1 for its first rank."""
    total = logits.new_ones(())
    for last in range(1, len(logits)):
        total = total + torch.sigmoid(logits[1 : last + 1]).prod()
    return total
