"""The index of an integer model, `integer.json`: the layers of codes with their widths and ranges.

| field | |
|---|---|
| `version` | version of this format, 1 |
| `architecture` | the model's class in Transformers, such as `LlamaForCausalLM` |
| `linear` | the fields of an `IntegerLayer` by path; `shape` is d_out and d_in |
| `embeddings` | the same for embeddings; `shape` is rows and width, with 8 bits and one range per row |
| `shared` | by path of a parameter: the path under which its tensor is stored |

Kinds are those of a packed adapter. A range is one number, or a vector stored with the codes if `per_channel` names
the kind. A layer's codes are one tensor of bytes, `<path>.codes`: the base weight row by row, A, E and B, each at its
width and starting at a whole byte, then in float32 the vectors of ranges and the bias.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayeslora.export.container import INTEGER, LOG_LIMIT, MAX_LAYERS, PER_CHANNEL, Part, is_name, is_shape, is_size
from bayeslora.vocabulary import ALL_KINDS, BASE_WEIGHT, MATRICES, UNQUANTIZED, WIDTHS

INDEX_FILE = "integer.json"
BIAS = "bias"

_MAX_NUMBER = 1 << 31
_SMALLEST, _LARGEST = math.exp(-LOG_LIMIT) / 2, math.exp(LOG_LIMIT) * 2


def is_integer_model(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder that `export` wrote with `format="integer"`."""
    return (Path(path) / INDEX_FILE).is_file()


@dataclass(frozen=True)
class IntegerLayer:
    """A linear layer or an embedding on codes.

    Attributes:
        name: path in the model.
        out_features, in_features: d_out and d_in; rows and width of an embedding.
        bits: width by kind; other kinds are absent or not quantized.
        ranges: range by kind below 32 bits, except those of `per_channel`.
        per_channel: kinds with one range per row.
        rank, scaling: the adapter's; rank 0 without an adapter.
        bias: whether the layer has a bias.
        learned: whether the widths were learned.
        tied_to: path of the embedding whose codes the layer shares, or None.

    `integer.json` omits fields that have their default.
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
        given = {key: vars(self)[key] for key, default in _DEFAULTS.items() if vars(self)[key] != default}
        return {"shape": self.shape, "bits": self.bits, **given}


_REQUIRED = ("name", "out_features", "in_features", "bits")
_DEFAULTS = {key: value for key, value in vars(IntegerLayer("", 0, 0, {})).items() if key not in _REQUIRED}


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
        if not isinstance(shared, dict) or not all(is_name(name) for pair in shared.items() for name in pair):
            INTEGER.damaged("its shared tensors are not a table of paths")
        for layer in linear.values():
            if layer.tied_to is not None:
                source = embeddings.get(layer.tied_to)
                if source is None or source.shape != layer.shape:
                    INTEGER.damaged(f"{layer.name:.80} does not share codes of an embedding of its shape")
        for layer in embeddings.values():
            if layer.bits != {BASE_WEIGHT: 8} or layer.per_channel != (BASE_WEIGHT,) or layer.bias or layer.rank:
                INTEGER.damaged(f"{layer.name:.80} is not an embedding of 8 bits")
        return cls(_name(content["architecture"]), linear, embeddings, shared)


def _layers(content: dict[str, Any], part: str) -> dict[str, IntegerLayer]:
    if not isinstance(content[part], dict) or len(content[part]) > MAX_LAYERS:
        INTEGER.damaged(f"its {part} layers are not a table")
    return {_name(name): _layer(name, entry) for name, entry in content[part].items()}


def _layer(name: str, entry: Any) -> IntegerLayer:
    """Return a checked layer of the index."""
    required = {"shape", "bits"}
    if not isinstance(entry, dict) or not required <= set(entry) <= required | set(_DEFAULTS):
        INTEGER.damaged(f"{name:.80} has unknown fields, or lacks some")
    values = {**_DEFAULTS, "per_channel": [], **entry}
    _check_fields(name, values)
    _check_widths(name, values)
    d_out, d_in = values.pop("shape")
    values["ranges"] = {kind: float(bound) for kind, bound in values["ranges"].items()}
    values["per_channel"] = tuple(values["per_channel"])
    values["scaling"] = float(values["scaling"])
    if values["tied_to"] is not None:
        _name(values["tied_to"])
    return IntegerLayer(name, d_out, d_in, **values)


def _check_fields(name: str, values: dict[str, Any]) -> None:
    rank, scaling = values["rank"], values["scaling"]
    if not is_shape(values["shape"]):
        INTEGER.damaged(f"{name:.80} does not have a shape of two sizes")
    if values["per_channel"] not in PER_CHANNEL:
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
        INTEGER.damaged(f"the ranges of {name:.80} do not match its widths")
    if not all(_is_number(bound) and _SMALLEST <= bound <= _LARGEST for bound in ranges.values()):
        INTEGER.damaged(f"{name:.80} has a range that is not finite, positive and of a usable size")
    if tied_to is not None and (rank or bits):
        INTEGER.damaged(f"{name:.80} shares codes, but also has its own")


def _name(value: Any) -> str:
    if not is_name(value):
        INTEGER.damaged("it holds an invalid name")
    return value


def _is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value) or type(value) is int and abs(value) < _MAX_NUMBER
