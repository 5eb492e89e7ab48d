"""Packed codes, and the safetensors files of packed adapters and integer models, which are read as untrusted input.

Codes are stored in two's complement, row by row, the first in the lowest bits of the first byte; unused bits of the
last byte are zero. Numbers of several bytes are little-endian, as everywhere in safetensors. A width of 32 bits
means float32 values, because a quantizer of that width rounds nothing. Grids are symmetric, so two's complement's
lowest code, -2^(b-1), is never valid.

safetensors checks that the tensors in a file's header cover its data without gaps or overlaps. These files also have
an index in the metadata and a CRC-32 over names, types, shapes, index and data.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayeslora.errors import BayesLoraError, one_line
from bayeslora.vocabulary import BASE_WEIGHT, UNQUANTIZED, WIDTHS

INDEX_KEY = "bayeslora.packed"
CHECKSUM_KEY = "bayeslora.crc32"
CODES = "bayeslora.codes"
"""Name of the tensor of bytes that holds all codes of a packed adapter."""

LOG_LIMIT = 20.0
"""Largest magnitude of a range's logarithm; quantizers clamp theirs to it."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PROBE = 1 << 20  # bytes that `looks_packed` searches
_MAX_DIMENSIONS = 8
_MAX_NAME = 1_000
_LARGEST_SIZE = 1 << 31

MAX_INDEX = 16 << 20
"""Largest number of bytes of an index."""

MAX_LAYERS = 20_000
PER_CHANNEL: tuple[list[str], ...] = ([], [BASE_WEIGHT], ["A"], [BASE_WEIGHT, "A"])
"""Lists of kinds that a file can store with one range per channel."""


@dataclass(frozen=True)
class FileFormat:
    """A file format that is read as untrusted input.

    Attributes:
        name: name of such a file in errors, as in `the packed adapter is damaged`.
        export: the `format` of `export` that writes it.
        version: the version that this library reads and writes.
    """

    name: str
    export: str
    version: int

    def damaged(self, reason: str) -> NoReturn:
        """Raise `BayesLoraError` for a damaged file."""
        raise BayesLoraError(f"the {self.name} is damaged ({reason}): export it again or restore it from a copy")

    def read_object(self, text: str | bytes, what: str) -> dict[str, Any]:
        """Return the JSON object in `text`; raise for anything else, repeated keys and NaN."""
        try:
            content = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            self.damaged(f"{what} is not valid JSON")
        if not isinstance(content, dict):
            self.damaged(f"{what} is not a JSON object")
        return content

    def check_version(self, content: dict[str, Any]) -> None:
        """Raise `BayesLoraError` unless `content` has this version."""
        version = content.get("version")
        if type(version) is int and version > self.version:
            raise BayesLoraError(
                f"the {self.name} has format version {version}, but this library reads {self.version}: "
                "update bayeslora"
            )
        if type(version) is not int or version != self.version:
            self.damaged(f"its version is {version!r:.40}, not {self.version}")


PACKED = FileFormat("packed adapter", "packed", 1)
INTEGER = FileFormat("integer model", "integer", 1)


@dataclass(frozen=True)
class Part:
    """A section of a layer's bytes: codes, float32 values, or one range per row (`is_range`)."""

    kind: str
    bits: int
    shape: tuple[int, ...]
    is_range: bool = False

    @property
    def size(self) -> int:
        """Number of bytes."""
        return packed_size(math.prod(self.shape), self.bits)


Parts = dict[tuple[str, bool], Tensor]
"""The tensors of a layer, by kind and `is_range`."""


def split(data: Tensor, parts: Sequence[Part]) -> Parts:
    """Unpack the bytes of `parts`, which follow each other in `data`."""
    found: Parts = {}
    start = 0
    for part in parts:
        found[part.kind, part.is_range] = unpack(data[start : start + part.size], part.bits, part.shape)
        start += part.size
    return found


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
        return _of_bytes(data, "f4").reshape(shape)
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
        found = _of_bytes(data, "i1" if bits == 8 else "i2")
    if count and int(found.min()) == -(1 << (bits - 1)):
        raise BayesLoraError(
            f"the data are damaged ({int(found.min())} is not a code of {bits} bits): export them again"
        )
    return found.reshape(shape)


def looks_packed(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` begins like a packed adapter, even if one or two of its keys are damaged."""
    try:
        with open(path, "rb") as file:
            start = file.read(_PROBE)
            return any(key.encode() in start for key in (INDEX_KEY, CHECKSUM_KEY, CODES))
    except OSError:
        return False


def write_container(path: Path, index: str, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` with the text of their index and a checksum of both."""
    metadata = {"format": "pt", INDEX_KEY: index, CHECKSUM_KEY: checksum(index, tensors)}
    save_file(tensors, path, metadata=metadata)


def read_container(path: Path, form: FileFormat) -> tuple[str, dict[str, Tensor]]:
    """Return the index and the tensors of the file at `path`; memory is bounded by the file's size.

    Raises:
        BayesLoraError: a file that is missing, cut short, changed, or of another kind than `form`.
    """
    if not path.is_file():  # reading a pipe or a device might never end
        raise BayesLoraError(
            f"{path} is missing or not a file: name a folder that was exported with format={form.export!r}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if INDEX_KEY not in metadata:
                raise BayesLoraError(
                    f"{path} is not a {form.name}, or its index is damaged: export it with format={form.export!r}"
                )
            if set(metadata) != {"format", INDEX_KEY, CHECKSUM_KEY} or metadata["format"] != "pt":
                form.damaged(f"its metadata do not belong to a {form.name}")
            tensors = {name: _checked(file, name, form) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise BayesLoraError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    except (SafetensorError, RuntimeError, OverflowError, TypeError) as error:
        form.damaged(one_line(error)[:120])
    if metadata[CHECKSUM_KEY] != checksum(metadata[INDEX_KEY], tensors):
        form.damaged("its checksum does not match")
    return metadata[INDEX_KEY], tensors


def checksum(index: str, tensors: dict[str, Tensor]) -> str:
    """Return a CRC-32 (8 hexadecimal digits) over the index and every tensor's name, type, shape and data."""
    total = zlib.crc32(index.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"\n{name} {_NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def check_ranges(logarithms: Tensor, form: FileFormat) -> Tensor:
    """Return the logarithms of ranges unchanged; raise if one is not finite or its range is unusable."""
    if not bool((logarithms.abs() <= LOG_LIMIT).all()):  # NaN compares false
        form.damaged("a range is not finite, positive and of a usable size")
    return logarithms


def is_size(value: Any) -> bool:
    """Return whether `value` is an integer of at least 0 that a dimension can have."""
    return type(value) is int and 0 <= value < _LARGEST_SIZE


def is_shape(value: Any) -> bool:
    """Return whether `value` is a list of two positive sizes."""
    return type(value) is list and len(value) == 2 and all(is_size(size) and size > 0 for size in value)


def is_name(value: Any) -> bool:
    """Return whether `value` is a printable string of a usable length."""
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME and value.isprintable()


def _checked(file: Any, name: str, form: FileFormat) -> Tensor:
    """Return a copy of one tensor of the file."""
    described = file.get_slice(name)
    if described.get_dtype() not in DTYPES or len(described.get_shape()) > _MAX_DIMENSIONS:
        form.damaged("a tensor has an unknown type or too many dimensions")
    tensor: Tensor = file.get_tensor(name).clone()
    if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
        form.damaged("a Boolean is neither 0 nor 1")
    return tensor


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _check_width(bits: int) -> None:
    if bits not in WIDTHS:
        raise BayesLoraError(f"the width is {bits}, but must be one of {', '.join(map(str, WIDTHS))} bits: choose one")


def _shifts(bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.int32)


def _bytes_of(flat: Tensor) -> Tensor:
    values = flat.numpy()
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("<")).view(np.uint8))


def _of_bytes(data: Tensor, kind: str) -> Tensor:
    return torch.from_numpy(data.numpy().view(f"<{kind}").astype(kind))
