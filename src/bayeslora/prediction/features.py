"""Features of a classifier: the input of its head, the last linear layer, beside the logits of the same pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayeslora._peft import BaseTunerLayer
from bayeslora.errors import BayesLoraError
from bayeslora.prediction.predict import NO_BATCH, sampled_logits
from bayeslora.prediction.predictor import ModelPredictor, Predictable, as_predictor

_TOLERANCE = 1e-3


def features_and_logits(
    model: Predictable, loader_or_batch: Mapping[str, Any] | Iterable[Mapping[str, Any]]
) -> tuple[Tensor, Tensor]:
    """Return the features and the logits of a sequence classifier with its mean weights, from one pass over the data.

    The features are the inputs of the head's last linear layer: the pooled and transformed first token of BERT and
    RoBERTa, the last token of a decoder. A hook on that layer reads them, so the model itself chooses the token,
    whatever its architecture.

    Args:
        model: a sequence classifier, with or without an adapter, or a predictor around one, whose `model` is used.
        loader_or_batch: a batch or an iterable of batches, as for `predict`; labels are ignored.

    Returns:
        (n, d) features and (n, C) logits, float64 on the CPU, in the order of the rows.

    Raises:
        BayesLoraError: there are 0 batches, or the logits do not come straight from a linear layer of two or more
            classes.
    """
    plain = ModelPredictor(as_predictor(model).model)
    batches = iter([loader_or_batch] if isinstance(loader_or_batch, Mapping) else loader_or_batch)
    first = next(batches, None)
    if first is None:
        raise BayesLoraError(NO_BATCH)
    head, classes = _find_head(plain, first)
    found = _with_features(head, plain, itertools.chain([first], batches))
    return found[:, :-classes].clone(), found[:, -classes:].clone()


def _with_features(head: nn.Module, model: ModelPredictor, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """Return the (n, d + C) input and output of the head, at the token that the model predicts from."""
    with head.register_forward_hook(lambda _, inputs, output: torch.cat([inputs[0], output], dim=-1)):
        return sampled_logits(model, batches, 0)[0]


def _find_head(model: ModelPredictor, batch: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """Return the layer that the logits come from, and their number."""
    probe = {name: value[:2] if isinstance(value, Tensor) else value for name, value in batch.items()}
    last, expected, _ = last_layer(model, probe)
    classes = expected.shape[1]
    if last is not None and classes > 1 and last.out_features == classes:
        found, width = _with_features(last, model, [probe]), last.in_features + classes
        if found.shape[1] == width and torch.allclose(found[:, -classes:], expected, _TOLERANCE, _TOLERANCE):
            return last, classes
    raise BayesLoraError(
        f"the logits of {type(model.model).__name__} do not come straight from a linear layer of two or more classes, "
        "but its features are the input of one: use a sequence classifier"
    )


def last_layer(
    model: ModelPredictor, batch: Mapping[str, Any], kind: type[nn.Module] = nn.Module
) -> tuple[Any, Tensor, torch.dtype]:
    """Return the linear layer that runs last (or None), the logits (n, C), and the type of the layer's output.

    A wrapper with the attributes of a linear layer counts as one, unless `kind` leaves it out.
    """
    adapted = [module for module in model.model.modules() if isinstance(module, BaseTunerLayer)]
    # An adapted layer's output is a sum, which none of the layers inside it gives alone.
    inner = {part for layer in adapted for part in cast(nn.Module, layer).modules()} - set(adapted)
    called: list[tuple[nn.Module | None, torch.dtype]] = [(None, torch.float32)]
    with ExitStack() as hooks:
        for module in set(model.model.modules()) - inner:
            if isinstance(module, kind) and isinstance(getattr(module, "out_features", None), int):
                hook = module.register_forward_hook(lambda module, _, output: called.append((module, output.dtype)))
                hooks.enter_context(hook)
        logits = sampled_logits(model, batch, 0)[0]
    layer, dtype = called[-1]
    return layer, logits, dtype
