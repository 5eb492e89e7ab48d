"""Packed adapters back into tensors: for `PeftModel.from_pretrained`, and as a plain state dict.

The tensors are those that the adapter would have after its ranks were cut and its matrices rounded to their grids:
matrices are codes times steps, gates stand at the widths they chose, and the phase is the last one. On such a matrix a
quantizer changes nothing, so that the model loaded with it computes what the frozen evaluation model computed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.export.container import CODES, PACKED, check_ranges, looks_packed, read_container, split
from bayeslora.export.packed.index import PackedIndex, PackedLayer
from bayeslora.methods.layer import PackedTensors
from bayeslora.methods.registry import METHODS, layer_class
from bayeslora.quantization import grid_step
from bayeslora.vocabulary import MATRICES, UNQUANTIZED

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_WAY_OUT = "load it with its own adapter_config.json and base model"


class PackedState(dict[str, Tensor]):
    """The state dict of a packed adapter, under the keys that PEFT saves."""

    def check(self, wanted: dict[str, Tensor], others: dict[str, Tensor]) -> None:
        """Compare with the tensors `wanted` that the model's adapter has, and `others` that the model has besides.

        Raises:
            BayesLoraError: a key that is missing or superfluous, or a tensor of another shape.
        """
        known = {**others, **wanted}
        for keys, fault in (
            (wanted.keys() - self.keys(), "lacks {}"),
            (self.keys() - known.keys(), "has {}, but the model does not"),
        ):
            if keys:
                raise BayesLoraError(f"the packed adapter {fault.format(min(keys))}: {_WAY_OUT}")
        for key, tensor in self.items():
            if tensor.shape != known[key].shape:
                raise BayesLoraError(
                    f"{key} has shape {tuple(tensor.shape)} in the packed adapter, but {tuple(known[key].shape)} in "
                    f"the model: {_WAY_OUT}"
                )


def load_packed(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the tensors of a packed adapter by the keys that PEFT saves, without a model.

    Matrices with codes come as float32, codes times steps; everything else has the type it was saved in.

    Args:
        path: a folder that `export` wrote with `format="packed"`, or its `adapter_model.safetensors`.

    Raises:
        BayesLoraError: a file that is missing, damaged, hostile or of another kind. Memory is bounded by the size of
            the file: 16 times it, for codes of 2 bits that become float32.
    """
    where = Path(path)
    text, tensors = read_container(where / ADAPTER_FILE if where.is_dir() else where, PACKED)
    index = PackedIndex.from_text(text)
    if index.method not in METHODS:
        PACKED.damaged(f"its method is {index.method!r:.40}")
    buffer = tensors.pop(CODES, None)
    if buffer is None or buffer.dtype != torch.uint8 or buffer.ndim != 1:
        PACKED.damaged("it has no codes")
    if len(buffer) != index.buffer_size:
        PACKED.damaged(f"its layers take {index.buffer_size} bytes of codes, and {len(buffer)} are there")
    state = PackedState(tensors)
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
                PACKED.damaged(f"{key:.80} is there twice")
            state[key] = tensor
    return state


def _layer_state(
    index: PackedIndex, layer: PackedLayer, codes: dict[str, Tensor], logarithms: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of one layer; `logarithms` has the ranges of the kinds below 32 bits."""
    ranges = {kind: _filled(index, layer, kind, logarithms.get(kind)) for kind in layer.widths}
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
        PACKED.damaged(f"its method {index.method} has no codes")


def _filled(index: PackedIndex, layer: PackedLayer, kind: str, logarithm: Tensor | None) -> Tensor:
    """Return the range of `kind`, as logarithms; 0 at 32 bits, where the range has no effect."""
    if logarithm is not None:
        return logarithm.reshape(-1)
    return torch.zeros(layer.channels(kind) if kind in index.per_channel else 1)


def _values(codes: Tensor, bits: int, logarithms: Tensor) -> Tensor:
    """Return the values on a quantizer's grid that have these `codes`."""
    if bits == UNQUANTIZED:
        return codes
    bound = logarithms.exp()
    return codes.float() * grid_step(bound.reshape(-1, 1) if len(bound) != 1 else bound, bits)


def read_adapter(path: str, device: str) -> PackedState | None:
    """Read the packed adapter at `path` for PEFT; None for an ordinary adapter, which PEFT reads itself."""
    if looks_packed(path):
        return PackedState({key: tensor.to(device) for key, tensor in load_packed(path).items()})
    if _is_beside_our_config(Path(path)):
        try:
            with safe_open(path, framework="pt"):
                return None
        except (SafetensorError, OSError, ValueError) as error:
            raise BayesLoraError(
                f"{path} is damaged or cut short: export it again or restore it from a copy"
            ) from error
    return None


def _is_beside_our_config(path: Path) -> bool:
    try:
        config = json.loads((path.parent / "adapter_config.json").read_text(encoding="utf-8"))
        return str(config["peft_type"]).lower() in METHODS
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
