"""Scores by cloze on one page: each choice alone, without padding, cache or batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def scores(
    model: nn.Module, tokenizer: Any, context: str, choices: list[str], normalization: str, ending: str = ""
) -> list[float]:
    """Log-likelihood of " choice" after `context`, or of `ending`, with which every choice then ends.

    For tokenizers that never merge across a space.
    """
    found = []
    for choice in choices:
        text = f"{context} {choice}"
        scored = ending or f" {choice}"
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
        end = len(ids)
        while int(ids[end - 1]) in (tokenizer.eos_token_id, tokenizer.sep_token_id):
            end -= 1
        first = len(tokenizer(text.removesuffix(scored))["input_ids"]) - (len(ids) - end)
        log_p = model(input_ids=ids[None, :end]).logits[0].double().log_softmax(-1)
        total = sum(float(log_p[place - 1, ids[place]]) for place in range(first, end))
        found.append(total / {"none": 1, "tokens": end - first, "bytes": len(scored.strip().encode())}[normalization])
    return found
