r"""Normal noise and random signs: fresh in training, seeded and repeatable where a function has to stay the same.

The *scope* of noise says what shares one draw of the weights:

- `example`: each row of the batch has its own draw, the same for all tokens of the row;
- `token`: each token has its own draw: gradients of the lowest variance, but no coherent function of a sequence;
- `batch`: all rows share one draw; if a batch holds several `draws`, each draw has its group of rows.

Fresh noise comes from torch's default generators. Gradient checkpointing restores their state to recompute a forward
pass, and checkpoints save it. Distributed ranks often have the same seed, so the rank is mixed in and each rank draws
different noise (except in a compiled forward pass: seed the ranks differently there).

Seeded numbers are a function of their place, and are drawn on the device that uses them: they depend on the seed, the
layer, and the draw or (scope `example`) the row's position, but not on the device, the batch size, the rank or the
other draws. Number i of stream s under a key k comes from a hash: the output function m of SplitMix64 (Steele, Lea and
Flood, 2014) at multiples of its increment $\gamma$,

$$ h_{s,i} = m\bigl(m(k + (s + 1) \gamma) + (i + 1) \gamma\bigr) \in \{0, \dots, 2^{64} - 1\}. $$

The hashes are integers, the same everywhere. Normal numbers come in pairs from one hash (Box and Muller, 1958): its
upper 40 bits give the radius, its lower 24 the angle. Logarithms, sines and cosines differ between devices in their
last bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from bayeslora.errors import BayesLoraError, counted

Scope = Literal["example", "token", "batch"]
SCOPES: tuple[str, ...] = get_args(Scope)
_BITS = 64
_INCREMENT = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_ANGLE_BITS = 24
_RADIUS_BITS = _BITS - _ANGLE_BITS
_AT_ONCE = 1 << 22
"""Hashes of one pass; more are drawn in parts, which bounds the memory."""


def key_of(text: str) -> int:
    """Return the key that belongs to a text, 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_BITS // 8).digest(), "little")


def seeded_normal(key: int, streams: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Return the first `count` standard normal numbers of each stream, (streams, count), float32 on `device`.

    The largest possible number is 7.5.

    Args:
        key: 64 bits, as from `key_of`.
        streams: numbers of the streams, at least 0; a `range` costs no copy to the device.
        count: numbers of each stream.
        device: where they are drawn.
    """
    pairs = -(-count // 2)
    drawn = torch.empty(len(streams), pairs, 2, device=device)
    for part, hashes in _hashes(key, streams, pairs, device):
        angle = (hashes & ((1 << _ANGLE_BITS) - 1)).float().mul_(2 * math.pi * 2**-_ANGLE_BITS)
        radius = _shifted(hashes, _ANGLE_BITS).float().add_(0.5).mul_(2**-_RADIUS_BITS).log_().mul_(-2).sqrt_()
        torch.mul(radius, angle.cos(), out=drawn[:, part, 0])
        torch.mul(radius, angle.sin_(), out=drawn[:, part, 1])
    return drawn.flatten(1)[:, :count]


def seeded_uniform(key: int, streams: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Return the first `count` numbers of each stream, uniform between 0 and 1, without both; as `seeded_normal`."""
    drawn = torch.empty(len(streams), count, device=device)
    for part, hashes in _hashes(key, streams, count, device):
        torch.mul(_shifted(hashes, _BITS - 23).float().add_(0.5), 2**-23, out=drawn[:, part])
    return drawn


def seeded_signs(key: int, streams: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Return the first `count` signs, -1 or 1, of each stream; as `seeded_normal`."""
    drawn = torch.empty(len(streams), count, device=device)
    for part, hashes in _hashes(key, streams, count, device):
        drawn[:, part] = _shifted(hashes, _BITS - 1)
    return drawn.mul_(2).sub_(1)


def _hashes(key: int, streams: Sequence[int], count: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of 0 … `count` - 1 with the hashes of every stream there, (streams, places) int64."""
    starts = _mixed(_places(streams, device).add_(1).mul_(_signed(_INCREMENT)).add_(_signed(key)))
    step = max(1, _AT_ONCE // max(1, len(streams)))
    for first in range(0, count, step):
        part = slice(first, min(first + step, count))
        places = torch.arange(part.start + 1, part.stop + 1, device=device).mul_(_signed(_INCREMENT))
        yield part, _mixed(starts[:, None] + places)


def _places(streams: Sequence[int], device: torch.device) -> Tensor:
    if isinstance(streams, range):
        return torch.arange(streams.start, streams.stop, streams.step, device=device)
    return torch.tensor(list(streams), dtype=torch.int64).to(device)


def _mixed(z: Tensor) -> Tensor:
    """Return SplitMix64's output function of int64, in place; products wrap around as those of unsigned numbers do."""
    for shift, factor in _ROUNDS:
        z ^= _shifted(z, shift)
        z *= _signed(factor)
    return z.bitwise_xor_(_shifted(z, _LAST_SHIFT))


def _shifted(z: Tensor, by: int) -> Tensor:
    """Return `z` shifted right, with zeros from the left."""
    return (z >> by).bitwise_and_((1 << (_BITS - by)) - 1)


def _signed(word: int) -> int:
    """Return the int64 of the same 64 bits."""
    return word - (1 << _BITS) if word >> (_BITS - 1) else word


class IndivisibleBatchError(BayesLoraError):
    """The rows of a forward pass cannot be divided among several draws; one draw per pass always works."""


class PassDraws:
    """Draws of one layer in a forward pass. A layer that runs several times in it (ALBERT's) has one, the first.

    Later calls draw and drop: a call uses up as many random numbers when gradient checkpointing repeats it.

    Attributes:
        number: the pass, from 1.
        repeats: whether the layer has run several times in one pass.
    """

    def __init__(self) -> None:
        self.number, self.repeats = 0, False
        self._is_inside = False
        self._calls = 0
        self._first: dict[tuple[int, ...], Tensor] = {}

    def begin_pass(self) -> None:
        self.number += 1
        self._is_inside, self._calls = True, 0
        self._first.clear()

    def end_pass(self) -> None:
        """Mark the end of a forward pass; a call after it is recomputed for a backward pass."""
        self._is_inside = False

    def shared(self, drawn: Tensor) -> Tensor:
        """Return the first draw of this shape in the pass, which is `drawn` in the first call."""
        if self._is_inside:
            self._calls += 1
            self.repeats = self.repeats or self._calls > 1
            return self._first.setdefault(tuple(drawn.shape), drawn)
        return self._first.get(tuple(drawn.shape), drawn) if self.repeats else drawn


class Noise:
    """Normal noise and random signs for one layer.

    Args:
        scope: what shares one draw of the weights: a row, a token or the batch.
        seed: None draws fresh noise in every call; with a seed every call returns the same noise.
        key: name of the layer, so that layers differ under one seed.
        draws: numbers of the weight draws in a batch, for scope `batch`: with D draws and N rows, row i uses
            `draws[i // (N / D)]`.
        antithetic: pair draws with opposite noise, which cancels the odd part of a function in every average. With a
            seed, draws 2k and 2k + 1 are a pair; without one, the two halves of the rows (`example`) or draws are.
        scale: factor of the normal numbers; 0 leaves only the means.

    Raises:
        BayesLoraError: the scope is unknown, `draws` is empty, there are several draws with a scope other than
            `batch`, or the noise is antithetic with scope `token`.
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
        self.of_pass: PassDraws | None = None  # of fresh noise, what the calls of one forward pass share
        self._kept: dict[tuple[object, ...], Tensor] = {}

    def for_adapter(self, position: int) -> Noise:
        """Return the noise for the adapter at `position` among the layer's active ones, independent of the others'."""
        if position == 0 or self.seed is None:
            return self
        return Noise(self.scope, self.seed, f"{self.key}+{position}", self.draws, self.antithetic, self.scale)

    def groups(self, rows: int) -> int:
        """Return the number of equal, consecutive groups into which `rows` rows are divided: one per weight draw."""
        if self.scope == "example":
            return rows
        if rows % len(self.draws):
            raise IndivisibleBatchError(
                f"a layer got {counted(rows, 'row')}, but {len(self.draws)} draws need equal parts of them: "
                "take one at a time"
            )
        return len(self.draws)

    def normal(self, groups: int, shape: Sequence[int], device: torch.device) -> Tensor:
        """Draw normal numbers (groups, *shape) with standard deviation `scale`, float32: one entry per draw."""
        # With a scale of 0 no random number is used up: dropout stays what it is without noise.
        is_drawn = self.scale != 0.0
        drawn = self._repeated(groups, shape, device) if is_drawn else torch.zeros(groups, *shape, device=device)
        return drawn if self.of_pass is None or self.scope == "token" else self.of_pass.shared(drawn)

    def _repeated(self, groups: int, shape: Sequence[int], device: torch.device) -> Tensor:
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
        """Draw normal numbers of `shape` with standard deviation `scale`, float32, for scope `token`."""
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
            return seeded_signs(self._key(name), range(1), count, device).view(*shape)
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
        return seeded_normal(self._key(""), streams, math.prod(shape), device).reshape(len(streams), *shape)

    def _key(self, name: str) -> int:
        return key_of(f"{self.seed}/{self.key}/{name}")


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
