"""The safetensors file of a packed adapter, read without trust: everything is checked before anything is allocated.

`safetensors` itself checks offsets and shapes, but reports a damaged file by exceptions of its own and knows nothing
of a checksum. Here a file is at most the sum of its parts: a header of bounded length that describes tensors which
fill the rest without gaps or overlaps, and a checksum over names, types, shapes, index and data.
"""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.export.file_format import PACKED, Format

INDEX_KEY = "bayeslora.packed"
CHECKSUM_KEY = "bayeslora.crc32"
CODES = "bayeslora.codes"
"""Name of the tensor of bytes that has all codes."""

MAX_HEADER = 16 << 20
_PROBE = 1 << 20
_MAX_DIMENSIONS = 8
_LARGEST = 1 << 40

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


@dataclass(frozen=True)
class Entry:
    """A tensor of the header: `begin` and `end` are bytes of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass
class PackedFile:
    """What a packed file holds: the text of its index and its tensors by name."""

    index: str
    tensors: dict[str, Tensor]


def looks_packed(path: str | os.PathLike[str]) -> bool:
    """Whether the first bytes of `path` are those of a packed adapter, intact or with a name or two destroyed."""
    try:
        with open(path, "rb") as file:
            start = file.read(_PROBE)
            return any(key.encode() in start for key in (INDEX_KEY, CHECKSUM_KEY, CODES))
    except OSError:
        return False


def read_packed_file(path: Path, form: Format = PACKED) -> PackedFile:
    """The file at `path`, which is called what `form` says; memory is bounded by the file's size.

    Raises:
        BayesLoraError: a file that is missing, cut short, changed, or not of a packed adapter.
    """
    if not path.is_file():  # a pipe or a device would never end
        raise BayesLoraError(
            f"{path} is missing or no file: name a folder that was exported with format={form.export!r}"
        )
    try:
        with open(path, "rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size, form)
    except OSError as error:
        raise BayesLoraError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def checksum(index: str, tensors: dict[str, Tensor]) -> str:
    """CRC-32, eight hexadecimal digits, of the index and of every tensor with its name, type and shape."""
    total = zlib.crc32(index.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"\n{name} {_NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _read(file: BinaryIO, size: int, form: Format) -> PackedFile:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        form.damaged(f"it has {size} bytes and is cut short")
    if length > MAX_HEADER:
        form.damaged(f"its header has {length} bytes, more than {MAX_HEADER}")
    header = form.read_object(file.read(length), "its header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(index := metadata.get(INDEX_KEY), str):
        raise BayesLoraError(f"it is no {form.name}, or its index is damaged: export it with format={form.export!r}")
    if set(metadata) != {"format", INDEX_KEY, CHECKSUM_KEY} or metadata["format"] != "pt":
        form.damaged(f"its metadata are not those of a {form.name}")
    entries = sorted(
        (_entry(name, value, form) for name, value in header.items()), key=lambda entry: (entry.begin, entry.end)
    )
    position = 0
    for entry in entries:
        if entry.begin != position:
            form.damaged("its tensors overlap or leave a gap")
        position = entry.end
    if position != size - 8 - length:
        form.damaged(f"its tensors take {position} bytes, and {size - 8 - length} are there")
    tensors = {entry.name: _tensor(file, entry, form) for entry in entries}
    if metadata.get(CHECKSUM_KEY) != checksum(index, tensors):
        form.damaged("its checksum is another one")
    return PackedFile(index, tensors)


def _entry(name: str, value: Any, form: Format) -> Entry:
    """One tensor of the header, checked."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        form.damaged("its header does not describe tensors")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        form.damaged("a tensor has an unknown type")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        form.damaged("a tensor's shape or place is no list of sizes")
    if math.prod(size or 1 for size in shape) >= _LARGEST:
        form.damaged("a tensor is larger than any file")
    if math.prod(shape) * DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        form.damaged("a tensor's shape does not fit its bytes")
    return Entry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _LARGEST for value in values)


def _tensor(file: BinaryIO, entry: Entry, form: Format) -> Tensor:
    dtype = DTYPES[entry.dtype]
    if entry.begin == entry.end:
        return torch.zeros(entry.shape, dtype=dtype)
    data = bytearray(entry.end - entry.begin)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        form.damaged("it is cut short")
    if dtype == torch.bool and any(byte > 1 for byte in data):
        form.damaged("a truth value is neither 0 nor 1")
    return torch.frombuffer(data, dtype=dtype).reshape(entry.shape)
