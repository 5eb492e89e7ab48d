"""Load integer models from their folder, without pickle and without trusting the files.

The index, `integer.json`, has the layers of codes with their widths and ranges:

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
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.pytorch_utils import Conv1D

from bayeslora.errors import BayesLoraError, one_line
from bayeslora.export.container import (
    INTEGER,
    LOG_LIMIT,
    MAX_INDEX,
    MAX_LAYERS,
    PER_CHANNEL,
    Part,
    Parts,
    check_ranges,
    is_name,
    is_shape,
    is_size,
    read_container,
    split,
)
from bayeslora.quantization import grid_step
from bayeslora.runtime.integer_classifier import skip_padding
from bayeslora.runtime.integer_linear import IntegerEmbedding, IntegerLinear, StaticQuantizer
from bayeslora.vocabulary import ACTIVATIONS, ALL_KINDS, BASE_WEIGHT, MATRICES, UNQUANTIZED, WIDTHS

INDEX_FILE = "integer.json"
WEIGHTS_FILE = "integer_model.safetensors"
CODES_SUFFIX = ".codes"
BIAS = "bias"
DTYPES = (torch.float32, torch.bfloat16)

_MAX_NUMBER = 1 << 31
_SMALLEST, _LARGEST = math.exp(-LOG_LIMIT) / 2, math.exp(LOG_LIMIT) * 2

_BERT_BLOCKS = {"bert", "camembert", "deberta", "deberta-v2", "electra", "roberta", "vit", "xlm-roberta"}
"""Model types whose blocks apply only GELU between `intermediate.dense` and `output.dense`."""


def is_integer_model(path: str | os.PathLike[str]) -> bool:
    """Return whether `path` is a folder that `export` wrote with `format="integer"`."""
    return (Path(path) / INDEX_FILE).is_file()


def load_integer(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a model that `export` wrote with `format="integer"`, in evaluation mode.

    Args:
        path: folder of the export.
        device: device of the model, which decides the kernels; without a kernel, each call dequantizes the codes.
        dtype: dtype of the activations between the layers. With float32 (default), an adapted layer computes the
            trained function up to float rounding before its output quantizer, so only codes at rounding ties differ.
            With bfloat16, inputs and sums are rounded and some codes change; one changed code between the factors can
            change output codes by several steps.

    Raises:
        BayesLoraError: files are missing, damaged or inconsistent, or the dtype is another one.
    """
    if dtype not in DTYPES:
        raise BayesLoraError(f"dtype is {dtype}, but must be torch.float32 or torch.bfloat16: choose one")
    folder = Path(path)
    index, tensors = _read(folder)
    model = _empty(folder, index)
    for layer in (*index.embeddings.values(), *index.linear.values()):
        _replace(model, layer, tensors, dtype)
    _assign(model, index, tensors, dtype)
    _fuse_activations(model, dtype)
    skip_padding(model)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.requires_grad_(False)
    return model.to(device).eval()  # type: ignore[arg-type]


def seal(text: str) -> str:
    """Return the index of the tensors' file: a checksum of `integer.json`, so that neither file changes alone."""
    return f"{INDEX_FILE} {zlib.crc32(text.encode()):08x}"


def _read(folder: Path) -> tuple[IntegerIndex, dict[str, Tensor]]:
    """Return the checked index and the tensors; memory is bounded by the files' sizes."""
    for name in (INDEX_FILE, WEIGHTS_FILE, "config.json"):
        if not (folder / name).is_file():
            raise BayesLoraError(f"{folder} does not hold {name}: give a folder exported with format='integer'")
    try:
        with open(folder / INDEX_FILE, "rb") as source:
            data = source.read(MAX_INDEX + 1)
    except OSError as error:
        raise BayesLoraError(
            f"{folder / INDEX_FILE} cannot be read ({error.strerror}): check its permissions"
        ) from error
    if len(data) > MAX_INDEX:
        INTEGER.damaged(f"its index has more than {MAX_INDEX} bytes")
    index = IntegerIndex.from_text(data)
    sealed, tensors = read_container(folder / WEIGHTS_FILE, INTEGER)
    if sealed != seal(data.decode("utf-8", "replace")):
        INTEGER.damaged(f"{INDEX_FILE} and {WEIGHTS_FILE} do not belong together")
    return index, tensors


def _empty(folder: Path, index: IntegerIndex) -> PreTrainedModel:
    """Return the model of `config.json` on the meta device."""
    try:
        kind = getattr(transformers, index.architecture, None)
    except (ImportError, RuntimeError):  # a class whose back end is not installed
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise BayesLoraError(
            f"the model is a {index.architecture:.80}, but this Transformers does not have that class: upgrade it"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return kind(config).eval()
    except Exception as error:  # Transformers raises many types for an invalid configuration
        reason = one_line(error)[:160]
        raise BayesLoraError(
            f"{folder / 'config.json'} does not describe a {index.architecture} ({reason}): restore it from a copy"
        ) from error


def _replace(model: PreTrainedModel, layer: IntegerLayer, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Replace a layer of the model by the layer of codes."""
    try:
        old: Any = model.get_submodule(layer.name)
    except AttributeError:
        INTEGER.damaged(f"the model does not have {layer.name:.80}")
    shape = tuple(old.weight.shape) if isinstance(old, (nn.Linear, Conv1D, nn.Embedding)) else ()
    if shape != (layer.shape[::-1] if isinstance(old, Conv1D) else layer.shape):
        INTEGER.damaged(f"{layer.name:.80} is {layer.shape}, but {shape} in the model")
    parts = _parts(layer, tensors)
    new: nn.Module
    if isinstance(old, nn.Embedding):
        new = IntegerEmbedding(parts[BASE_WEIGHT, False], _steps(layer, parts, BASE_WEIGHT), dtype)
    elif layer.tied_to is not None:
        source = model.get_submodule(layer.tied_to)
        if not isinstance(source, IntegerEmbedding):
            INTEGER.damaged(f"{layer.name:.80} shares codes, but not of an embedding")
        new = source.tied_linear(parts.get((BIAS, False)))
    else:
        new = _linear(layer, parts)
    model.set_submodule(layer.name, new.eval())


def _parts(layer: IntegerLayer, tensors: dict[str, Tensor]) -> Parts:
    """Return the unpacked tensors of a layer."""
    key, parts = layer.name + CODES_SUFFIX, layer.parts()
    buffer = tensors.pop(key, None) if parts else torch.zeros(0, dtype=torch.uint8)
    size = sum(part.size for part in parts)
    if buffer is None or buffer.dtype != torch.uint8 or buffer.ndim != 1 or len(buffer) != size:
        INTEGER.damaged(f"{key:.80} is missing, or does not have {size} bytes")
    return split(buffer, parts)


def _steps(layer: IntegerLayer, parts: Parts, kind: str) -> Tensor:
    """Return the step of a matrix's grid: one number (), or one per row (rows, 1)."""
    if layer.bits[kind] == UNQUANTIZED:
        return torch.ones(())
    if kind not in layer.per_channel:
        return grid_step(torch.tensor(layer.ranges[kind]), layer.bits[kind])
    bound = parts[kind, True]
    if not bool((bound > 0).all()):
        INTEGER.damaged(f"{layer.name:.80} has a range that is not positive")
    check_ranges(bound.log() / 1.1, INTEGER)  # allow for rounding of the largest logarithm
    return grid_step(bound.reshape(-1, 1), layer.bits[kind])


def _linear(layer: IntegerLayer, parts: Parts) -> IntegerLinear:
    """Return the layer of codes with its quantizers."""
    activations = {
        kind: StaticQuantizer(layer.bits[kind], layer.ranges[kind])
        for kind in ACTIVATIONS
        if layer.bits.get(kind, UNQUANTIZED) < UNQUANTIZED
    }
    factors = None
    if layer.rank:
        a, diagonal, b = (parts[kind, False] for kind in MATRICES)
        factors = a, diagonal.float() * _steps(layer, parts, "E"), b.float() * _steps(layer, parts, "B")
    weight, steps = parts[BASE_WEIGHT, False], _steps(layer, parts, BASE_WEIGHT)
    if weight.dtype == torch.int16:  # kernels do not take them, so dequantize once
        weight, steps = weight.float() * steps, torch.ones(())
    return IntegerLinear(
        weight,
        steps,
        parts.get((BIAS, False)),
        factors,
        _steps(layer, parts, "A") if layer.rank else None,
        layer.scaling,
        activations,
        layer.learned,
    )


def _assign(model: PreTrainedModel, index: IntegerIndex, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Assign the other tensors to their parameters and buffers; raise if one is missing or left over."""
    used = set()
    cast_to = {path: tensor.to(dtype) if tensor.is_floating_point() else tensor for path, tensor in tensors.items()}
    for name, owner, leaf, old in list(own_tensors(model)):
        if isinstance(owner, (IntegerLinear, IntegerEmbedding)):
            continue
        path = f"{name}.{leaf}" if name else leaf
        source = index.shared.get(path, path)
        if source not in tensors:
            INTEGER.damaged(f"{path:.80} is missing")
        is_parameter = isinstance(old, nn.Parameter)
        # Buffers keep their type: bfloat16 would change the frequencies of rotary embeddings.
        tensor = cast_to[source] if is_parameter else tensors[source]
        if tensor.shape != old.shape or tensor.is_floating_point() != old.is_floating_point():
            INTEGER.damaged(f"{path:.80} is {tuple(tensor.shape)}, but {tuple(old.shape)} in the model")
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        used.add(source)
    if left := sorted(set(tensors) - used):
        INTEGER.damaged(f"the model does not have {left[0]:.80}")
    for name, module in model.named_modules():
        if any(isinstance(value, Tensor) and value.is_meta for value in vars(module).values()):
            raise BayesLoraError(
                f"{name or type(model).__name__} keeps a tensor that is neither parameter nor buffer, but the file "
                "holds only those: export format 'merged'"
            )


def own_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield every parameter and buffer with its module's path, its module and its name there."""
    for path, module in model.named_modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield path, module, name, tensor


def _fuse_activations(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """In BERT-like blocks, let the feed-forward network's first layer return the codes that the second one reads.

    GELU and the rounding become part of the product. `dtype` is the type of the second layer's output.
    """
    if getattr(model.config, "model_type", None) not in _BERT_BLOCKS:
        return
    for block in model.modules():
        inner: Any = getattr(block, "intermediate", None)
        first, second = getattr(inner, "dense", None), getattr(getattr(block, "output", None), "dense", None)
        if not (isinstance(first, IntegerLinear) and isinstance(second, IntegerLinear)):
            continue
        is_gelu = type(getattr(inner, "intermediate_act_fn", None)) is GELUActivation
        if is_gelu and first.can_feed(second):
            first.feed(second, dtype)
            inner.intermediate_act_fn = nn.Identity()


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
        return json.dumps({"version": INTEGER.version, **vars(self)}, indent=1, default=IntegerLayer.to_json) + "\n"

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
