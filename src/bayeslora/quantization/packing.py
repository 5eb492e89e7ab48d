"""Codes as bytes.

Codes are stored in two's complement, row by row, the first in the lowest bits of the first byte; unused bits of the
last byte are zero. Numbers of several bytes are little-endian, as everywhere in safetensors. A width of 32 bits
means float32 values, because a quantizer of that width rounds nothing. Grids are symmetric, so two's complement's
lowest code, -2^(b-1), is never valid.
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
    """Return the number of bytes of `count` codes of `bits` bits."""
    _check_width(bits)
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return the bytes (uint8, one-dimensional) of `codes`.

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
            f"a code is ±{int(flat.abs().max())}, but codes of {bits} bits must be within ±{level}: use more bits"
        )
    if bits >= 8:
        return _bytes_of(flat.to(torch.int8 if bits == 8 else torch.int16))
    fields = flat.to(torch.int32) & ((1 << bits) - 1)
    share = 8 // bits
    padded = torch.zeros(packed_size(len(flat), bits) * share, dtype=torch.int32)
    padded[: len(flat)] = fields
    return (padded.view(-1, share) << _shifts(bits)).sum(1).to(torch.uint8)


def unpack(data: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Return the codes that `data` holds: int8 up to 8 bits, int16 for 16 bits, and float32 numbers for 32.

    Args:
        data: uint8, one-dimensional, of exactly `packed_size` bytes.
        bits: one of `WIDTHS`.
        shape: shape of the packed tensor.

    Raises:
        BayesLoraError: another width, another number of bytes, or bytes that `pack` cannot have written.
    """
    count = math.prod(shape)
    if len(data) != packed_size(count, bits):
        raise BayesLoraError(
            f"the data have {len(data)} bytes, but {count} codes of {bits} bits take {packed_size(count, bits)}: "
            "export them again"
        )
    if bits == UNQUANTIZED:
        return _of_bytes(data, torch.float32).reshape(shape)
    if bits < 8:
        sign = 1 << (bits - 1)
        fields = ((data.unsqueeze(1) >> _shifts(bits).to(torch.uint8)) & ((1 << bits) - 1)).reshape(-1)
        if fields[count:].any():
            raise BayesLoraError(
                f"the data are damaged (the last byte of {count} codes of {bits} bits is not padded): "
                "export them again"
            )
        found = (fields[:count].to(torch.int8) ^ sign) - sign
    else:
        found = _of_bytes(data, torch.int8 if bits == 8 else torch.int16)
    if count and int(found.min()) == -(1 << (bits - 1)):
        raise BayesLoraError(
            f"the data are damaged ({int(found.min())} is not a code of {bits} bits): export them again"
        )
    return found.reshape(shape)


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise BayesLoraError(f"the width is {bits}, but must be one of {', '.join(map(str, WIDTHS))} bits: choose one")


def _shifts(bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.int32)


def _bytes_of(flat: Tensor) -> Tensor:
    found = flat.contiguous().view(torch.uint8).clone()
    return found if sys.byteorder == "little" else _swapped(found, flat.element_size())


def _of_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    aligned = data.clone() if sys.byteorder == "little" else _swapped(data, dtype.itemsize)
    return aligned.view(dtype)


def _swapped(data: Tensor, size: int) -> Tensor:
    return data.view(-1, size).flip(1).reshape(-1)
