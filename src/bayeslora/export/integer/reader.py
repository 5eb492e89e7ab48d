"""Integer models back from their folder: one call, no pickle, and nothing of the file is trusted."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bayeslora.errors import BayesLoraError
from bayeslora.export.file_format import INTEGER
from bayeslora.export.integer.index import BIAS, UNQUANTIZED, IntegerIndex, IntegerLayer
from bayeslora.export.packed.file import read_packed_file
from bayeslora.export.packed.index import MATRICES, check_ranges
from bayeslora.quantization import grid_step
from bayeslora.quantization.packing import unpack
from bayeslora.runtime.integer_fusion import fuse_activations
from bayeslora.runtime.integer_linear import IntegerEmbedding, IntegerLinear, StaticQuantizer
from bayeslora.vocabulary import ACTIVATIONS, BASE_WEIGHT

INDEX_FILE = "integer.json"
WEIGHTS_FILE = "integer_model.safetensors"
CODES_SUFFIX = ".codes"
DTYPES = (torch.float32, torch.bfloat16)

_MAX_INDEX = 16 << 20


def is_integer_model(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder that `export` wrote with `format="integer"`."""
    return (Path(path) / INDEX_FILE).is_file()


def load_integer(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The model of a folder that `export` wrote with `format="integer"`, in evaluation mode.

    Args:
        path: the folder.
        device: where to compute; kernels are chosen for it, and where it has none, codes are dequantized in each call.
        dtype: type of what lies between the layers. With float32 an adapted layer computes what was trained, to float
            rounding before its output quantizer, so that codes differ at ties only. With bfloat16 inputs and sums are
            rounded to it, which moves some codes, and those of an output by several steps where one between the
            factors has moved.

    Raises:
        BayesLoraError: a folder whose files are missing, damaged, or do not fit each other, or another dtype.
    """
    if dtype not in DTYPES:
        raise BayesLoraError(f"dtype must be torch.float32 or torch.bfloat16, not {dtype}")
    folder = Path(path)
    index, tensors = _read(folder)
    model = _empty(folder, index)
    for layer in (*index.embeddings.values(), *index.linear.values()):
        _replace(model, layer, tensors, dtype)
    _assign(model, index, tensors, dtype)
    fuse_activations(model, dtype)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.requires_grad_(False)
    return model.to(device).eval()  # type: ignore[arg-type]


def seal(text: str) -> str:
    """What the tensors' file says about its `integer.json`, so that neither can be changed alone."""
    return f"{INDEX_FILE} {zlib.crc32(text.encode()):08x}"


def _read(folder: Path) -> tuple[IntegerIndex, dict[str, Tensor]]:
    """The checked index and the tensors of a folder; memory is bounded by the files' sizes."""
    for name in (INDEX_FILE, WEIGHTS_FILE, "config.json"):
        if not (folder / name).is_file():
            raise BayesLoraError(f"{folder} holds no {name}: name a folder that was exported with format='integer'")
    try:
        with open(folder / INDEX_FILE, "rb") as source:
            data = source.read(_MAX_INDEX + 1)
    except OSError as error:
        raise BayesLoraError(
            f"{folder / INDEX_FILE} cannot be read ({error.strerror}): check its permissions"
        ) from error
    if len(data) > _MAX_INDEX:
        INTEGER.damaged(f"its index has more than {_MAX_INDEX} bytes")
    index = IntegerIndex.from_text(data)
    file = read_packed_file(folder / WEIGHTS_FILE, INTEGER)
    if file.index != seal(data.decode("utf-8", "replace")):
        INTEGER.damaged(f"{INDEX_FILE} and {WEIGHTS_FILE} do not belong together")
    return index, file.tensors


def _empty(folder: Path, index: IntegerIndex) -> PreTrainedModel:
    """The model that `config.json` describes, without memory for its weights."""
    try:
        kind = getattr(transformers, index.architecture, None)
    except (ImportError, RuntimeError):  # a name whose back end is not installed
        kind = None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise BayesLoraError(
            f"the integer model is a {index.architecture:.80}, which this Transformers does not have: update it"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return kind(config).eval()
    except Exception as error:  # Transformers has no one type for a configuration that it cannot use
        reason = " ".join(str(error).split())[:160]
        raise BayesLoraError(
            f"{folder / 'config.json'} describes no {index.architecture} ({reason}): restore it from a copy"
        ) from error


def _replace(model: PreTrainedModel, layer: IntegerLayer, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Put the layer of codes in the place of the model's own."""
    try:
        old: Any = model.get_submodule(layer.name)
    except AttributeError:
        INTEGER.damaged(f"the model has no layer {layer.name:.80}")
    shape = tuple(old.weight.shape) if isinstance(old, (nn.Linear, Conv1D, nn.Embedding)) else ()
    if shape != ((layer.in_features, layer.out_features) if isinstance(old, Conv1D) else _shape(layer)):
        INTEGER.damaged(f"{layer.name:.80} is {_shape(layer)}, in the model it is {shape}")
    parts = _parts(layer, tensors)
    new: nn.Module
    if isinstance(old, nn.Embedding):
        new = IntegerEmbedding(parts[BASE_WEIGHT, False], _steps(layer, parts, BASE_WEIGHT), dtype)
    elif layer.tied_to is not None:
        source = model.get_submodule(layer.tied_to)
        if not isinstance(source, IntegerEmbedding):
            INTEGER.damaged(f"{layer.name:.80} shares the codes of no embedding")
        new = source.tied_linear(parts.get((BIAS, False)))
    else:
        new = _linear(layer, parts)
    model.set_submodule(layer.name, new.eval())


def _shape(layer: IntegerLayer) -> tuple[int, int]:
    return layer.out_features, layer.in_features


Parts = dict[tuple[str, bool], Tensor]
"""What a layer's bytes hold, by kind and by whether it is a vector of ranges."""


def _parts(layer: IntegerLayer, tensors: dict[str, Tensor]) -> Parts:
    key, parts = layer.name + CODES_SUFFIX, layer.parts()
    buffer = tensors.pop(key, None) if parts else torch.zeros(0, dtype=torch.uint8)
    if buffer is None or buffer.dtype != torch.uint8 or buffer.ndim != 1 or len(buffer) != layer.size:
        INTEGER.damaged(f"{key:.80} is missing, or has not the {layer.size} bytes that its widths ask for")
    found: Parts = {}
    position = 0
    for part in parts:
        found[part.kind, part.is_range] = unpack(buffer[position : position + part.size], part.bits, part.shape)
        position += part.size
    return found


def _steps(layer: IntegerLayer, parts: Parts, kind: str) -> Tensor:
    """Step of a matrix's grid, (): one number, or (rows, 1)."""
    if layer.bits[kind] == UNQUANTIZED:
        return torch.ones(())
    if kind not in layer.per_channel:
        return grid_step(torch.tensor(layer.ranges[kind]), layer.bits[kind])
    bound = parts[kind, True]
    if not bool((bound > 0).all()):
        INTEGER.damaged(f"{layer.name:.80} has a range that is not positive")
    check_ranges(bound.log() / 1.1, INTEGER)  # room for the rounding of a limit's logarithm
    return grid_step(bound.reshape(-1, 1), layer.bits[kind])


def _linear(layer: IntegerLayer, parts: Parts) -> IntegerLinear:
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
    if weight.dtype == torch.int16:  # no kernel multiplies them: as values once, instead of in each product
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
    """Give every other parameter and buffer its tensor, and see that nothing is missing or left over."""
    used = set()
    cast_to = {path: tensor.to(dtype) if tensor.is_floating_point() else tensor for path, tensor in tensors.items()}
    for path, owner, leaf, old in list(_unfilled(model)):
        source = index.shared.get(path, path)
        if source not in tensors:
            INTEGER.damaged(f"{path:.80} is missing")
        is_parameter = isinstance(old, nn.Parameter)
        # Buffers keep their type: frequencies of rotary positions in bfloat16 would be other frequencies.
        tensor = cast_to[source] if is_parameter else tensors[source]
        if tensor.shape != old.shape or tensor.is_floating_point() != old.is_floating_point():
            INTEGER.damaged(f"{path:.80} is {tuple(tensor.shape)}, in the model it is {tuple(old.shape)}")
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        used.add(source)
    if left := sorted(set(tensors) - used):
        INTEGER.damaged(f"{left[0]:.80} has no place in the model")
    for name, module in model.named_modules():
        if any(isinstance(value, Tensor) and value.is_meta for value in vars(module).values()):
            raise BayesLoraError(
                f"{name or type(model).__name__} keeps a tensor that is neither parameter nor buffer, which no file "
                "holds: export format 'merged'"
            )


def _unfilled(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    for owner, module in model.named_modules():
        if isinstance(module, (IntegerLinear, IntegerEmbedding)):
            continue
        for leaf, old in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield (f"{owner}.{leaf}" if owner else leaf), module, leaf, old
