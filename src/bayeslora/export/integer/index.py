"""The index of an integer model, `integer.json`: which layers are codes, at which widths and in which ranges.

| field | |
|---|---|
| `version` | of this format, 1 |
| `architecture` | the model's class in Transformers, such as `LlamaForCausalLM` |
| `linear` | by path the fields of an `IntegerLayer`; `shape` is d_out and d_in |
| `embeddings` | by path the same of an embedding; `shape` is rows and width, with 8 bits and a range a row |
| `shared` | by path of a parameter: the path under which its tensor is stored |

Kinds are those of a packed adapter. A range is one number, or where `per_channel` names the kind, a vector with the
codes. The codes of a layer are one tensor of bytes, `<path>.codes`: the base weight row by row, A, E and B, each at
its width and beginning at a whole byte, then in float32 the vectors of ranges and the bias.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayeslora.export.container import INTEGER, LOG_LIMIT, Part, is_size
from bayeslora.vocabulary import ALL_KINDS, BASE_WEIGHT, MATRICES, UNQUANTIZED, WIDTHS

INDEX_FILE = "integer.json"
BIAS = "bias"

_PER_CHANNEL: tuple[list[str], ...] = ([], [BASE_WEIGHT], ["A"], [BASE_WEIGHT, "A"])
_MAX_LAYERS, _MAX_NAME, _MAX_NUMBER = 20_000, 1_000, 1 << 31
_SMALLEST, _LARGEST = math.exp(-LOG_LIMIT) / 2, math.exp(LOG_LIMIT) * 2
_DEFAULTS: dict[str, Any] = {
    "ranges": {},
    "per_channel": [],
    "rank": 0,
    "scaling": 1.0,
    "bias": False,
    "learned": False,
    "tied_to": None,
}
"""Fields of a layer that `integer.json` leaves out at these values."""


def is_integer_model(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder that `export` wrote with `format="integer"`."""
    return (Path(path) / INDEX_FILE).is_file()


@dataclass(frozen=True)
class IntegerLayer:
    """A linear layer or an embedding on codes.

    Attributes:
        name: path in the model.
        out_features, in_features: d_out and d_in; rows and width of an embedding.
        bits: width by kind; other kinds are not quantized, or the layer does not have them.
        ranges: range by kind below 32 bits, except those of `per_channel`.
        per_channel: kinds with a range a row.
        rank, scaling: of the adapter; rank 0 without one.
        bias: whether the layer has one.
        learned: whether the widths were learned.
        tied_to: path of the embedding whose codes these are, or None.
    """

    name: str
    out_features: int
    in_features: int
    bits: dict[str, int]
    ranges: dict[str, float] = field(default_factory=dict)
    per_channel: tuple[str, ...] = ()
    rank: int = 0
    scaling: float = 1.0
    bias: bool = False
    learned: bool = False
    tied_to: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """d_out and d_in."""
        return self.out_features, self.in_features

    def parts(self) -> list[Part]:
        """Return the parts of the layer's bytes, in order."""
        shapes: dict[str, tuple[int, ...]] = {
            BASE_WEIGHT: self.shape,
            "A": (self.rank, self.in_features),
            "E": (self.rank,),
            "B": (self.out_features, self.rank),
        }
        wanted = () if self.tied_to else (BASE_WEIGHT, *MATRICES) if self.rank else (BASE_WEIGHT,)
        found = [Part(kind, self.bits[kind], shapes[kind]) for kind in wanted]
        vectors = [kind for kind in self.per_channel if kind in wanted and self.bits[kind] < UNQUANTIZED]
        found += [Part(kind, UNQUANTIZED, (shapes[kind][0],), True) for kind in vectors]
        return [*found, Part(BIAS, UNQUANTIZED, (self.out_features,))] if self.bias else found

    def to_json(self) -> dict[str, Any]:
        """Return the layer's entry in `integer.json`."""
        values = {**vars(self), "per_channel": list(self.per_channel)}
        given = {key: values[key] for key, default in _DEFAULTS.items() if values[key] != default}
        return {"shape": list(self.shape), "bits": self.bits, **given}


@dataclass
class IntegerIndex:
    """The whole of `integer.json`."""

    architecture: str
    linear: dict[str, IntegerLayer] = field(default_factory=dict)
    embeddings: dict[str, IntegerLayer] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)

    def to_text(self) -> str:
        content = {
            "version": INTEGER.version,
            "architecture": self.architecture,
            "linear": {name: layer.to_json() for name, layer in self.linear.items()},
            "embeddings": {name: layer.to_json() for name, layer in self.embeddings.items()},
            "shared": self.shared,
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: str | bytes) -> IntegerIndex:
        """Read and check `integer.json`; nothing in it is trusted.

        Raises:
            BayesLoraError: for anything that this library does not write.
        """
        content = INTEGER.read_object(text, "its index")
        INTEGER.check_version(content)
        wanted = {"version", "architecture", "linear", "embeddings", "shared"}
        if set(content) != wanted:
            INTEGER.damaged(f"its index has other fields than {', '.join(sorted(wanted))}")
        linear, embeddings = _layers(content, "linear"), _layers(content, "embeddings")
        shared = content["shared"]
        if not isinstance(shared, dict) or not all(_name(key) and _name(value) for key, value in shared.items()):
            INTEGER.damaged("its shared tensors are not a table of paths")
        for layer in linear.values():
            if layer.tied_to is not None:
                source = embeddings.get(layer.tied_to)
                if source is None or source.shape != layer.shape:
                    INTEGER.damaged(f"{layer.name:.80} shares the codes of no embedding of its shape")
        for layer in embeddings.values():
            if layer.bits != {BASE_WEIGHT: 8} or layer.per_channel != (BASE_WEIGHT,) or layer.bias or layer.rank:
                INTEGER.damaged(f"{layer.name:.80} is not an embedding of 8 bits")
        return cls(_name(content["architecture"]), linear, embeddings, shared)


def _layers(content: dict[str, Any], part: str) -> dict[str, IntegerLayer]:
    if not isinstance(content[part], dict) or len(content[part]) > _MAX_LAYERS:
        INTEGER.damaged(f"its {part} layers are not a table")
    return {_name(name): _layer(name, entry) for name, entry in content[part].items()}


def _layer(name: str, entry: Any) -> IntegerLayer:
    """Return a checked layer of the index."""
    required = {"shape", "bits"}
    if not isinstance(entry, dict) or not required <= set(entry) <= required | set(_DEFAULTS):
        INTEGER.damaged(f"{name:.80} has unknown fields, or lacks some")
    values = {**_DEFAULTS, **entry}
    _check_fields(name, values)
    _check_widths(name, values)
    shape, ranges, tied_to = values["shape"], values["ranges"], values["tied_to"]
    return IntegerLayer(
        name,
        out_features=shape[0],
        in_features=shape[1],
        bits=values["bits"],
        ranges={kind: float(bound) for kind, bound in ranges.items()},
        per_channel=tuple(values["per_channel"]),
        rank=values["rank"],
        scaling=float(values["scaling"]),
        bias=values["bias"],
        learned=values["learned"],
        tied_to=None if tied_to is None else _name(tied_to),
    )


def _check_fields(name: str, values: dict[str, Any]) -> None:
    shape, rank, scaling = values["shape"], values["rank"], values["scaling"]
    if type(shape) is not list or len(shape) != 2 or not all(is_size(size) and size > 0 for size in shape):
        INTEGER.damaged(f"{name:.80} does not have a shape of two sizes")
    if values["per_channel"] not in _PER_CHANNEL:
        INTEGER.damaged(f"{name:.80} has per-channel kinds {values['per_channel']!r:.60}")
    if not is_size(rank) or not _is_number(scaling):
        INTEGER.damaged(f"{name:.80} has rank {rank!r:.40} and scaling {scaling!r:.40}")
    if type(values["bias"]) is not bool or type(values["learned"]) is not bool:
        INTEGER.damaged(f"{name:.80} has a flag that is neither true nor false")


def _check_widths(name: str, values: dict[str, Any]) -> None:
    """Check that widths and ranges are usable and belong together."""
    bits, ranges, rank, tied_to = values["bits"], values["ranges"], values["rank"], values["tied_to"]
    if not isinstance(bits, dict) or not all(
        kind in ALL_KINDS and type(width) is int and width in WIDTHS for kind, width in bits.items()
    ):
        INTEGER.damaged(f"{name:.80} has widths other than {', '.join(map(str, WIDTHS))} bits")
    needed = set() if tied_to is not None else {BASE_WEIGHT, *MATRICES} if rank else {BASE_WEIGHT}
    if not needed <= set(bits):
        INTEGER.damaged(f"{name:.80} lacks a width")
    narrow = {kind for kind, width in bits.items() if width < UNQUANTIZED} - set(values["per_channel"])
    if not rank:
        narrow -= set(MATRICES)
    if not isinstance(ranges, dict) or set(ranges) != narrow:
        INTEGER.damaged(f"{name:.80} has other ranges than widths")
    if not all(_is_number(bound) and _SMALLEST <= bound <= _LARGEST for bound in ranges.values()):
        INTEGER.damaged(f"{name:.80} has a range that is not finite, positive and of a usable size")
    if tied_to is not None and (rank or bits):
        INTEGER.damaged(f"{name:.80} shares codes, but has others as well")


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME or not value.isprintable():
        INTEGER.damaged("a name in it cannot be read")
    return value


def _is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value) or type(value) is int and abs(value) < _MAX_NUMBER
