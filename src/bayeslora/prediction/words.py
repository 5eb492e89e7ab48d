"""Logits of words, for models that tag each token of a text."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.vocabulary import STARTS


def word_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits (B, W, C) of W words in each row, taken at the first token of each word.

    `predict(model, batch, logits=word_logits)` then gives predictions for B · W words, row by row.

    Args:
        model: a token classifier.
        batch: the model's inputs, and `starts` (B, W), the positions of the words' first tokens.

    Raises:
        BayesLoraError: `starts` is missing, or the model does not tag tokens.
    """
    if STARTS not in batch:
        raise BayesLoraError(
            f"the batch has {', '.join(batch)}, but starts are needed: give the places of the words' first tokens"
        )
    starts = batch[STARTS]
    logits = model(**{name: value for name, value in batch.items() if name != STARTS}).logits
    if logits.ndim != 3:
        raise BayesLoraError(
            f"the model's logits have shape {tuple(logits.shape)}, but must be (batch, tokens, tags): load a token "
            "classifier"
        )
    rows = torch.arange(len(starts), device=starts.device)[:, None]
    found: Tensor = logits[rows, starts]
    return found
