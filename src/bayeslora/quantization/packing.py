"""Signed integer codes of 2, 4, 8 or 16 bits as bytes, and back: tensors in, tensors out.

Codes lie in two's complement, the first in the lowest bits of the first byte, row by row; what is left of the last
byte is zero. Numbers of more than one byte are little-endian, as everywhere in a safetensors file. Thirty-two bits are
float32 as it is, because a quantizer of that width rounds nothing. A grid is symmetric, so that the lowest code of
two's complement, -2^(b-1), is never used: to find it means that the bytes are no codes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.vocabulary import UNQUANTIZED, WIDTHS


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    _check_width(bits)
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """The bytes (uint8, one-dimensional) of `codes`.

    Args:
        codes: any shape; integers of magnitude at most 2^(bits-1) - 1, or floating point numbers for 32 bits.
        bits: one of `WIDTHS`.

    Raises:
        BayesLoraError: another width, or a code that does not fit into it.
    """
    _check_width(bits)
    flat = codes.detach().cpu().reshape(-1)
    if bits == UNQUANTIZED:
        return _bytes_of(flat.to(torch.float32))
    level = (1 << (bits - 1)) - 1
    if flat.numel() and int(flat.abs().max()) > level:
        raise BayesLoraError(
            f"codes of {bits} bits lie within ±{level}, not at {int(flat.abs().max())}: use more bits"
        )
    if bits == 16:
        return _bytes_of(flat.to(torch.int16))
    if bits == 8:
        return _bytes_of(flat.to(torch.int8))
    fields = flat.to(torch.int32) & ((1 << bits) - 1)
    share = 8 // bits
    padded = torch.zeros(packed_size(len(flat), bits) * share, dtype=torch.int32)
    padded[: len(flat)] = fields
    return (padded.view(-1, share) << _shifts(bits)).sum(1).to(torch.uint8)


def unpack(data: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """The codes of `shape`, int8 up to 8 bits and int16 at 16, or for 32 bits the float32 numbers, that `data` holds.

    Args:
        data: uint8, one-dimensional, of exactly `packed_size` bytes.
        bits: one of `WIDTHS`.
        shape: of the tensor that was packed.

    Raises:
        BayesLoraError: another width, bytes of another number, or bytes that `pack` cannot have written.
    """
    count = math.prod(shape)
    if len(data) != packed_size(count, bits):
        raise BayesLoraError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, not {len(data)}: data are damaged"
        )
    if bits == UNQUANTIZED:
        return _of_bytes(data, torch.float32).reshape(shape)
    if bits < 8:
        sign = 1 << (bits - 1)
        fields = ((data.unsqueeze(1) >> _shifts(bits).to(torch.uint8)) & ((1 << bits) - 1)).reshape(-1)
        if fields[count:].any():
            raise BayesLoraError(f"the last byte of {count} codes of {bits} bits is not padded: the data are damaged")
        found = (fields[:count].to(torch.int8) ^ sign) - sign
    else:
        found = _of_bytes(data, torch.int8 if bits == 8 else torch.int16)
    if count and int(found.min()) == -(1 << (bits - 1)):
        raise BayesLoraError(f"{int(found.min())} is no code of {bits} bits: the data are damaged")
    return found.reshape(shape)


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise BayesLoraError(f"a width is one of {', '.join(map(str, WIDTHS))} bits, not {bits}")


def _shifts(bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.int32)


def _bytes_of(flat: Tensor) -> Tensor:
    found = flat.contiguous().view(torch.uint8).clone()
    return found if sys.byteorder == "little" else _swapped(found, flat.element_size())


def _of_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    aligned = data.clone() if sys.byteorder == "little" else _swapped(data, size)
    return aligned.view(dtype)


def _swapped(data: Tensor, size: int) -> Tensor:
    return data.view(-1, size).flip(1).reshape(-1)
