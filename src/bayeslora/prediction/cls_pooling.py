"""Classifiers that read only the first token need only that one from their last block.

The heads of BERT and its relatives see `hidden_states[:, 0]` of the last block. Attention mixes tokens, what follows
it does not: from the attention's output layer on, the last block's work on all other tokens changes no logit. Over
many draws of the weights that is worth leaving out; a single pass is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from bayeslora.methods.tuner import tuner_of

_READ_FIRST_TOKEN = {"bert", "camembert", "deberta", "deberta-v2", "electra", "roberta", "xlm-roberta"}
"""Model types whose heads for sequences take the first token, and whose blocks have the place to cut at."""
_HEADS = ("ForSequenceClassification", "ForMultipleChoice")


def first_token_only(model: nn.Module) -> Any:
    """A context in which the last block of such a classifier works on the first token only; otherwise it does nothing.

    The logits are the same. Hidden states and attentions are not, so a model asked for those is left alone.
    """
    base: Any = getattr(tuner_of(model), "model", model)
    config = getattr(base, "config", None)
    if getattr(config, "model_type", None) not in _READ_FIRST_TOKEN or not type(base).__name__.endswith(_HEADS):
        return nullcontext()
    if getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False):
        return nullcontext()
    output = _last_attention_output(getattr(base, base.base_model_prefix, None))
    return nullcontext() if output is None else _cut(output)


def _last_attention_output(body: Any) -> nn.Module | None:
    blocks = getattr(getattr(body, "encoder", None), "layer", None)
    last = blocks[-1] if isinstance(blocks, nn.ModuleList) and len(blocks) else None
    output = getattr(getattr(last, "attention", None), "output", None)
    return output if isinstance(output, nn.Module) else None


@contextmanager
def _cut(output: nn.Module) -> Iterator[None]:
    def first(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg[:, :1] if isinstance(arg, Tensor) and arg.ndim == 3 else arg for arg in args)

    handle = output.register_forward_pre_hook(first)
    try:
        yield
    finally:
        handle.remove()
