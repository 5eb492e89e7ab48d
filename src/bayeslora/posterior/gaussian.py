r"""Gaussians with independent entries, $q(W) = \prod_{ij} N(M_{ij}, \Omega_{ij}^2)$, and noise to draw from them.

Noise is fresh in training, and seeded and repeatable where a function has to stay the same. Its *scope* says what
shares one draw of the weights:

- `example`: each row of the batch has its own draw, the same for all tokens of the row;
- `token`: each token has its own draw: gradients of the lowest variance, but no coherent function of a sequence;
- `batch`: all rows share one draw; if a batch holds several `draws`, each draw has its group of rows.

Fresh noise comes from torch's default generators. Gradient checkpointing restores their state to recompute a forward
pass, and checkpoints save it. Distributed ranks often have the same seed, so the rank is mixed in and each rank draws
different noise (except in a compiled forward pass: seed the ranks differently there). Seeded noise depends only on the
seed, the layer, and the draw or (scope `example`) the row's position: not on the device, the batch size, the rank or
the other draws of the batch (`posterior.counter`). It is drawn on the device that uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bayeslora.errors import BayesLoraError, counted
from bayeslora.posterior import counter

_VARIANCE_FLOOR = 1e-12
Scope = Literal["example", "token", "batch"]
SCOPES: tuple[str, ...] = get_args(Scope)


def standard_deviation(rho: Tensor) -> Tensor:
    r"""Return $\Omega = \mathrm{softplus}(\rho) > 0$, of the shape of `rho`, in float32."""
    return F.softplus(rho.float())


def inverse_softplus(value: float) -> float:
    r"""Return the $\rho$ with $\mathrm{softplus}(\rho)$ = `value` > 0."""
    return value + math.log(-math.expm1(-value))


def kl_divergence(mean: Tensor, std: Tensor, prior_mean: Tensor | float, prior_std: float) -> Tensor:
    r"""Return $\mathrm{KL}(q \,\|\, p)$ in nats, summed over all entries, as a 0-d float32 tensor.

    $$ \sum \log\frac{\sigma_p}{\Omega} + \frac{\Omega^2 + (M - M_p)^2}{2\sigma_p^2} - \frac12 $$

    Args:
        mean, std: of the posterior, the same shape; `std` positive.
        prior_mean: broadcasts to `mean`.
        prior_std: positive.
    """
    std, offset = std.float(), mean.float() - prior_mean
    return (math.log(prior_std) - std.log() + (std.square() + offset.square()) / (2 * prior_std**2) - 0.5).sum()


def local_reparametrization(z: Tensor, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    r"""Draw $W z$ for every row independently, without drawing $W$ (Kingma et al., 2015, arXiv:1506.02557).

    $$ u = M z + \epsilon \sqrt{\Omega^2 z^2 + 10^{-12}} $$

    Each row has its exact distribution, but rows are independent; with one shared $W$ they would not be. The constant
    keeps the gradient finite at z = 0.

    Args:
        z: (..., d_in).
        mean, std: (d_out, d_in).
        noise: (..., d_out), standard normal.
    """
    return z @ mean.T + noise * torch.sqrt(z.square() @ std.square().T + _VARIANCE_FLOOR)


class IndivisibleBatchError(BayesLoraError):
    """The rows of a forward pass cannot be divided among several draws; one draw per pass always works."""


class Noise:
    """Normal noise and random signs for one layer.

    Args:
        scope: what shares one draw of the weights: a row, a token or the batch.
        seed: None draws fresh noise in every call; with a seed every call returns the same noise.
        key: name of the layer, so that layers differ under one seed.
        draws: numbers of the weight draws that a batch holds, for scope `batch`: with D draws and N rows, row i uses
            `draws[i // (N / D)]`.
        antithetic: pair draws of opposite noise, which cancels the odd part of a function in every average: seeded
            draws 2k and 2k + 1, otherwise the two halves of the rows (`example`) or of the draws.
        scale: factor of the normal numbers; 0 leaves the means.

    Raises:
        BayesLoraError: for an unknown scope, an empty `draws`, several draws with a scope other than `batch`, or
            antithetic noise for tokens.
    """

    def __init__(
        self,
        scope: Scope = "example",
        seed: int | None = None,
        key: str = "",
        draws: Sequence[int] = range(1),
        antithetic: bool = False,
        scale: float = 1.0,
    ) -> None:
        if scope not in SCOPES:
            raise BayesLoraError(f"scope is {scope!r}, but must be {' or '.join(SCOPES)}: give scope='example'")
        if not len(draws):
            raise BayesLoraError("0 draws of the weights were given, but at least 1 is needed: give draws=1")
        if len(draws) > 1 and scope != "batch":
            raise BayesLoraError(f"{len(draws)} draws share a batch, but scope is {scope!r}: give scope='batch'")
        if antithetic and scope == "token":
            raise BayesLoraError("antithetic is True, but scope is 'token': give scope='example' or scope='batch'")
        self.scope, self.seed, self.key, self.draws, self.antithetic = scope, seed, key, draws, antithetic
        self.scale = scale
        self.rows_per_example = 1  # rows 0, n/2, … of n share a draw where it is 2, as of a text and its alternative
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def for_adapter(self, position: int) -> Noise:
        """Return the noise for the adapter at `position` among the layer's active ones, independent of the others'."""
        if position == 0 or self.seed is None:
            return self
        return Noise(self.scope, self.seed, f"{self.key}+{position}", self.draws, self.antithetic, self.scale)

    def groups(self, rows: int) -> int:
        """Return the number of equal, consecutive groups that `rows` rows form: one for each draw of the weights."""
        if self.scope == "example":
            return rows
        if rows % len(self.draws):
            raise IndivisibleBatchError(
                f"a layer got {counted(rows, 'row')}, but {len(self.draws)} draws need equal parts of them: "
                "take one at a time"
            )
        return len(self.draws)

    def normal(self, groups: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """Draw normal numbers (groups, *shape) of deviation `scale`, float32: one entry for each draw."""
        if self.scale == 0.0:  # no random number is used up: dropout stays what it is without noise
            return torch.zeros(groups, *shape, device=device)
        copies = self.rows_per_example if self.scope == "example" else 1
        if copies > 1 and groups % copies == 0:
            return self._scaled(self._normal(groups // copies, shape, device)).repeat(copies, *[1] * len(shape))
        return self._scaled(self._normal(groups, shape, device))

    def _normal(self, groups: int, shape: Sequence[int], device: torch.device) -> Tensor:
        if self.seed is None:
            generator = rank_generator(device)
            return self._paired(groups, lambda count: torch.randn(count, *shape, device=device, generator=generator))
        if self.scope != "batch":
            return self._paired(groups, lambda count: self._seeded(range(count), shape, device))
        key = (tuple(shape), device)
        if key not in self._kept:
            with torch.inference_mode(False):  # a later pass with autograd may use the kept noise
                self._kept = {key: self._of_draws(shape, device)}
        return self._kept[key]

    def normal_per_token(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Draw normal numbers of `shape` and deviation `scale`, float32, for scope `token`."""
        if self.scale == 0.0:
            return torch.zeros(tuple(shape), device=device)
        if self.seed is None:
            return self._scaled(torch.randn(tuple(shape), device=device, generator=rank_generator(device)))
        return self._scaled(self._seeded(range(shape[0]), shape[1:], device))

    def _scaled(self, drawn: Tensor) -> Tensor:
        return drawn if self.scale == 1.0 else drawn * self.scale

    def signs(self, shape: Sequence[int], device: torch.device, name: str) -> Tensor:
        """Draw random signs -1 and 1 of `shape`, float32; each call in one layer needs a different `name`."""
        if self.seed is not None:
            count = math.prod(shape)
            return counter.signs(self._key(name), range(1), count, device).view(*shape)
        drawn = torch.randint(0, 2, tuple(shape), dtype=torch.float32, device=device, generator=rank_generator(device))
        return drawn.mul_(2).sub_(1)

    def _paired(self, count: int, draw: Callable[[int], Tensor]) -> Tensor:
        if not self.antithetic:
            return draw(count)
        drawn = draw((count + 1) // 2)
        return torch.cat([drawn, -drawn])[:count]

    def _of_draws(self, shape: Sequence[int], device: torch.device) -> Tensor:
        if not self.antithetic:
            return self._seeded(self.draws, shape, device)
        pairs = sorted({draw // 2 for draw in self.draws})
        drawn = dict(zip(pairs, self._seeded(pairs, shape, device), strict=True))
        return torch.stack([-drawn[draw // 2] if draw % 2 else drawn[draw // 2] for draw in self.draws])

    def _seeded(self, streams: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
        """Return the numbers (streams, *shape) of rows or draws."""
        return counter.normal(self._key(""), streams, math.prod(shape), device).reshape(len(streams), *shape)

    def _key(self, name: str) -> int:
        return counter.key_of(f"{self.seed}/{self.key}/{name}")


def rank_generator(device: torch.device) -> torch.Generator | None:
    """Return None (torch's default generator) on a single rank, and otherwise a different generator on each rank.

    Its seed comes from the default generator, so a recomputed forward pass and a resumed run get the same one.
    """
    if torch.compiler.is_compiling() or not torch.distributed.is_available():
        return None
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    word = int(torch.randint(1 << 62, ()))
    mixed = (word + 0x9E3779B97F4A7C15 * torch.distributed.get_rank()) % (1 << 63)
    return torch.Generator(device).manual_seed(mixed)
