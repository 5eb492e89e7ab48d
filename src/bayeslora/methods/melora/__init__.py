r"""Me-LoRA: all of the randomness in a small core between the two low-rank matrices (Me-LoRA, abstract).

$$ y = W_0 x + b + s\, B\, C\, A x, \qquad C = M + \Omega \circ \epsilon, \quad \epsilon \sim N(0, 1)^{r \times r}, $$

with $\Omega = \mathrm{softplus}(\rho)$ and the prior $C \sim N(I, \sigma_p^2)$. Only the abstract has been published;
this is the reading under which its parameter count, r(d_in + d_out) + 2r², holds. Everything random happens in r
dimensions: one core for each sequence costs 2r² multiplications a token.

At the start B = 0 and M = I: the update is zero for every draw, and the mean path begins as ordinary LoRA. The
function is the same for (B T⁻¹)(T C)A with any invertible T, so the prior's scale sets a pace, not a limit; weight
decay on A and B fixes that gauge.

Learned by gradient from one draw, $\Omega$ hardly leaves the prior: the gradient's noise swamps it. With
`variance="closed_form"` it is set. One core for each row makes $\partial L / \partial C_b$ a gradient of single rows
at no cost. With $F$ the running mean of their squares, variational Gauss–Newton gives

$$ \Omega^2 = 1 / (N F / \beta + 1 / \sigma_p^2). $$

While B = 0 the output does not depend on the core and $\Omega$ is the prior's. Then noise falls where outputs depend
on the core, and stays elsewhere. With `core="diagonal"` the core is a vector, c = m + ω ∘ ε, which is the stochastic
subspace of ScalaBL (arXiv:2506.21408) without its fixed bases.

With K cores on the same A and B the posterior is a mixture, $q = \frac1K \sum_k q_k$, and so is its prior, of
Gaussians around the members' starts. Each row is dealt to one member, with probability 1 / K. The mean loss then
estimates the likelihood under the mixture, $\frac1K \sum_k E_{q_k}[-\log p]$. The divergence is jointly convex,

$$ \mathrm{KL}(q \,\|\, p) \le \frac1K \sum_k \mathrm{KL}(q_k \,\|\, p_k), $$

so with the mean over members (not the sum) the loss stays a bound on the evidence. What it loses is the mean
divergence of $q(k \mid C)$ from $p(k \mid C)$: nothing where members do not overlap. Each member has its own bound, as
with one core, of which the loss holds 1 / K. A member without a deviation keeps $\|M_k - C_k\|^2 / 2 \sigma_p^2$, the
penalty of its mean, with $C_k$ its start: it is a maximum a posteriori estimate.
"""

from __future__ import annotations

from bayeslora.methods.melora.config import MeLoraConfig
from bayeslora.methods.melora.layer import MeLoraLayer
from bayeslora.methods.melora.model import MeLoraModel

__all__ = [
    "MeLoraConfig",
    "MeLoraLayer",
    "MeLoraModel",
]
