r"""Packed adapters: every tensor at its learned width, in one safetensors file that PEFT loads.

Ranks that contribute nothing are cut, a matrix of $b < 32$ bits is stored as the codes of its grid,
$\mathrm{clamp}(\mathrm{round}(x / s_b), \pm(2^{b-1} - 1))$, and a bit gate as its chosen width. Tensors without a
quantizer, such as a trained head or those of Me-LoRA, BLoB and AdaLoRA, keep their type. After `import bayeslora` the
folder loads with `PeftModel.from_pretrained`, or into a state dict with `load_packed`.

The index of the codes is one JSON object in the metadata of `adapter_model.safetensors`, one list per property,
deflated (zlib) and in base 85. A layer with eight quantizers costs about 50 bytes, half as much as one more tensor in
the header.

| field | |
|---|---|
| `version` | version of this format, 1 |
| `method` | method of the adapter, such as `blora` |
| `layers` | paths of the layers with codes, each as `<number of characters shared with the last one>:<the rest>` |
| `ranks` | rank of each layer |
| `shapes`, `shape` | the distinct pairs of d_in and d_out, and the index of each layer's pair |
| `widths` | for each layer one digit per kind, in the order of `ALL_KINDS`: log2 of its bits, 0 without a quantizer |
| `bit_gates`, `rank_gates` | whether the adapter has quantizers and rank gates |
| `per_channel` | kinds with one range per channel |
| `group_size` | inputs of each row of a base weight that share a range, if these are not all |
| `ranges` | base64 of float32: logarithms of the other ranges, layer by layer, of kinds below 32 bits |

The codes of all layers are one tensor of bytes without gaps: A (r, d_in), E (r,) and B (d_out, r), each at its width
and starting at a whole byte, then the logarithms of the layer's per-channel ranges in float32. Positions follow from
shapes and widths, so they are not stored.
"""

from __future__ import annotations

import base64
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from bayeslora.errors import BayesLoraError
from bayeslora.export.container import CODES, PACKED, Part, pack, write_container
from bayeslora.export.formats import adapted_parts, saved_state, sharing_base
from bayeslora.methods.config import AdapterConfig
from bayeslora.methods.layer import PackedTensors
from bayeslora.methods.tuner import BayesTuner
from bayeslora.posterior import WeightPosterior, load_posterior
from bayeslora.quantization import codes
from bayeslora.vocabulary import ALL_KINDS, BASE_WEIGHT, MATRICES, UNQUANTIZED

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class PackedLayer:
    """One layer of the index; `widths` are those of its matrices and quantized kinds, in the order of `ALL_KINDS`."""

    name: str
    rank: int
    in_features: int
    out_features: int
    widths: dict[str, int]
    group_size: int | None = None

    def shape_of(self, kind: str) -> tuple[int, ...]:
        """Return the shape of a matrix."""
        return {"A": (self.rank, self.in_features), "E": (self.rank,), "B": (self.out_features, self.rank)}[kind]

    def channels(self, kind: str) -> int:
        """Return the length of a range of `kind` that is one a channel, or one a group."""
        if kind != BASE_WEIGHT:
            return self.rank
        return self.out_features * (self.in_features // self.group_size if self.group_size else 1)

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
    """The index; `ranges` (float32) are the logarithms of the scalar ranges, layer by layer."""

    method: str
    layers: list[PackedLayer] = field(default_factory=list)
    bit_gates: bool = False
    rank_gates: bool = False
    per_channel: tuple[str, ...] = ()
    group_size: int | None = None
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
            **({"group_size": self.group_size} if self.group_size else {}),
            "ranges": base64.b64encode(self.ranges.numpy().astype("<f4").tobytes()).decode(),
        }
        return base64.b85encode(zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)).decode()


def export_packed(
    model: nn.Module,
    path: str | Path,
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
    *,
    posterior: WeightPosterior | Optimizer | str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Write the adapter at its learned widths, as the frozen evaluation model uses it.

    Args:
        model: a PEFT model with an adapter of this library. It stays unchanged.
        path: folder to write `adapter_config.json` and `adapter_model.safetensors` into; created if missing.
        adapter_name: name of the adapter, by default the active one.
        batch: ignored, because packing does not change the outputs.
        posterior: posterior over the adapter's weights to save with it: the optimizer that trained it, a folder with
            `posterior.safetensors`, or a `WeightPosterior`. Its ranks are cut too.

    Returns:
        `file_bytes` of the adapter file; `matrix_bytes` of the matrices stored as codes; `ideal_bytes`, the number of
        their bits / 8; `kept_bytes` of the tensors stored unchanged; and `ranks` by layer.

    Raises:
        BayesLoraError: the model has no such adapter, or the posterior is over matrices that are rounded to codes, so
            that its means would differ from the weights.
    """
    original, tuner, name = adapted_parts(model, adapter_name)
    kept_ranks = {key: layer.kept(name) for key, layer in tuner.named_layers(name).items()}
    saved = _named_posterior(original, posterior)
    cut = sharing_base(original, tuner)
    _, cut_tuner, _ = adapted_parts(cut, name)
    cut_tuner.shrink(name)
    index, buffer = _packed_layers(cut_tuner, name)
    inside = tuple(f"{PREFIX}{layer.name}.{index.method}_" for layer in index.layers)
    if saved is not None:
        narrow = [layer.name for layer in index.layers if any(layer.widths[kind] < UNQUANTIZED for kind in MATRICES)]
        if narrow:
            raise BayesLoraError(
                f"{narrow[0]} has matrices below 32 bits, but a posterior over the weights does not fit their codes: "
                "export without the posterior"
            )
        saved = saved.cut(cut, kept_ranks)
    tensors = {key: tensor for key, tensor in saved_state(cut, name).items() if not key.startswith(inside)}
    tensors[CODES] = buffer
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_container(folder / ADAPTER_FILE, index.to_text(), tensors)
    _save_config(cut, name, folder)
    if saved is not None:
        saved.save(folder)
    bits = [layer.widths[kind] * math.prod(layer.shape_of(kind)) for layer in index.layers for kind in MATRICES]
    return {
        "file_bytes": (folder / ADAPTER_FILE).stat().st_size,
        "matrix_bytes": len(buffer),
        "ideal_bytes": math.ceil(sum(bits) / 8),
        "kept_bytes": sum(tensor.nbytes for key, tensor in tensors.items() if key != CODES),
        "ranks": {layer.name: layer.rank for layer in cut_tuner.describe(name)},
    }


def _named_posterior(
    model: PeftModel, given: WeightPosterior | Optimizer | str | os.PathLike[str] | None
) -> WeightPosterior | None:
    if given is None or isinstance(given, WeightPosterior):
        return given
    if isinstance(given, (str, os.PathLike)):
        return load_posterior(model, given)
    return WeightPosterior.of(model, given)


@torch.no_grad()
def _packed_layers(tuner: BayesTuner, name: str) -> tuple[PackedIndex, Tensor]:
    """Return the index of the layers whose method stores codes, and their codes."""
    config = cast(AdapterConfig, tuner.peft_config[name])
    index = PackedIndex(config.method, group_size=getattr(config, "group_size", None))
    packed = [(path, layer, layer.packed_tensors(name)) for path, layer in tuner.named_layers(name).items()]
    packed = [each for each in packed if each[2] is not None]
    vectors = {kind for _, _, tensors in packed for kind, bound in tensors.ranges.items() if bound.ndim}
    index.per_channel = tuple(kind for kind in ALL_KINDS if kind in vectors)
    stretches: list[Tensor] = []
    ranges: list[Tensor] = []
    for path, layer, tensors in packed:
        index.bit_gates, index.rank_gates = bool(tensors.log_ranges), tensors.has_rank_gates
        rank, sizes = len(tensors.matrices["E"]), (layer.in_features, layer.out_features)
        entry = PackedLayer(path, rank, *sizes, tensors.widths, index.group_size)
        for part in entry.parts(index.per_channel):
            values = tensors.log_ranges[part.kind] if part.is_range else _codes(tensors, part.kind)
            stretches.append(pack(values, part.bits))
        ranges += [tensors.log_ranges[kind].cpu().reshape(1) for kind in entry.scalar_ranges(index.per_channel)]
        index.layers.append(entry)
    index.ranges = torch.cat(ranges) if ranges else index.ranges
    return index, torch.cat(stretches) if stretches else torch.zeros(0, dtype=torch.uint8)


def _digits(widths: dict[str, int]) -> str:
    return "".join(str(widths[kind].bit_length() - 1 if kind in widths else 0) for kind in ALL_KINDS)


def _front_coded(names: list[str]) -> list[str]:
    shared = [len(os.path.commonprefix(pair)) for pair in pairwise(["", *names])]
    return [f"{count}:{name[count:]}" for count, name in zip(shared, names, strict=True)]


def _codes(tensors: PackedTensors, kind: str) -> Tensor:
    """Return the codes of a matrix, or the matrix itself at 32 bits."""
    matrix, bits = tensors.matrices[kind].cpu(), tensors.widths[kind]
    return matrix if bits == UNQUANTIZED else codes(matrix, tensors.ranges[kind].cpu(), bits)


def _save_config(model: PeftModel, name: str, folder: Path) -> None:
    """Write `adapter_config.json` as PEFT's `save_pretrained` does."""
    config = model.peft_config[name]
    base = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    config.inference_mode = True
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else mapping)
