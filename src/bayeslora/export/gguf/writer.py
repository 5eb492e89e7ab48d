r"""GGUF files of decoders, for llama.cpp.

An adapted layer with learned widths computes $Q_w(W_0) x + c\, Q_b(B) (E \circ Q_a(A) x)$. The codes of $Q_w(W_0)$
are written as they are, and the low-rank part is written beside them, as a LoRA in GGUF: their sum is on no grid. Both
can be merged instead; then the sum with the unrounded $W_0$ is rounded once, to the type of the learned width, block
by block. Quantizers of activations are left out, because llama.cpp rounds the inputs of its products itself, to 8 bits
in blocks of 32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bayeslora.errors import BayesLoraError
from bayeslora.export.agreement import check_divergence, difference
from bayeslora.export.formats import upright
from bayeslora.export.gguf.architectures import ROPE_FACTORS, rope_factors
from bayeslora.export.gguf.blocks import BLOCKS, rounded
from bayeslora.export.gguf.card import write_card
from bayeslora.export.gguf.layers import Weight, widened
from bayeslora.export.gguf.parts import Parts, taken_apart
from bayeslora.export.gguf.reader import ADAPTER_FILE, MODEL_FILE, load_gguf
from bayeslora.export.gguf.vocabulary import add_vocabulary
from bayeslora.export.onnx.products import array

_FILE_TYPES = {
    Type.F32: gguf.LlamaFileType.ALL_F32,
    Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.TQ2_0: gguf.LlamaFileType.MOSTLY_TQ2_0,
}


def export_gguf(
    model: nn.Module,
    path: str | Path,
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | None = None,
    unadapted: str | None = None,
    rows: Iterable[Mapping[str, Tensor]] | None = None,
    allow_error: bool = False,
) -> dict[str, Any]:
    """Write a decoder and its adapter as GGUF files for llama.cpp.

    Args:
        model: a causal Llama, Qwen2 or GPT-2, with an adapter of this library or PEFT's LoRA. It stays unchanged.
        path: folder for `model.gguf`, `adapter.gguf`, `config.json` and `README.md`; created if missing.
        adapter_name: name of the adapter, by default the active one.
        batch: inputs on which the error is measured, if `rows` is None; by default the model's `dummy_inputs`.
        tokenizer: the model's tokenizer, a byte-level BPE, to write into the file.
        adapter: `"beside"` writes one file of the base and one of the adapter (default if widths were learned);
            `"merged"` writes a single file (default otherwise); `"only"` writes just the adapter, which fits any GGUF
            file of the base.
        unadapted: type of the weights without a learned width: `"int8"` (Q8_0, default if widths were learned),
            `"float16"` (default otherwise) or `"float32"`. A and B beside the base are float32 with `"float32"`, and
            otherwise in half precision. Vectors are always float32.
        rows: batches of inputs on which the error is measured.
        allow_error: write the files even if the mean divergence exceeds 0.01 nats.

    Returns:
        `file_bytes`, the sum over the files; `adapter_bytes`; `float32_bytes` of the model; `types`, the number of
        weights of each type; `widened`, the learned widths that got more bits, or None; `left_out`, the quantizers
        that the files cannot hold, or None; and the error: `rows`, `max_output_error`, `max_output`, `changed` (the
        share of positions with another next token), `divergence` and `max_divergence` (Kullback-Leibler, in nats),
        `loss_before` and `loss_after` (the negative log-likelihood per token of the rows). The error does not include
        llama.cpp's own rounding of activations.

    Raises:
        BayesLoraError: the architecture or tokenizer is another one, the base is in 4 or 8 bits, the adapter is
            merged, or the error is not allowed.
    """
    found = taken_apart(model, adapter_name, adapter, unadapted)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, Type] = {}
    if found.form != "only":
        kinds = _write_model(folder / MODEL_FILE, found, tokenizer)
        found.base.config.save_pretrained(folder)
    if found.form != "merged":
        _write_adapter(folder / ADAPTER_FILE, found)
    loaded = load_gguf(folder, found.base)
    result = {**_described(found, folder, kinds), **difference(model, loaded, [batch] if rows is None else rows)}
    if not allow_error:
        reason = f" ({result['left_out']})" if result["left_out"] else ""
        check_divergence(result, "the GGUF form", reason=reason)
    write_card(folder, found.name, found.method, found.form, result)
    return result


def _described(found: Parts, folder: Path, kinds: Mapping[str, Type]) -> dict[str, Any]:
    """Return the files' sizes and types, and what is not in them as it was learned."""
    files = [folder / name for name in (MODEL_FILE, ADAPTER_FILE)]
    sizes = {file.name: file.stat().st_size for file in files if file.is_file()}
    return {
        "file_bytes": sum(sizes.values()),
        "adapter_bytes": sizes.get(ADAPTER_FILE, 0),
        "float32_bytes": 4 * sum(parameter.numel() for parameter in found.base.parameters()),
        "types": ", ".join(f"{kind.name} {count}" for kind, count in Counter(kinds.values()).most_common()) or None,
        "widened": widened({path: kinds[path] for path in found.learned if path in kinds}, found.learned, BLOCKS),
        "left_out": found.left_out,
    }


@torch.no_grad()
def _write_model(file: Path, parts: Parts, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Type]:
    """Write the base, and return the types of its matrices by the path of their layer."""
    if tokenizer is None:
        raise BayesLoraError("tokenizer is missing, but the file holds it: give the model's tokenizer")
    base, names, kinds = parts.base, parts.names, {}
    config: Any = base.config
    writer = _writer(file, parts, gguf.GGUFType.MODEL)
    parts.architecture.write(writer, config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    add_vocabulary(writer, tokenizer, config.vocab_size)
    for path, parameter in base.named_parameters():
        name, (owner, _, _) = names.of(path), path.rpartition(".")
        order = names.order(name, len(parameter))
        if parameter.ndim == 1 or name == "position_embd.weight":
            writer.add_tensor(name, rounded(array(parameter)[order], Type.F32))
            continue
        weight = parts.learned.get(owner) or Weight(array(upright(base.get_submodule(owner))))
        kinds[owner] = kind = weight.type_for(parts.plain)
        writer.add_tensor(name, weight.data(kind, names.order(name, len(weight.values))), raw_dtype=kind)
    factors = rope_factors(base)
    if factors is not None:
        writer.add_tensor(ROPE_FACTORS, factors)
    writer.add_file_type(_FILE_TYPES[Counter(kinds.values()).most_common(1)[0][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _finish(writer)
    return kinds


def _write_adapter(file: Path, parts: Parts) -> None:
    """Write A and B of each layer, in half precision unless the base's weights are float32.

    A reader multiplies their product by alpha over the rank of the layer's tensors, so B is divided by that.
    """
    kind = Type.F32 if parts.plain == Type.F32 else Type.F16
    alpha = max((len(a) for a, _ in parts.updates.values()), default=1)
    writer = _writer(file, parts, gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for path, (a, b) in parts.updates.items():
        name = parts.names.of(f"{path}.weight")
        writer.add_tensor(f"{name}.lora_a", rounded(a, kind))
        writer.add_tensor(f"{name}.lora_b", rounded((b * (len(a) / alpha))[parts.names.order(name, len(b))], kind))
    writer.add_file_type(_FILE_TYPES[kind])
    _finish(writer)


def _writer(file: Path, parts: Parts, kind: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(file, parts.architecture.name)
    writer.add_type(kind)
    writer.add_name(f"{parts.name} {parts.method}")
    writer.add_tags(["bayeslora", parts.method])
    return writer


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
