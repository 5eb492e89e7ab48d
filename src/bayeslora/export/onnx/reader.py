"""An ONNX folder as a module, so that whatever scores a model scores a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeslora.errors import BayesLoraError, one_line

MODEL_FILE = "model.onnx"

_ERROR = 3  # onnxruntime's level, above the warnings about the processor


class OnnxClassifier(nn.Module):
    """A graph in onnxruntime, on the CPU.

    Args:
        folder: that `export` wrote with `format="onnx"`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERROR
        try:
            self.session = onnxruntime.InferenceSession(
                folder / MODEL_FILE, options, providers=["CPUExecutionProvider"]
            )
            self.config = AutoConfig.from_pretrained(folder)
        except Exception as error:  # the runtime raises what it meets
            raise BayesLoraError(f"{folder} cannot be loaded ({one_line(error)}): export it again") from error
        self.names = [each.name for each in self.session.get_inputs()]

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
        feeds = {name: np.ascontiguousarray(given[name].cpu().numpy().astype(np.int64)) for name in self.names}
        return SequenceClassifierOutput(logits=torch.from_numpy(self.session.run(None, feeds)[0]))
