"""Where a layer's noise comes from: fresh while training, seeded and replayable where a function has to stay the same.

A *scope* says what shares one draw of the weights:

- `example`: each row of the batch has a draw of its own, the same for all tokens of the row;
- `token`: each token has one, which gives gradients of the lowest variance but no coherent function of a sequence;
- `batch`: all rows share one draw, or, with several `draws` folded into the batch, all rows of a draw do.

Fresh numbers come from torch's default generators, which gradient checkpointing restores when it recomputes a forward
pass, and exact resumption saves. Distributed ranks are commonly seeded alike, so the rank is mixed in: each rank sees
noise of its own (a compiled forward pass does not mix it in: seed the ranks differently there). Seeded numbers depend
on the seed, the layer and the draw, or with scope `example` the row's position, alone: not on the device, the size of
the batch, the rank, or on which draws were taken together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from bayeslora.errors import BayesLoraError

Scope = Literal["example", "token", "batch"]
SCOPES: tuple[str, ...] = get_args(Scope)
_BLOCK = 16
"""torch's CPU generator makes normal numbers in blocks of this many, and those of a part of a block differently."""


class UnfoldableError(BayesLoraError):
    """The rows of a forward pass cannot be divided among the draws; one draw a pass always works."""


class Noise:
    """The noise of one layer.

    Args:
        scope: what shares one draw of the weights.
        seed: None for fresh numbers in every call; otherwise every call gives the same.
        key: name of the layer, so that layers differ under one seed.
        draws: numbers of the weight draws that a batch holds, for scope `batch`: with D draws and N rows, row i uses
            draw i // (N / D).
        antithetic: draws come in pairs of opposite noise, which cancels what is odd in it from every average: seeded
            draws 2k and 2k + 1, otherwise the two halves of the rows (`example`) or of the draws.

    Raises:
        BayesLoraError: an unknown scope, no draw at all, several draws with another scope than `batch`, or antithetic
            noise for tokens.
    """

    def __init__(
        self,
        scope: Scope = "example",
        seed: int | None = None,
        key: str = "",
        draws: Sequence[int] = range(1),
        antithetic: bool = False,
    ) -> None:
        if scope not in SCOPES:
            raise BayesLoraError(f"the noise's scope is {scope!r}, one of {', '.join(SCOPES)} is needed")
        if not len(draws):
            raise BayesLoraError("0 draws of the weights are asked for, at least 1 is needed")
        if len(draws) > 1 and scope != "batch":
            raise BayesLoraError(f"{len(draws)} draws in one batch need scope 'batch', not {scope!r}")
        if antithetic and scope == "token":
            raise BayesLoraError(
                "antithetic noise needs scope 'example' or 'batch', not 'token': tokens have no pairs"
            )
        self.scope, self.seed, self.key, self.draws, self.antithetic = scope, seed, key, draws, antithetic
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def beside(self, position: int) -> Noise:
        """The noise of the adapter at `position` among those active on the layer: independent of the first one's."""
        if position == 0 or self.seed is None:
            return self
        return Noise(self.scope, self.seed, f"{self.key}+{position}", self.draws, self.antithetic)

    def groups(self, rows: int) -> int:
        """How many draws `rows` rows need: groups of equal size, in order."""
        if self.scope == "example":
            return rows
        if rows % len(self.draws):
            raise UnfoldableError(
                f"{rows} rows cannot be divided among {len(self.draws)} draws of the weights: take one draw at a time"
            )
        return len(self.draws)

    def normal(self, groups: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal (groups, *shape), float32: one entry for each draw of the weights."""
        if self.seed is None:
            generator = rank_generator(device)
            return self._paired(groups, lambda count: torch.randn(count, *shape, device=device, generator=generator))
        if self.scope != "batch":
            return self._paired(groups, lambda count: self._seeded("", count, shape)).to(device)
        key = (tuple(shape), device)
        if key not in self._kept:
            with torch.inference_mode(False):  # kept numbers may meet autograd in a later pass
                drawn = [self._of_draw(draw, shape) for draw in self.draws]
                self._kept = {key: (torch.cat(drawn) if len(drawn) > 1 else drawn[0]).to(device)}
        return self._kept[key]

    def normal_per_token(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal of `shape`, float32, for scope `token`."""
        if self.seed is None:
            return torch.randn(tuple(shape), device=device, generator=rank_generator(device))
        return self._seeded("", shape[0], shape[1:]).to(device)

    def signs(self, shape: Sequence[int], device: torch.device, name: str) -> Tensor:
        """Random signs -1 and 1 of `shape`, float32; `name` tells those of one layer apart."""
        if self.seed is None:
            generator, where = rank_generator(device), device
        else:
            generator, where = self._generator(name), torch.device("cpu")
        drawn = torch.randint(0, 2, tuple(shape), dtype=torch.float32, device=where, generator=generator)
        return drawn.mul_(2).sub_(1).to(device)

    def _paired(self, count: int, draw: Callable[[int], Tensor]) -> Tensor:
        if not self.antithetic:
            return draw(count)
        drawn = draw((count + 1) // 2)
        return torch.cat([drawn, -drawn])[:count]

    def _of_draw(self, draw: int, shape: Sequence[int]) -> Tensor:
        if not self.antithetic:
            return self._seeded(str(draw), 1, shape)
        drawn = self._seeded(str(draw // 2), 1, shape)
        return -drawn if draw % 2 else drawn

    def _seeded(self, name: str, count: int, shape: Sequence[int]) -> Tensor:
        """(count, *shape), of which the first entries are the same for every `count`."""
        size = math.prod(shape)
        padded = -(-size // _BLOCK) * _BLOCK
        return torch.randn(count, padded, generator=self._generator(name))[:, :size].reshape(count, *shape)

    def _generator(self, name: str) -> torch.Generator:
        """On the CPU whatever the device, so that a seed means the same numbers everywhere."""
        text = f"{self.seed}/{self.key}/{name}"
        word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        return torch.Generator().manual_seed(word >> 1)


def rank_generator(device: torch.device) -> torch.Generator | None:
    """None, torch's default generator, on one rank; among several, one that differs by rank and follows the default's.

    Its seed is drawn from the default generator, so a recomputed forward pass and a resumed run get the same again.
    """
    if torch.compiler.is_compiling() or not torch.distributed.is_available():
        return None
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    word = int(torch.randint(1 << 62, ()))
    mixed = (word + 0x9E3779B97F4A7C15 * torch.distributed.get_rank()) % (1 << 63)
    return torch.Generator(device).manual_seed(mixed)
