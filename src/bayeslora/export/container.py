"""The safetensors files of packed adapters and integer models, which are read as untrusted input.

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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayeslora.errors import BayesLoraError, one_line
from bayeslora.quantization.packing import packed_size, unpack
from bayeslora.vocabulary import BASE_WEIGHT

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
