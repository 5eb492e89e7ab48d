r"""Random numbers that are a function of their place: equal on every device, drawn where they are used.

Number i of stream s under a key k is a hash of (k, s, i): the output function m of SplitMix64 (Steele, Lea and Flood,
2014) at a multiple of its increment $\gamma$, twice,

$$ h_{s,i} = m\bigl(m(k + (s + 1) \gamma) + (i + 1) \gamma\bigr) \in \{0, \dots, 2^{64} - 1\}. $$

There is no state: a stream can be drawn without those before it, and a longer one begins with the same numbers. The
hashes are integers, the same everywhere. Normal numbers come in pairs from one hash (Box and Muller, 1958): its upper
40 bits give the radius, its lower 24 the angle. Logarithms, sines and cosines differ between devices in their last
bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

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


def normal(key: int, streams: Sequence[int], count: int, device: torch.device) -> Tensor:
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


def uniform(key: int, streams: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Return the first `count` numbers of each stream, uniform between 0 and 1, without both; as `normal`."""
    drawn = torch.empty(len(streams), count, device=device)
    for part, hashes in _hashes(key, streams, count, device):
        torch.mul(_shifted(hashes, _BITS - 23).float().add_(0.5), 2**-23, out=drawn[:, part])
    return drawn


def signs(key: int, streams: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Return the first `count` signs, -1 or 1, of each stream; as `normal`."""
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
