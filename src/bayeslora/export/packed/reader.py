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

from bayeslora._peft import read_adapters_with
from bayeslora.errors import BayesLoraError
from bayeslora.export.file_format import PACKED
from bayeslora.export.packed.file import CODES, looks_packed, read_packed_file
from bayeslora.export.packed.index import MATRICES, PackedIndex, PackedLayer, check_ranges
from bayeslora.methods.blora.gated_quantizers import Phase
from bayeslora.methods.registry import METHODS
from bayeslora.quantization import SURE_LOGIT, WIDTHS, fixed_logits, grid_step
from bayeslora.quantization.packing import unpack
from bayeslora.vocabulary import BASE_WEIGHT

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Logit of a gate that is open, and the negative of one that is closed: far from where evaluation decides."""


class PackedState(dict[str, Tensor]):
    """The state dict of a packed adapter, under the keys that PEFT saves."""

    def check(self, wanted: dict[str, Tensor], others: dict[str, Tensor]) -> None:
        """Compare with the tensors `wanted` that the model's adapter has, and `others` that the model has besides.

        Raises:
            BayesLoraError: a key that is missing or has no place, or a tensor of another shape.
        """
        known = {**others, **wanted}
        for keys, fault in (
            (wanted.keys() - self.keys(), "lacks"),
            (self.keys() - known.keys(), "has no place in the model for"),
        ):
            if keys:
                raise BayesLoraError(
                    f"the packed adapter {fault} {min(keys)}: load it with its own adapter_config.json and base model"
                )
        for key, tensor in self.items():
            if tensor.shape != known[key].shape:
                raise BayesLoraError(
                    f"the packed adapter has {key} of shape {tuple(tensor.shape)}, in the model it is "
                    f"{tuple(known[key].shape)}: load it with its own adapter_config.json and base model"
                )


def load_packed(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a packed adapter by the keys that PEFT saves, without a model.

    Matrices with codes come as float32, codes times steps; everything else has the type it was saved in.

    Args:
        path: a folder that `export` wrote with `format="packed"`, or its `adapter_model.safetensors`.

    Raises:
        BayesLoraError: a file that is missing, damaged, hostile or of another kind. Memory is bounded by the size of
            the file: 16 times it, for codes of 2 bits that become float32.
    """
    where = Path(path)
    file = read_packed_file(where / ADAPTER_FILE if where.is_dir() else where)
    index = PackedIndex.from_text(file.index)
    if index.method not in METHODS:
        PACKED.damaged(f"its method is {index.method!r:.40}")
    buffer = file.tensors.pop(CODES, None)
    if buffer is None or buffer.dtype != torch.uint8 or buffer.ndim != 1:
        PACKED.damaged("it has no codes")
    if len(buffer) != index.buffer_size:
        PACKED.damaged(f"its layers take {index.buffer_size} bytes of codes, and {len(buffer)} are there")
    state = PackedState(file.tensors)
    position = used = 0
    for layer in index.layers:
        parts: dict[tuple[str, bool], Tensor] = {}
        for part in layer.parts(index.per_channel):
            parts[part.kind, part.is_range] = unpack(buffer[position : position + part.size], part.bits, part.shape)
            position += part.size
        scalars = layer.scalar_ranges(index.per_channel)
        logarithms = dict(zip(scalars, index.ranges[used : used + len(scalars)], strict=True))
        used += len(scalars)
        logarithms.update({kind: check_ranges(tensor) for (kind, is_range), tensor in parts.items() if is_range})
        codes = {kind: parts[kind, False] for kind in MATRICES}
        for suffix, tensor in _layer_state(index, layer, codes, logarithms).items():
            key = f"{PREFIX}{layer.name}.{suffix}"
            if key in state:
                PACKED.damaged(f"{key:.80} is there twice")
            state[key] = tensor
    return state


def _layer_state(
    index: PackedIndex, layer: PackedLayer, codes: dict[str, Tensor], logarithms: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of one layer; `logarithms` has the ranges of the kinds below 32 bits."""
    name = index.method
    state: dict[str, Tensor] = {}
    ranges = {kind: _filled(index, layer, kind, logarithms.get(kind)) for kind in layer.widths}
    for kind in MATRICES:
        state[f"{name}_{kind}"] = _values(codes[kind], layer.widths[kind], ranges[kind])
    if index.rank_gates:
        state[f"{name}_rank.logits"] = torch.full((layer.rank,), SURE_LOGIT)
    if index.bit_gates:
        quantizers = f"{name}_quantizers"
        widths = list(layer.widths.values())
        gates = [fixed_logits(bits) for bits in widths]
        state[f"{quantizers}.gates"] = torch.tensor(gates)
        if BASE_WEIGHT in ranges:
            state[f"{quantizers}.log_weight_range"] = ranges[BASE_WEIGHT]
        state[f"{quantizers}.log_ranges"] = torch.cat([ranges[kind] for kind in ranges if kind != BASE_WEIGHT])
        state[f"{quantizers}.observed"] = torch.zeros(len(widths))
    state[f"{name}_progress.phase"] = torch.tensor(int(Phase.FROZEN))
    state[f"{name}_progress.penalty_scale"] = torch.tensor(1.0)
    return state


def _filled(index: PackedIndex, layer: PackedLayer, kind: str, logarithm: Tensor | None) -> Tensor:
    """Logarithms of the range of `kind`, one a channel; 0 at 32 bits, where the range has no effect."""
    if logarithm is not None:
        return logarithm.reshape(-1)
    return torch.zeros(layer.channels(kind) if kind in index.per_channel else 1)


def _values(codes: Tensor, bits: int, logarithms: Tensor) -> Tensor:
    """What a quantizer makes of the tensor that had these `codes`."""
    if bits == WIDTHS[-1]:
        return codes
    bound = logarithms.exp()
    return codes.float() * grid_step(bound.reshape(-1, 1) if len(bound) != 1 else bound, bits)


def _read(path: str, device: str) -> PackedState | None:
    """What PEFT is to load from the file at `path`, or None where the file is an ordinary adapter."""
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


read_adapters_with(_read)
