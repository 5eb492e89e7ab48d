"""Activation functions that become part of the product before them, in models of integer codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from bayeslora.runtime.integer_linear import IntegerLinear

_BERT_BLOCKS = {"bert", "camembert", "deberta", "deberta-v2", "electra", "roberta", "vit", "xlm-roberta"}
"""Model types whose blocks have nothing but GELU between `intermediate.dense` and `output.dense`."""


def fuse_activations(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """In blocks like BERT's, let a feed-forward network's first product return the codes that its second one reads.

    What lies between the two is then never written in more than 8 bits, and the activation function and the rounding
    are part of the product. `dtype` is that of what lies between the other layers.
    """
    if getattr(model.config, "model_type", None) not in _BERT_BLOCKS:
        return
    for block in model.modules():
        inner: Any = getattr(block, "intermediate", None)
        first, second = getattr(inner, "dense", None), getattr(getattr(block, "output", None), "dense", None)
        if not (isinstance(first, IntegerLinear) and isinstance(second, IntegerLinear)):
            continue
        is_gelu = type(getattr(inner, "intermediate_act_fn", None)) is GELUActivation
        if is_gelu and first.can_feed(second):
            first.feed(second, dtype)
            inner.intermediate_act_fn = nn.Identity()
