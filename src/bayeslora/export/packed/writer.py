r"""Packed adapters: every tensor at the width that was learned, in one safetensors file that PEFT loads.

Ranks that contribute nothing are cut, a matrix of $b < 32$ bits is stored as the codes of its grid,
$\mathrm{clamp}(\mathrm{round}(x / s_b), \pm(2^{b-1} - 1))$, and a bit gate as the width that it chose. What has no
quantizer, such as a trained head or the tensors of Me-LoRA, BLoB and AdaLoRA, is kept in the type it has. After
`import bayeslora` the folder loads with `PeftModel.from_pretrained`, or into a state dict with `load_packed`; see
`packed_index` for the layout.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from bayeslora.errors import BayesLoraError
from bayeslora.export.copies import adapted_parts, sharing_base
from bayeslora.export.packed.file import CHECKSUM_KEY, CODES, INDEX_KEY, checksum
from bayeslora.export.packed.index import KINDS, LOG_LIMIT, MATRICES, PackedIndex, PackedLayer
from bayeslora.export.packed.reader import ADAPTER_FILE, PREFIX
from bayeslora.methods.blora.layer import BLoraLayer
from bayeslora.methods.config import AdapterConfig
from bayeslora.methods.tuner import BayesTuner
from bayeslora.posterior import WeightPosterior, load_posterior
from bayeslora.quantization import WIDTHS, codes
from bayeslora.quantization.packing import pack
from bayeslora.vocabulary import BASE_WEIGHT

_UNQUANTIZED = WIDTHS[-1]


def export_packed(
    model: nn.Module,
    path: str | Path,
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
    *,
    posterior: WeightPosterior | Optimizer | str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Write the adapter as the frozen evaluation model uses it, at its learned widths.

    Args:
        model: a PEFT model with an adapter of this library; left as it is.
        path: folder to write `adapter_config.json` and `adapter_model.safetensors` into; created if missing.
        adapter_name: by default the active adapter.
        batch: not needed; packing changes no output.
        posterior: the posterior over the weights that goes with the adapter: the IVON that trained it, a folder with
            `posterior.safetensors`, or a `WeightPosterior`. Ranks are cut out of it as well.

    Returns:
        `file_bytes` of the adapter file; `matrix_bytes`, of the low-rank matrices with codes, and `ideal_bytes`, the
        sum of their bits by eight; `kept_bytes` of what is stored as it was; `ranks` by layer.

    Raises:
        BayesLoraError: if the model has no such adapter, or for a posterior over matrices that are rounded to codes:
            its means would no longer be those of the weights.
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
        narrow = [layer.name for layer in index.layers if any(layer.widths[kind] < 32 for kind in MATRICES)]
        if narrow:
            raise BayesLoraError(
                f"{narrow[0]} has matrices below 32 bits, whose codes a posterior over the weights does not fit: "
                "export without the posterior"
            )
        saved = saved.cut(cut, kept_ranks)
    tensors = {key: tensor for key, tensor in _state(cut, name).items() if not key.startswith(inside)}
    tensors[CODES] = buffer
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    text = index.to_text()
    metadata = {"format": "pt", INDEX_KEY: text, CHECKSUM_KEY: checksum(text, tensors)}
    save_file(tensors, folder / ADAPTER_FILE, metadata=metadata)
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


def _packed_layers(tuner: BayesTuner, name: str) -> tuple[PackedIndex, Tensor]:
    """The index of the layers that have quantizers or rank gates, and their codes."""
    index = PackedIndex(cast(AdapterConfig, tuner.peft_config[name]).method)
    stretches: list[Tensor] = []
    ranges: list[Tensor] = []
    layers = {path: layer for path, layer in tuner.named_layers(name).items() if isinstance(layer, BLoraLayer)}
    with_vectors = {kind for layer in layers.values() for kind in _per_channel(layer, name)}
    index.per_channel = tuple(kind for kind in KINDS if kind in with_vectors)
    for path, layer in layers.items():
        index.bit_gates, index.rank_gates = name in layer.blora_quantizers, name in layer.blora_rank
        rank, widths = len(layer.blora_A[name]), _widths(layer, name)
        packed = PackedLayer(path, rank, layer.in_features, layer.out_features, widths)
        logarithms = _logarithms(layer, name)
        for part in packed.parts(index.per_channel):
            if part.is_range:
                stretches.append(pack(logarithms[part.kind], part.bits))
            else:
                stretches.append(pack(_codes(layer, name, part.kind, part.bits), part.bits))
        ranges += [logarithms[kind].reshape(1) for kind in packed.scalar_ranges(index.per_channel)]
        index.layers.append(packed)
    index.ranges = torch.cat(ranges) if ranges else index.ranges
    return index, torch.cat(stretches) if stretches else torch.zeros(0, dtype=torch.uint8)


def _widths(layer: BLoraLayer, name: str) -> dict[str, int]:
    """Evaluation width of every kind that has a quantizer, and of the matrices."""
    widths = layer.widths(name)
    kinds = layer.quantizers(name).kinds if name in layer.blora_quantizers else MATRICES
    return {kind: widths[kind] for kind in kinds}


def _per_channel(layer: BLoraLayer, name: str) -> list[str]:
    """The kinds with a range a channel."""
    if name not in layer.blora_quantizers:
        return []
    quantizers = layer.quantizers(name)
    return [kind for kind, shape in zip(quantizers.kinds, quantizers.shapes, strict=True) if shape != ()]


@torch.no_grad()
def _logarithms(layer: BLoraLayer, name: str) -> dict[str, Tensor]:
    """Logarithms of the ranges by kind, float32 on the CPU, as their exponentials are used."""
    if name not in layer.blora_quantizers:
        return {}
    quantizers = layer.quantizers(name)
    has_weight = BASE_WEIGHT in quantizers.kinds
    parts = list(quantizers.log_ranges.split(quantizers.channels[has_weight:]))
    if has_weight:
        parts.insert(0, quantizers.log_weight_range)
    limited = [part.float().cpu().clamp(-LOG_LIMIT, LOG_LIMIT) for part in parts]
    return dict(zip(quantizers.kinds, limited, strict=True))


@torch.no_grad()
def _codes(layer: BLoraLayer, name: str, kind: str, bits: int) -> Tensor:
    """Codes of a matrix, or the matrix itself at 32 bits."""
    matrix = getattr(layer, f"blora_{kind}")[name].detach().float().cpu()
    if bits == _UNQUANTIZED:
        return matrix
    quantizers = layer.quantizers(name)
    position = quantizers.kinds.index(kind)
    bound = quantizers.ranges()[position].view(quantizers.shapes[position]).cpu()
    return codes(matrix, bound, bits)


def _state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """What PEFT would save, every tensor in memory of its own on the CPU."""
    state = get_peft_model_state_dict(model, adapter_name=name)
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}


def _save_config(model: PeftModel, name: str, folder: Path) -> None:
    """`adapter_config.json` as PEFT's `save_pretrained` writes it."""
    config = model.peft_config[name]
    base = model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    config.inference_mode = True
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    config.save_pretrained(str(folder), auto_mapping_dict=None if config.task_type else mapping)
