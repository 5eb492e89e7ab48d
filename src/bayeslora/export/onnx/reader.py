"""An ONNX folder as a module, so that whatever scores a model scores a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput, SequenceClassifierOutput
from transformers.utils import GENERATION_CONFIG_NAME

from bayeslora.errors import BayesLoraError, one_line

MODEL_FILE = "model.onnx"
ENCODER_FILE, DECODER_FILE = "encoder_model.onnx", "decoder_model.onnx"
"""Files of an encoder-decoder."""
CACHES = "past_key_values"
"""Beginning of the names of a decoder's inputs for keys and values."""


def _opened(folder: Path, file: str) -> tuple[onnxruntime.InferenceSession, Any]:
    """Load a graph and the configuration beside it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, above the warnings about the processor
    try:
        session = onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
        return session, AutoConfig.from_pretrained(folder)
    except Exception as error:  # the runtime raises what it meets
        raise BayesLoraError(f"{folder} cannot be loaded ({one_line(error)}): export it again") from error


def _inputs_of(session: onnxruntime.InferenceSession) -> tuple[list[str], dict[str, list[Any]]]:
    """Return the names of a graph's inputs, and the shapes of those for keys and values by name."""
    inputs = session.get_inputs()
    caches = {each.name: each.shape for each in inputs if each.name.startswith(CACHES)}
    return [each.name for each in inputs if each.name not in caches], caches


class OnnxClassifier(nn.Module):
    """The graph of an encoder with its classifier, in onnxruntime on the CPU.

    Args:
        folder: that `export` wrote with `format="onnx"`.

    Raises:
        BayesLoraError: files that are missing or damaged, or the graph of a decoder.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.session, self.config = _opened(folder, MODEL_FILE)
        self.names, caches = _inputs_of(self.session)
        if caches:
            raise BayesLoraError(
                f"{folder} has the graph of a language model, but the run needs a classifier's: give its own run"
            )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Return the logits (rows, classes) for ids, a mask and types (rows, tokens)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        given = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types}
        feeds = {name: _integers(given[name]) for name in self.names}
        return SequenceClassifierOutput(logits=torch.from_numpy(self.session.run(None, feeds)[0]))


class _Writer(PreTrainedModel, GenerationMixin):
    """Graphs that write text, in onnxruntime on the CPU, with the `generate` of Transformers."""

    device = torch.device("cpu")  # type: ignore[assignment]  # of inputs and outputs
    dtype = torch.float32  # type: ignore[assignment]  # of the logits and the caches
    session: onnxruntime.InferenceSession
    caches: Mapping[str, Any]

    def __init__(self, config: Any, folder: Path) -> None:
        super().__init__(config)
        self.config._attn_implementation = "onnx"  # unlike eager or sdpa, takes a mask of tokens alone
        if (folder / GENERATION_CONFIG_NAME).is_file():
            self.generation_config = GenerationConfig.from_pretrained(folder)

    def _logits(self, feeds: dict[str, Any], cache: Cache | None, rows: int) -> Tensor:
        """Run the graph behind the keys and values in a cache, which is grown, and return the logits."""
        feeds = feeds | _past(cache, self.caches, rows)
        logits, *present = self.session.run(["logits"] if cache is None else None, feeds)
        if cache is not None:
            _hold(cache, [torch.from_numpy(each) for each in present])
        return torch.from_numpy(logits)


class OnnxDecoder(_Writer):
    """The graph of a decoder, in onnxruntime on the CPU, with the `generate` of Transformers.

    Args:
        folder: that `export` wrote with `format="onnx"`.

    Raises:
        BayesLoraError: files that are missing or damaged, or the graph of a classifier.
    """

    def __init__(self, folder: Path) -> None:
        session, config = _opened(folder, MODEL_FILE)
        super().__init__(config, folder)
        self.session, (self.names, self.caches) = session, _inputs_of(session)
        if not self.caches:
            raise BayesLoraError(
                f"{folder} has the graph of a classifier, but the run needs a language model's: give its own run"
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Return the logits (rows, tokens, words) for new tokens behind those in a cache.

        Args:
            input_ids: new tokens, (rows, tokens).
            attention_mask: of the past and the new ones, (rows, past + tokens).
            position_ids: of the new ones, (rows, tokens).
            past_key_values: of the tokens before, a `DynamicCache`, which is grown.
            use_cache: return a cache even if none is given.
            return_dict: True, which `generate` gives.
        """
        rows, new = input_ids.shape
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        mask = input_ids.new_ones(rows, seen + new) if attention_mask is None else attention_mask
        if position_ids is None:  # Transformers counts padding too
            position_ids = torch.arange(seen, seen + new).expand(rows, new)
        given = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        feeds: dict[str, Any] = {name: _integers(given[name]) for name in self.names}
        cache = DynamicCache() if past_key_values is None and use_cache else past_key_values
        return CausalLMOutputWithPast(logits=self._logits(feeds, cache, rows), past_key_values=cache)


def _past(cache: Cache | None, caches: Mapping[str, Any], rows: int) -> dict[str, NDArray[np.float32]]:
    """Return the keys and values that the cache holds, by a graph's names; of no tokens where it holds none."""
    if cache is None or not cache.get_seq_length():
        return {name: np.zeros((rows, heads, 0, size), "float32") for name, (_, heads, _, size) in caches.items()}
    past = [each for layer in cast(Any, cache).layers for each in (layer.keys, layer.values)]
    return {name: each.contiguous().numpy() for name, each in zip(caches, past, strict=True)}


def _hold(cache: Cache, present: Sequence[Tensor]) -> None:
    """Make the cache hold these keys and values, which the graph has put behind those that it held."""
    layers: list[Any] = cache.layers
    for number, (keys, values) in enumerate(zip(present[::2], present[1::2], strict=True)):
        if number == len(layers) or not layers[number].is_initialized:
            cache.update(keys, values, number)
        else:
            layers[number].keys, layers[number].values = keys, values


class _Encoder(nn.Module):
    """The graph of an encoder, which returns keys and values of the text by the decoder's names."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        super().__init__()
        self.session, self.names = session, [each.name for each in session.get_outputs()]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        feeds = {"input_ids": _integers(input_ids), "attention_mask": _integers(attention_mask)}
        read = zip(self.names, self.session.run(None, feeds), strict=True)
        return {name.replace("present", CACHES): torch.from_numpy(each) for name, each in read if ".encoder." in name}


class OnnxEncoderDecoder(_Writer):
    """The two graphs of an encoder-decoder, in onnxruntime on the CPU, with the `generate` of Transformers.

    Args:
        folder: that `export` wrote with `format="onnx"`.

    Raises:
        BayesLoraError: files that are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        encoder, _ = _opened(folder, ENCODER_FILE)
        session, config = _opened(folder, DECODER_FILE)
        super().__init__(config, folder)
        self.session, self.reads = session, _Encoder(encoder)
        self.caches = {name: shape for name, shape in _inputs_of(session)[1].items() if ".decoder." in name}

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.reads

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: dict[str, Tensor] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> Seq2SeqLMOutput:
        """Return the logits (rows, tokens, words) for the tokens of answers behind those in a cache.

        Args:
            input_ids: texts, (rows, source); needed without `encoder_outputs`.
            attention_mask: of the texts.
            decoder_input_ids: new tokens of the answers, (rows, tokens).
            encoder_outputs: what the encoder has read.
            past_key_values: of the tokens before, which is grown.
            use_cache: as `generate` gives it; a cache is kept where one is given.
            return_dict: True, which `generate` gives.
        """
        if decoder_input_ids is None:
            raise BayesLoraError("decoder_input_ids is missing, but an encoder-decoder scores answers: give them")
        if attention_mask is None:
            attention_mask = torch.ones_like(cast(Tensor, input_ids))
        read = encoder_outputs or self.reads(input_ids, attention_mask)
        cache = None if past_key_values is None else past_key_values.self_attention_cache
        if past_key_values is not None and not past_key_values.get_seq_length():
            # Transformers counts T5's encoder layers.
            cache = past_key_values.self_attention_cache = DynamicCache()
        feeds = {name: each.contiguous().numpy() for name, each in read.items()}
        feeds |= {"input_ids": _integers(decoder_input_ids), "encoder_attention_mask": _integers(attention_mask)}
        logits = self._logits(feeds, cache, len(decoder_input_ids))
        return Seq2SeqLMOutput(logits=logits, past_key_values=past_key_values)


def _integers(values: Tensor) -> NDArray[np.int64]:
    return np.ascontiguousarray(values.cpu().numpy().astype(np.int64))
