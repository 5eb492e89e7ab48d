"""An ONNX folder as a module, so that whatever scores a model scores a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_outputs import CausalLMOutput, Seq2SeqLMOutput, SequenceClassifierOutput

from bayeslora.errors import BayesLoraError, one_line

MODEL_FILE = "model.onnx"
ENCODER_FILE, DECODER_FILE = "encoder_model.onnx", "decoder_model.onnx"
"""Files of an encoder-decoder."""
CACHES = "past_key_values"
"""Beginning of the names of a decoder's inputs for keys and values."""

_ERROR = 3  # onnxruntime's level, above the warnings about the processor


class _OnnxModel(nn.Module):
    """A graph in onnxruntime, on the CPU.

    Args:
        folder: that `export` wrote with `format="onnx"`.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.session, self.config = _opened(folder, MODEL_FILE)
        inputs = self.session.get_inputs()
        self.names = [each.name for each in inputs if not each.name.startswith(CACHES)]
        self.caches = {each.name: each.shape for each in inputs if each.name.startswith(CACHES)}


def _opened(folder: Path, file: str) -> tuple[onnxruntime.InferenceSession, Any]:
    """Load a graph and the configuration beside it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERROR
    try:
        session = onnxruntime.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
        return session, AutoConfig.from_pretrained(folder)
    except Exception as error:  # the runtime raises what it meets
        raise BayesLoraError(f"{folder} cannot be loaded ({one_line(error)}): export it again") from error


class OnnxClassifier(_OnnxModel):
    """The graph of an encoder with its classifier, in onnxruntime on the CPU.

    Args:
        folder: that `export` wrote with `format="onnx"`.

    Raises:
        BayesLoraError: files that are missing or damaged, or the graph of a decoder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if self.caches:
            raise BayesLoraError(
                f"{folder} has the graph of a language model, but the run needs a classifier's: give its own run"
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Return the logits (rows, classes) for ids, a mask and types (rows, tokens)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        given = {"input_ids": input_ids, "attention_mask": mask, "token_type_ids": types}
        feeds = {name: _integers(given[name]) for name in self.names}
        return SequenceClassifierOutput(logits=torch.from_numpy(self.session.run(None, feeds)[0]))


class OnnxDecoder(_OnnxModel):
    """The graph of a decoder, in onnxruntime on the CPU; it reads whole texts, without a cache.

    Args:
        folder: that `export` wrote with `format="onnx"`.

    Raises:
        BayesLoraError: files that are missing or damaged, or the graph of a classifier.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        if not self.caches:
            raise BayesLoraError(
                f"{folder} has the graph of a classifier, but the run needs a language model's: give its own run"
            )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> CausalLMOutput:
        """Return the logits (rows, tokens, words) for ids, a mask and positions (rows, tokens)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if position_ids is None:  # Transformers counts padding too
            position_ids = torch.arange(input_ids.shape[1]).expand(input_ids.shape)
        given = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        feeds: dict[str, Any] = {name: _integers(given[name]) for name in self.names}
        for name, (_, heads, _, size) in self.caches.items():
            feeds[name] = np.zeros((len(input_ids), heads, 0, size), dtype=np.float32)
        return CausalLMOutput(logits=torch.from_numpy(self.session.run(["logits"], feeds)[0]))


class OnnxEncoderDecoder(nn.Module):
    """The two graphs of an encoder-decoder, in onnxruntime on the CPU; it reads whole answers, without a cache.

    Args:
        folder: that `export` wrote with `format="onnx"`.

    Raises:
        BayesLoraError: files that are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder, _ = _opened(folder, ENCODER_FILE)
        self.decoder, self.config = _opened(folder, DECODER_FILE)
        self.names = [each.name for each in self.encoder.get_outputs()]
        self.caches = {each.name: each.shape for each in self.decoder.get_inputs() if ".decoder." in each.name}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, decoder_input_ids: Tensor | None = None
    ) -> Seq2SeqLMOutput:
        """Return the logits (rows, length, words) for texts and a mask (rows, source), and answers (rows, length)."""
        if decoder_input_ids is None:
            raise BayesLoraError("decoder_input_ids is missing, but an encoder-decoder scores answers: give them")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        ids, shown = _integers(input_ids), _integers(mask)
        read = dict(zip(self.names, self.encoder.run(None, {"input_ids": ids, "attention_mask": shown}), strict=True))
        feeds = {name.replace("present", CACHES): values for name, values in read.items() if ".encoder." in name}
        for name, (_, heads, _, size) in self.caches.items():
            feeds[name] = np.zeros((len(ids), heads, 0, size), dtype=np.float32)
        feeds |= {"input_ids": _integers(decoder_input_ids), "encoder_attention_mask": shown}
        return Seq2SeqLMOutput(logits=torch.from_numpy(self.decoder.run(["logits"], feeds)[0]))


def _integers(values: Tensor) -> NDArray[np.int64]:
    return np.ascontiguousarray(values.cpu().numpy().astype(np.int64))
