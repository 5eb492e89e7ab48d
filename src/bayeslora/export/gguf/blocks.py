r"""Weights as blocks of codes with one scale in half precision.

| type | bits | block | code |
|---|---:|---:|---|
| `Q8_0` | 8 | 32 | -127 … 127 |
| `Q4_0` | 4 | 32 | -7 … 7 of its -8 … 7 |
| `TQ2_0` | 2 | 256 | -1, 0, 1 |

A learned weight is $c \cdot s$ with integer codes $c$ and one step $s$ for the tensor, for a row, or for a group of
whole blocks in a row. So each block has the scale $s$ of its group, and the codes stay as they are. Rounding $s$ to
half precision multiplies a block by $1 + \delta$ with $|\delta| \le 2^{-11}$, and that is the only loss.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCKS = {Type.TQ2_0: (2, 256), Type.Q4_0: (4, 32), Type.Q8_0: (8, 32)}
"""Bits and entries of the blocks of each type with codes, the narrowest first."""


def block_type(bits: int, columns: int) -> Type | None:
    """Return the narrowest type that holds codes of `bits` bits in rows of `columns` entries; None without one."""
    return next((kind for kind, (wide, size) in BLOCKS.items() if bits <= wide and columns % size == 0), None)


def are_steps_exact(steps: Array) -> bool:
    """Return whether half precision holds the steps to one part in 2,048, as it does for those from 6e-5 to 65504."""
    with np.errstate(over="ignore"):
        return bool((np.abs(steps.astype(np.float16).astype(np.float32) - steps) <= 2.0**-11 * steps).all())


def repeated(steps: Array, columns: int) -> Array:
    """Return the steps (rows, groups) of equal groups for each of so many columns, or blocks of columns."""
    return np.repeat(steps, columns // steps.shape[1], axis=1)


def packed(codes: Array, steps: Array, kind: Type) -> Array:
    """Return the bytes (rows, bytes) of codes.

    Args:
        codes: (rows, columns), int8, within the type's range.
        steps: (rows, groups), float32, of groups of whole blocks.
        kind: a key of `BLOCKS`.
    """
    rows, columns = codes.shape
    blocks = codes.reshape(rows, columns // BLOCKS[kind][1], -1)
    scale = repeated(steps.astype(np.float16), blocks.shape[1])[:, :, None].view(np.uint8)
    if kind == Type.Q8_0:
        parts: list[Array] = [scale, blocks.view(np.uint8)]
    elif kind == Type.Q4_0:
        low, high = np.split((blocks + 8).astype(np.uint8), 2, axis=2)
        parts = [scale, low | high << 4]
    else:
        # Bit pairs of a byte are entries 32 apart: (…, half, place of the pair, 32).
        pairs = (blocks + 1).astype(np.uint8).reshape(*blocks.shape[:2], 2, 4, 32)
        shifted = pairs << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
        parts = [np.bitwise_or.reduce(shifted, axis=3).reshape(*blocks.shape[:2], 64), scale]
    return np.ascontiguousarray(np.concatenate(parts, axis=2).reshape(rows, -1))


def rounded(values: Array, kind: Type) -> Array:
    """Return values (rows, columns) as `kind`: a type of codes rounds each block anew, by its largest magnitude."""
    return np.asarray(gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), kind))
