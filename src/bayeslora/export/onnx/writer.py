"""ONNX models of classifiers, decoders and encoder-decoders: merged in float32, or with the learned quantizers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from bayeslora._peft import AuxiliaryTrainingWrapper
from bayeslora.errors import BayesLoraError
from bayeslora.export.agreement import check_divergence, compared
from bayeslora.export.calibration import CODES, inputs_of_plain_layers
from bayeslora.export.formats import adapted_parts, only_active, save_config, to_take_apart
from bayeslora.export.merged import TOLERANCE, merge_into_base
from bayeslora.export.onnx import decoders, encoders, seq2seq
from bayeslora.export.onnx.card import Page, encoder_page, write_page
from bayeslora.export.onnx.decoder_card import decoder_page
from bayeslora.export.onnx.decoders import Decoder, is_decoder
from bayeslora.export.onnx.encoders import Encoder
from bayeslora.export.onnx.layers import Embedding, ProductLayers
from bayeslora.export.onnx.measured import answers_of, asked, filled_inputs, outputs_kept
from bayeslora.export.onnx.products import BYTE, Grid, Product, array, learned, plain, rounded, rounded_rows
from bayeslora.export.onnx.reader import DECODER_FILE, ENCODER_FILE, MODEL_FILE, OnnxDecoder, OnnxEncoderDecoder
from bayeslora.export.onnx.seq2seq import EncoderDecoder, is_encoder_decoder
from bayeslora.export.onnx.seq2seq_card import seq2seq_page
from bayeslora.methods.layer import BayesLayer
from bayeslora.methods.tuner import tuner_of
from bayeslora.model_card import CARD_FILE
from bayeslora.quantization import FLOOR
from bayeslora.vocabulary import UNQUANTIZED

UNADAPTED = ("int8", "float32")


def export_onnx(
    model: nn.Module,
    path: str | Path,
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
    unadapted: str | None = None,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    rows: Iterable[Mapping[str, Tensor]] | None = None,
    allow_error: bool = False,
) -> dict[str, Any]:
    """Write base, adapter and head as one ONNX graph, which onnxruntime runs without this library.

    If widths were learned, the graph keeps the quantizers: it has codes for the weights and static ranges for the
    activations. Any other adapter is merged in float32, a posterior at its mean. The graph of a decoder takes and
    returns the keys and values of its blocks, with Optimum's names. An encoder-decoder becomes two graphs,
    `encoder_model.onnx` and `decoder_model.onnx`.

    Args:
        model: BERT, RoBERTa or DistilBERT for sequence classification, Llama, Qwen2 or GPT-2 for causal language
            modelling, or T5, mT5, BART, mBART or Pegasus for conditional generation, with an adapter of this library
            or PEFT's LoRA. It stays unchanged.
        path: folder for `model.onnx`, `config.json`, the tokenizer and `README.md`; created if missing.
        adapter_name: name of the adapter, by default the active one.
        batch: inputs on which the error is measured, if `rows` is None; by default the model's `dummy_inputs`.
        tokenizer: the model's tokenizer, which must be a fast one, to save with the graph. It decides the inputs.
        max_length: number of tokens to which the code in README cuts a text; by default the tokenizer's maximum.
        unadapted: if widths were learned, type of the weights of unadapted linear layers and of the word embedding,
            for an encoder also of the position embedding: `"int8"` (default), with a range per row, or `"float32"`. A
            trained classifier stays float32.
        calibration: batches of inputs that fix static 8-bit ranges for the inputs of an encoder's unadapted int8
            layers, so that their products use integers too; None (default) leaves these inputs unquantized.
        rows: batches of inputs on which the error is measured.
        allow_error: write a merged graph even if its outputs differ by more than float rounding, or a decoder with
            codes even if its mean divergence exceeds 0.01 nats.

    Returns:
        `file_bytes` of the graph; `float32_bytes` of the model; `rows`, the number of rows measured;
        `max_output_error`, `max_output`; `changed`, the share of other answers or next tokens; `divergence`, the mean
        Kullback-Leibler divergence in nats; for a decoder also `max_divergence`, `loss_before` and `loss_after`;
        `widened`, the learned widths that the graph computes in more bits; and `unadapted`, as used.

    Raises:
        BayesLoraError: a package is missing, the architecture is another one, the base is in 4 or 8 bits, the adapter
            is merged, or the error is not allowed.
    """
    fast = _checked(tokenizer, unadapted)
    whole, layers, name = _copied(model, adapter_name)
    names = encoders.input_names(whole.get_base_model(), fast)
    errors_of = _measuring(model, adapter_name, whole, [batch] if rows is None else rows, names)
    config, folder = whole.peft_config[name], Path(path)
    base, products = _taken_apart(whole, layers, name, unadapted, filled_inputs(whole, calibration or [], names))
    _save(folder, base, products, names, fast)
    result = _sizes(folder, base) | errors_of(folder) | ({"dummy_inputs": True} if batch is rows is None else {})
    result |= {"widened": products.widened, "unadapted": products.unadapted}
    _check_error(result, are_learned=products.are_learned, allow_error=allow_error)
    write_page(folder, base, config, result, *_page(base, fast, max_length, names, result))
    return result


def _writes_text(base: nn.Module) -> bool:
    return is_decoder(base) or is_encoder_decoder(base)


def _measuring(
    model: nn.Module,
    adapter_name: str | None,
    whole: PeftModel,
    batches: Iterable[Mapping[str, Tensor] | None],
    names: list[str],
) -> Callable[[Path], dict[str, Any]]:
    """Return what measures a folder's error: from an encoder's outputs, or a decoder itself, whose are many."""
    base = whole.get_base_model()
    if not _writes_text(base):
        return outputs_kept(whole, batches, names)
    original = model if adapter_name is None else _copied(model, adapter_name)[0]
    if is_decoder(base):
        rows = list(filled_inputs(original, batches, names))
        return lambda folder: compared(original, OnnxDecoder(folder), rows)
    answers = [answers_of(original, batch) for batch in batches]
    return lambda folder: compared(original, OnnxEncoderDecoder(folder), answers, asked)


def _page(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    names: list[str],
    result: Mapping[str, Any],
) -> Page:
    """Return what the model's card says of its kind of graph."""
    if is_encoder_decoder(base):
        return seq2seq_page(base)
    if is_decoder(base):
        return decoder_page(base, tokenizer)
    return encoder_page(base, tokenizer, max_length, names, result)


def _checked(tokenizer: PreTrainedTokenizerBase | None, unadapted: str | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer; raise if it is slow, or for an unknown type."""
    if unadapted not in (None, *UNADAPTED):
        raise BayesLoraError(f"unadapted is {unadapted!r}, but must be one of {', '.join(UNADAPTED)}: choose one")
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise BayesLoraError(
            f"tokenizer is of type {type(tokenizer).__name__}, but must be a fast one, which runs without "
            "Transformers: give the model's tokenizer"
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def _copied(model: nn.Module, adapter_name: str | None) -> tuple[PeftModel, dict[str, BayesLayer], str]:
    """Return a copy of the model to take apart, its layers with an adapter of this library, and the adapter's name."""
    if tuner_of(model) is None and isinstance(model, PeftModel):
        _check_architecture(model.get_base_model())
        return copy.deepcopy(model).eval(), {}, adapter_name or only_active(model)
    original, tuner, name = adapted_parts(model, adapter_name)
    _check_architecture(original.get_base_model())
    return *to_take_apart(original, tuner, name), name


def _check_architecture(base: nn.Module) -> None:
    """Raise `BayesLoraError` for a model that no graph is written of."""
    kind, known = type(base).__name__, sorted([*encoders.FAMILIES, *decoders.FAMILIES, *seq2seq.FAMILIES])
    if kind not in known:
        raise BayesLoraError(
            f"the model is a {kind}, but format 'onnx' is for {', '.join(known)}: export 'merged' instead"
        )
    if is_encoder_decoder(base):
        seq2seq.check_encoder_decoder(base)
    elif is_decoder(base):
        decoders.check_decoder(base)
    else:
        encoders.check_encoder(base)


def _taken_apart(
    whole: PeftModel,
    layers: Mapping[str, BayesLayer],
    name: str,
    unadapted: str | None,
    calibration: Iterable[dict[str, Tensor]],
) -> tuple[PreTrainedModel, ProductLayers]:
    """Return the model without its adapter, and its layers on codes or merged."""
    packed = [layer.packed_tensors(name) for layer in layers.values()]
    if not any(min(each.widths.values()) < UNQUANTIZED for each in packed if each is not None):
        return _merged(whole, name, unadapted)
    is_encoder, grids = not _writes_text(whole.get_base_model()), {}
    for path, inputs in (inputs_of_plain_layers(whole, calibration) if is_encoder else {}).items():
        lowest, highest = inputs.best_ends()
        step = max(highest - lowest, FLOOR) / CODES
        grids[path] = Grid(BYTE, step, round(-lowest / step))
    return _quantized(whole, layers, name, unadapted or UNADAPTED[0], grids)


def _merged(whole: PeftModel, name: str, unadapted: str | None) -> tuple[PreTrainedModel, ProductLayers]:
    """Merge the adapter, and return the model and its layers in float32."""
    if unadapted is not None:
        raise BayesLoraError(
            f"unadapted is {unadapted!r}, but without learned widths all layers are float32: leave it out"
        )
    base = cast(PreTrainedModel, merge_into_base(whole, name))
    linear = {path: plain(module) for path, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return base, ProductLayers(linear, _embeddings(base, linear, "float32"))


def _embeddings(base: PreTrainedModel, linear: Mapping[str, Product], form: str) -> dict[str, Embedding]:
    """Return the word embedding by its path: values, codes, or the path of the head that it is tied to."""
    words = cast(nn.Embedding, base.get_input_embeddings())
    names = {module: path for path, module in base.named_modules()}
    head = base.get_output_embeddings() if _writes_text(base) else None
    if head is not None and head.weight is words.weight and not linear[names[head]].widths:
        return {names[words]: names[head]}
    return {names[words]: array(words.weight) if form == "float32" else rounded_rows(words.weight)}


@torch.no_grad()
def _quantized(
    whole: PeftModel, layers: Mapping[str, BayesLayer], name: str, unadapted: str, grids: Mapping[str, Grid]
) -> tuple[PreTrainedModel, ProductLayers]:
    """Take the adapter out, and return the model and its layers on codes."""
    adapted_parts(whole, name)[1].shrink(name)
    modules = whole.get_base_model().named_modules()
    trained = tuple(f"{key}." for key, module in modules if isinstance(module, AuxiliaryTrainingWrapper))
    learned_layers = {path: learned(layer, name) for path, layer in layers.items()}
    base = cast(PreTrainedModel, whole.unload())
    linear: dict[str, Product] = {}
    for path, module in base.named_modules():
        if path in learned_layers:
            linear[path] = learned_layers[path]
        elif isinstance(module, (nn.Linear, Conv1D)):
            is_plain = unadapted == "float32" or f"{path}.".startswith(trained)
            linear[path] = plain(module) if is_plain else rounded(module, grids.get(path))
    return base, ProductLayers(linear, _embeddings(base, linear, unadapted), in_blocks=_writes_text(base))


def _save(
    folder: Path, base: PreTrainedModel, products: ProductLayers, names: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the graph or graphs, the configuration and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    called, note = type(base).__name__, f"Written by bayeslora; {CARD_FILE} beside this file says how to run it."
    if is_encoder_decoder(base):
        both = EncoderDecoder(base, products)
        both.encoder().save(folder / ENCODER_FILE, called, *both.encoder_values, note)
        both.decoder().save(folder / DECODER_FILE, called, *both.decoder_values, note)
    else:
        writer = Decoder(base, products) if is_decoder(base) else Encoder(base, products, names)
        writer.write().save(folder / MODEL_FILE, called, writer.inputs, writer.outputs, note)
    base.config.architectures = [type(base).__name__]
    save_config(base, folder)
    tokenizer.save_pretrained(folder)


def _sizes(folder: Path, base: PreTrainedModel) -> dict[str, int]:
    return {
        "file_bytes": sum(path.stat().st_size for path in folder.glob("*.onnx")),
        "float32_bytes": 4 * sum(parameter.numel() for parameter in base.parameters()),
    }


def _check_error(result: Mapping[str, Any], *, are_learned: bool, allow_error: bool) -> None:
    """Raise if a merged graph computes something else than the model, or a decoder on codes is far from it."""
    error, largest = result["max_output_error"], result["max_output"]
    if allow_error or error is None:
        return
    if not are_learned and not error <= TOLERANCE * max(1.0, largest):
        raise BayesLoraError(
            f"outputs of the graph differ by {error:.2g}, where the largest is {largest:.2g}, but a merged graph must "
            "be exact: load the base in float32, or allow and measure the error with allow_error=True"
        )
    if "max_divergence" in result:
        check_divergence(result, "the graph")
