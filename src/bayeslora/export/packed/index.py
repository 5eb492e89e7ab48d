"""The index of a packed adapter: its layers, their shapes and widths, and with these the places of their codes.

One JSON object in the metadata of `adapter_model.safetensors`, a column a property, deflated (zlib) and in base 85. So
a layer with eight quantizers costs about fifty bytes; a tensor for it in the header would cost a hundred.

| field | |
|---|---|
| `version` | of this format, 1 |
| `method` | of the adapter, such as `blora` |
| `layers` | paths of the layers that have codes, each as `<characters shared with the one before>:<the rest>` |
| `ranks` | rank of each layer |
| `shapes`, `shape` | the distinct pairs of d_in and d_out, and which of them each layer has |
| `widths` | of each layer a digit a kind, in the order of `ALL_KINDS`: log2 of its bits, 0 without a quantizer |
| `bit_gates`, `rank_gates` | whether the adapter has quantizers and rank gates |
| `per_channel` | kinds with a range a channel |
| `ranges` | base64 of float32: logarithms of the other ranges, layer by layer, of kinds below 32 bits |

The codes follow layer by layer, without gaps, in one tensor of bytes: A (r, d_in), E (r,) and B (d_out, r), each at
its width and beginning at a whole byte, then the logarithms of the layer's per-channel ranges in float32. Positions
are computed from shapes and widths, so none is written down and none can be wrong.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayeslora.export.container import PACKED, Part, check_ranges, is_size
from bayeslora.vocabulary import ALL_KINDS, BASE_WEIGHT, MATRICES, UNQUANTIZED, WIDTHS

_MAX_INDEX = 16 << 20
_MAX_LAYERS, _MAX_NAME = 20_000, 1_000
_PER_CHANNEL = (BASE_WEIGHT, "A")


@dataclass(frozen=True)
class PackedLayer:
    """One layer of the index; `widths` has the matrices and the kinds with a quantizer, as `ALL_KINDS` orders them."""

    name: str
    rank: int
    in_features: int
    out_features: int
    widths: dict[str, int]

    def shape_of(self, kind: str) -> tuple[int, ...]:
        """Return the shape of a matrix."""
        return {"A": (self.rank, self.in_features), "E": (self.rank,), "B": (self.out_features, self.rank)}[kind]

    def channels(self, kind: str) -> int:
        """Return the length of a per-channel range of `kind`."""
        return self.out_features if kind == BASE_WEIGHT else self.rank

    def parts(self, per_channel: Sequence[str]) -> list[Part]:
        """Return the parts of the layer's bytes, in order."""
        matrices = [Part(kind, self.widths[kind], self.shape_of(kind)) for kind in MATRICES]
        vectors = [kind for kind in per_channel if self.widths.get(kind, UNQUANTIZED) < UNQUANTIZED]
        return matrices + [Part(kind, UNQUANTIZED, (self.channels(kind),), True) for kind in vectors]

    def scalar_ranges(self, per_channel: Sequence[str]) -> list[str]:
        """Return the kinds whose range is one number of the index."""
        return [kind for kind, bits in self.widths.items() if bits < UNQUANTIZED and kind not in per_channel]


@dataclass
class PackedIndex:
    """The whole index; `ranges` (float32) are the logarithms of the scalar ranges, layer by layer."""

    method: str
    layers: list[PackedLayer] = field(default_factory=list)
    bit_gates: bool = False
    rank_gates: bool = False
    per_channel: tuple[str, ...] = ()
    ranges: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def buffer_size(self) -> int:
        """Number of bytes of the codes and per-channel ranges of all layers."""
        return sum(part.size for layer in self.layers for part in layer.parts(self.per_channel))

    def to_text(self) -> str:
        shapes = [(layer.in_features, layer.out_features) for layer in self.layers]
        distinct = list(dict.fromkeys(shapes))
        content = {
            "version": PACKED.version,
            "method": self.method,
            "layers": _front_coded([layer.name for layer in self.layers]),
            "ranks": [layer.rank for layer in self.layers],
            "shapes": distinct,
            "shape": [distinct.index(shape) for shape in shapes],
            "widths": "".join(_digits(layer.widths) for layer in self.layers),
            "bit_gates": self.bit_gates,
            "rank_gates": self.rank_gates,
            "per_channel": self.per_channel,
            "ranges": base64.b64encode(self.ranges.numpy().astype("<f4").tobytes()).decode(),
        }
        return base64.b85encode(zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)).decode()

    @classmethod
    def from_text(cls, text: str) -> PackedIndex:
        """Read and check an index; nothing in it is trusted.

        Raises:
            BayesLoraError: for anything that this library does not write.
        """
        content = PACKED.read_object(_inflated(text), "the index")
        PACKED.check_version(content)
        names = _names(_get(content, "layers", list))
        count = len(names)
        ranks = _sizes(content, "ranks", count)
        which = _sizes(content, "shape", count)
        shapes = [_pair(pair) for pair in _get(content, "shapes", list)[: count + 1]]
        if len(shapes) > count or any(index >= len(shapes) for index in which):
            PACKED.damaged("its shapes do not fit its layers")
        digits = _get(content, "widths", str)
        if len(digits) != count * len(ALL_KINDS):
            PACKED.damaged(f"it has {len(digits)} widths for {count} layers of {len(ALL_KINDS)}")
        bit_gates, rank_gates = _get(content, "bit_gates", bool), _get(content, "rank_gates", bool)
        rows = [digits[start : start + len(ALL_KINDS)] for start in range(0, len(digits), len(ALL_KINDS))]
        layers = [
            PackedLayer(name, rank, *shapes[index], _widths(row, bit_gates))
            for name, rank, index, row in zip(names, ranks, which, rows, strict=True)
        ]
        per_channel = _get(content, "per_channel", list)
        if per_channel not in ([], [BASE_WEIGHT], ["A"], list(_PER_CHANNEL)):
            PACKED.damaged(f"its per-channel kinds are {per_channel!r:.60}")
        index = cls(_get(content, "method", str), layers, bit_gates, rank_gates, tuple(per_channel))
        index.ranges = _ranges(_get(content, "ranges", str), index)
        return index


def _inflated(text: str) -> bytes:
    """Return the JSON in `text`, which never unfolds to more than `_MAX_INDEX` bytes."""
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(base64.b85decode(text), _MAX_INDEX)
    except (ValueError, zlib.error):
        PACKED.damaged("the index cannot be inflated")
    if not unpacker.eof or unpacker.unused_data:
        PACKED.damaged("the index is cut short, or larger than any")
    return found


def _get(content: dict[str, Any], key: str, kind: type) -> Any:
    value = content.get(key)
    if type(value) is not kind:
        PACKED.damaged(f"its {key} is {'missing' if value is None else type(value).__name__}")
    return value


def _sizes(content: dict[str, Any], key: str, count: int) -> list[int]:
    values = _get(content, key, list)
    if len(values) != count or not all(is_size(value) for value in values):
        PACKED.damaged(f"its {key} are not {count} numbers from 0 on")
    return values


def _pair(value: Any) -> tuple[int, int]:
    if type(value) is not list or len(value) != 2 or not all(is_size(size) and size > 0 for size in value):
        PACKED.damaged("a shape is not a pair of sizes")
    return value[0], value[1]


def _digits(widths: dict[str, int]) -> str:
    return "".join(str(widths[kind].bit_length() - 1 if kind in widths else 0) for kind in ALL_KINDS)


def _widths(digits: str, bit_gates: bool) -> dict[str, int]:
    if any(digit not in "012345" for digit in digits):
        PACKED.damaged(f"its widths {digits!r} are not log2 of {', '.join(map(str, WIDTHS))} bits")
    widths = {kind: 1 << int(digit) for kind, digit in zip(ALL_KINDS, digits, strict=True) if digit != "0"}
    wanted = set(ALL_KINDS) - {BASE_WEIGHT, "in"} if bit_gates else set(MATRICES)
    allowed = set(ALL_KINDS) if bit_gates else wanted
    if not wanted <= set(widths) <= allowed or not bit_gates and set(widths.values()) != {UNQUANTIZED}:
        PACKED.damaged(
            f"its widths {digits!r} are not those of {'a quantized' if bit_gates else 'an unquantized'} layer"
        )
    return widths


def _ranges(text: str, index: PackedIndex) -> Tensor:
    count = sum(len(layer.scalar_ranges(index.per_channel)) for layer in index.layers)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        PACKED.damaged("its ranges are not base64")
    if len(data) != 4 * count:
        PACKED.damaged(f"it has {len(data)} bytes of ranges for {count} quantizers")
    if not data:
        return torch.zeros(0)
    return check_ranges(torch.frombuffer(bytearray(data), dtype=torch.float32), PACKED)


def _front_coded(names: list[str]) -> list[str]:
    coded, before = [], ""
    for name in names:
        shared = len(os.path.commonprefix([before, name]))
        coded.append(f"{shared}:{name[shared:]}")
        before = name
    return coded


def _names(coded: list[Any]) -> list[str]:
    if len(coded) > _MAX_LAYERS:
        PACKED.damaged(f"it has {len(coded)} layers")
    names: list[str] = []
    for entry in coded:
        shared, colon, rest = entry.partition(":") if isinstance(entry, str) else ("", "", "")
        before = names[-1] if names else ""
        if not colon or not (shared.isascii() and shared.isdigit()) or len(shared) > 4 or int(shared) > len(before):
            PACKED.damaged("a layer's name cannot be read")
        names.append(before[: int(shared)] + rest)
        if not names[-1] or len(names[-1]) > _MAX_NAME or not names[-1].isprintable():
            PACKED.damaged("a layer's name cannot be read")
    if len(set(names)) < len(names):
        PACKED.damaged("a layer is there twice")
    return names
