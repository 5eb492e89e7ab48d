"""Load packed adapters for `PeftModel.from_pretrained`, or as a plain state dict.

The tensors are those of the adapter with its ranks cut and its matrices rounded to their grids: matrices are codes
times steps, gates have the widths they chose, and the phase is the last one. Quantizers do not change such matrices,
so the loaded model computes what the frozen evaluation model computed.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.export.container import (
    CODES,
    MAX_INDEX,
    MAX_LAYERS,
    PACKED,
    PER_CHANNEL,
    check_ranges,
    is_name,
    is_shape,
    is_size,
    looks_packed,
    read_container,
    split,
)
from bayeslora.export.packed.writer import ADAPTER_FILE, PREFIX, PackedIndex, PackedLayer
from bayeslora.methods.layer import PackedTensors
from bayeslora.methods.registry import METHODS, layer_class
from bayeslora.quantization import grid_step
from bayeslora.vocabulary import ALL_KINDS, BASE_WEIGHT, MATRICES, UNQUANTIZED, WIDTHS

_WAY_OUT = "load it with its own adapter_config.json and base model"


class PackedState(dict[str, Tensor]):
    """The state dict of a packed adapter, under the keys that PEFT saves.

    Attributes:
        optional: parts of the keys of tensors that only training needs, which the file lacks.
    """

    optional: tuple[str, ...] = ()

    def check(self, wanted: dict[str, Tensor], others: dict[str, Tensor]) -> None:
        """Compare with the tensors of the model's adapter (`wanted`) and those of the rest of the model (`others`).

        Raises:
            BayesLoraError: a missing or unknown key, or a tensor of another shape.
        """
        known = {**others, **wanted}
        absent = wanted.keys() - self.keys()
        if missing := {key for key in absent if not any(part in key for part in self.optional)}:
            raise BayesLoraError(f"the packed adapter lacks {min(missing)}: {_WAY_OUT}")
        if unknown := self.keys() - known.keys():
            raise BayesLoraError(f"the packed adapter has {min(unknown)}, but the model does not: {_WAY_OUT}")
        for key, tensor in self.items():
            if tensor.shape != known[key].shape:
                raise BayesLoraError(
                    f"{key} has shape {tuple(tensor.shape)} in the packed adapter, but {tuple(known[key].shape)} in "
                    f"the model: {_WAY_OUT}"
                )


def load_packed(path: str | os.PathLike[str]) -> PackedState:
    """Load the tensors of a packed adapter, under the keys that PEFT saves, without a model.

    Matrices stored as codes are returned as float32, codes times steps; other tensors keep the dtype of the file. The
    result takes at most 16 times the file's size, because 2-bit codes become float32.

    Args:
        path: a folder that `export` wrote with `format="packed"`, or its `adapter_model.safetensors`.

    Raises:
        BayesLoraError: the file is missing, damaged, malicious or of another kind.
    """
    where = Path(path)
    text, tensors = read_container(where / ADAPTER_FILE if where.is_dir() else where, PACKED)
    index = read_index(text)
    if index.method not in METHODS:
        PACKED.damaged(f"its method is {index.method!r:.40}")
    buffer = tensors.pop(CODES, None)
    if buffer is None or buffer.dtype != torch.uint8 or buffer.ndim != 1:
        PACKED.damaged("its codes are missing")
    if len(buffer) != index.buffer_size:
        PACKED.damaged(f"its layers take {index.buffer_size} bytes of codes, but it has {len(buffer)}")
    state = PackedState(tensors)
    state.optional = layer_class(index.method).optional_state
    position = used = 0
    for layer in index.layers:
        parts = layer.parts(index.per_channel)
        size = sum(part.size for part in parts)
        found = split(buffer[position : position + size], parts)
        position += size
        scalars = layer.scalar_ranges(index.per_channel)
        logarithms = dict(zip(scalars, index.ranges[used : used + len(scalars)], strict=True))
        used += len(scalars)
        logarithms.update({kind: check_ranges(part, PACKED) for (kind, is_range), part in found.items() if is_range})
        codes = {kind: found[kind, False] for kind in MATRICES}
        for suffix, tensor in _layer_state(index, layer, codes, logarithms).items():
            key = f"{PREFIX}{layer.name}.{suffix}"
            if key in state:
                PACKED.damaged(f"{key:.80} is repeated")
            state[key] = tensor
    return state


def _layer_state(
    index: PackedIndex, layer: PackedLayer, codes: dict[str, Tensor], logarithms: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of one layer; `logarithms` are the ranges of the kinds below 32 bits."""
    # At 32 bits a range does not matter.
    zeros = {kind: torch.zeros(layer.channels(kind) if kind in index.per_channel else 1) for kind in layer.widths}
    ranges = {kind: logarithms.get(kind, zero).reshape(-1) for kind, zero in zeros.items()}
    packed = PackedTensors(
        matrices={kind: _values(codes[kind], layer.widths[kind], ranges[kind]) for kind in MATRICES},
        widths=layer.widths,
        log_ranges=ranges if index.bit_gates else {},
        ranges={},
        has_rank_gates=index.rank_gates,
    )
    try:
        return layer_class(index.method).unpacked_state(packed)
    except NotImplementedError:
        PACKED.damaged(f"its method {index.method} does not use codes")


def _values(codes: Tensor, bits: int, logarithms: Tensor) -> Tensor:
    """Return the values of codes on a quantizer's grid."""
    if bits == UNQUANTIZED:
        return codes
    bound = logarithms.exp()
    return codes.float() * grid_step(bound.reshape(-1, 1) if len(bound) != 1 else bound, bits)


def read_index(text: str) -> PackedIndex:
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
    shapes: list[tuple[int, int]] = _get(content, "shapes", list)[: count + 1]
    if not all(map(is_shape, shapes)):
        PACKED.damaged("a shape is not a pair of sizes")
    if len(shapes) > count or any(index >= len(shapes) for index in which):
        PACKED.damaged("its shapes do not fit its layers")
    digits = _get(content, "widths", str)
    if len(digits) != count * len(ALL_KINDS):
        PACKED.damaged(f"it has {len(digits)} widths for {count} layers of {len(ALL_KINDS)}")
    bit_gates, rank_gates = _get(content, "bit_gates", bool), _get(content, "rank_gates", bool)
    rows = [digits[start : start + len(ALL_KINDS)] for start in range(0, len(digits), len(ALL_KINDS))]
    group = content.get("group_size")
    if group is not None and not (is_size(group) and group > 1 and all(size % group == 0 for size, _ in shapes)):
        PACKED.damaged(f"its group_size {group!r:.40} does not fit its layers")
    layers = [
        PackedLayer(name, rank, *shapes[index], _widths(row, bit_gates), group)
        for name, rank, index, row in zip(names, ranks, which, rows, strict=True)
    ]
    per_channel = _get(content, "per_channel", list)
    if per_channel not in PER_CHANNEL:
        PACKED.damaged(f"its per-channel kinds are {per_channel!r:.60}")
    index = PackedIndex(_get(content, "method", str), layers, bit_gates, rank_gates, tuple(per_channel), group)
    index.ranges = _ranges(_get(content, "ranges", str), index)
    return index


def _inflated(text: str) -> bytes:
    """Return the JSON in `text`, at most `MAX_INDEX` bytes of it."""
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(base64.b85decode(text), MAX_INDEX)
    except (ValueError, zlib.error):
        PACKED.damaged("the index cannot be inflated")
    if not unpacker.eof or unpacker.unused_data:
        PACKED.damaged("the index is cut short or too large")
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


def _names(coded: list[Any]) -> list[str]:
    if len(coded) > MAX_LAYERS:
        PACKED.damaged(f"it has {len(coded)} layers")
    names: list[str] = []
    for entry in coded:
        shared, colon, rest = entry.partition(":") if isinstance(entry, str) else ("", "", "")
        before = names[-1] if names else ""
        is_number = shared.isascii() and shared.isdigit() and len(shared) <= 4
        if not colon or not is_number or int(shared) > len(before) or not is_name(before[: int(shared)] + rest):
            PACKED.damaged("a layer's name cannot be read")
        names.append(before[: int(shared)] + rest)
    if len(set(names)) < len(names):
        PACKED.damaged("a layer is repeated")
    return names


def read_adapter(path: str, device: str) -> PackedState | None:
    """Return the tensors of the packed adapter at `path`; None for an ordinary adapter, which PEFT reads."""
    if looks_packed(path):
        state = load_packed(path)
        state.update({key: tensor.to(device) for key, tensor in state.items()})
        return state
    if _has_our_config(Path(path)):
        try:
            with safe_open(path, framework="pt"):
                return None
        except (SafetensorError, OSError, ValueError) as error:
            raise BayesLoraError(
                f"{path} is damaged or cut short: export it again or restore it from a copy"
            ) from error
    return None


def _has_our_config(path: Path) -> bool:
    try:
        config = json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8"))
        return str(config["peft_type"]).lower() in METHODS
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
