r"""Weigh the rows of a classifier's training by their class, so that rare classes count as much as frequent ones.

The loss of a batch of B rows becomes $\tfrac1B \sum_i w_{y_i} \ell_i$ with weights whose mean over the N training rows
is 1. (Torch's `CrossEntropyLoss(weight=…)` divides by the batch's own weights instead, so that a row counts more in a
batch with few heavy rows.) N times the expected loss is then $\sum_i w_{y_i} \ell_i$, the negative logarithm of
$\prod_i p(y_i | x_i)^{w_{y_i}}$, of N rows in all: a divergence of 1/N and the penalties of a method keep their
meaning, and N stays the number of rows. Only the classes' shares in the evidence change.

Squares of gradients, of which Me-LoRA's deviations and IVON's precisions are made, hold $w^2$ where the likelihood has
w: heavy rows make the posterior narrower than they should. So does B-LoRA's evidence from each step, while that of its
passes weighs all rows alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError

BALANCED = "balanced"


def class_weights(asked: Sequence[str], names: Sequence[str], counts: Sequence[int]) -> list[float]:
    """Return the weight of each class; their mean over the training rows is 1.

    Args:
        asked: `["balanced"]`, which gives all classes the same total, N / (C · rows of the class); or `NAME=WEIGHT`
            for some classes, the others weigh 1. Only the ratios of weights matter.
        names: class names by id.
        counts: training rows of each class.

    Raises:
        BayesLoraError: a name or a weight is unknown, a class is named twice, or all weights are 0.
    """
    if list(asked) == [BALANCED]:
        raw = [1 / count if count else 0.0 for count in counts]
    else:
        given = dict(_pair(each, names) for each in asked)
        if len(given) < len(asked):
            raise BayesLoraError(f"class_weights are {', '.join(asked)}, but may name each class once: drop one")
        raw = [given.get(name, 1.0) for name in names]
    total = sum(weight * count for weight, count in zip(raw, counts, strict=True))
    if not total:
        raise BayesLoraError("class_weights are 0 for all rows, but some must count: give a class a larger weight")
    return [weight * sum(counts) / total for weight in raw]


def _pair(text: str, names: Sequence[str]) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    try:
        weight = float(number) if equals else math.nan
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise BayesLoraError(f"class_weights has {text!r}, but takes balanced or NAME=WEIGHT: write bug=3,login=1")
    if name not in names:
        raise BayesLoraError(f"class_weights names {name!r}, but the classes are {', '.join(names)}: name one of them")
    return name, weight


@contextmanager
def weighed_classes(model: nn.Module, weights: Sequence[float]) -> Iterator[None]:
    """Weigh the loss that `model` returns in training mode, in a `with` block; in evaluation mode it stays as it is.

    Without weights it changes nothing.

    The factor of the model's own loss, 1/B or that of the whole batch under gradient accumulation, is kept.

    Args:
        model: returns a loss, the mean over rows of their cross-entropy, and logits (B, C) when given `labels` (B,).
        weights: (C,), or none.
    """

    def weigh(_: nn.Module, __: Any, given: dict[str, Any], output: Any) -> Any:
        labels = given.get("labels")
        if not model.training or labels is None or output.loss is None:
            return None
        losses = F.cross_entropy(output.logits.float(), labels, reduction="none")
        plain = losses.detach().sum()
        factor = output.loss.detach() / plain if plain > 0 else 1 / len(labels)
        of_rows: Tensor = losses.new_tensor(weights)[labels]
        output.loss = (factor * (of_rows * losses).sum()).to(output.loss.dtype)
        return output

    if not weights:
        yield
        return
    handle = model.register_forward_hook(weigh, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
