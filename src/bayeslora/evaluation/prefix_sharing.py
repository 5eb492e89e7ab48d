"""Run a model once over the beginning that several prompts share.

The five examples before the questions of one MMLU subject are most of each prompt. What a causal model computes for
them does not depend on what follows, so a batch of such prompts needs it once: its keys and values become the cache of
all rows. This holds for any model that is the same function in both passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

LEAST_SHARED = 0.5
"""Minimum share of a prompt: with less in common, padding and a second pass cost more than they save."""
LEAST_ROWS = 8
"""Minimum number of rows in a group: smaller batches cost more than they save."""


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens that two rows share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def rows_that_begin_alike(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return groups of row indices; the rows of a group share at least half of the longest one.

    Rows of groups that are too small are together in the last entry, which may be empty.
    """
    order = sorted(range(len(rows)), key=lambda index: list(rows[index]))
    groups: list[list[int]] = []
    shared = longest = 0
    for index in order:
        row = rows[index]
        start = min(shared, common_start(rows[groups[-1][0]], row)) if groups else 0
        most = max(longest, len(row))
        if groups and start >= LEAST_SHARED * most:
            groups[-1].append(index)
            shared, longest = start, most
        else:
            groups.append([index])
            shared = longest = len(row)
    large = [group for group in groups if len(group) >= LEAST_ROWS]
    return [*large, [index for group in groups if len(group) < LEAST_ROWS for index in group]]


def split_at_common_start(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Split a padded batch (B, T) into its common beginning (P,) and the rest: ids and mask (B, W), left-padded.

    Every row keeps at least one token. Return None for a single row, or if less than half is common.
    """
    rows = [row[kept.bool()] for row, kept in zip(ids, mask, strict=True)]
    longest, shortest = max(map(len, rows)), min(map(len, rows))
    if len(rows) < 2 or shortest < 2:
        return None
    alike = (torch.stack([row[: shortest - 1] for row in rows]) == rows[0][: shortest - 1]).all(dim=0)
    common = int(alike.long().cumprod(dim=0).sum())
    if common < LEAST_SHARED * longest:
        return None
    width = longest - common
    rest, kept = ids.new_zeros(len(rows), width), mask.new_zeros(len(rows), width)
    for index, row in enumerate(rows):
        start = width - (len(row) - common)
        rest[index, start:] = row[common:]
        kept[index, start:] = 1
    return rows[0][:common], rest, kept


def cache_of(model: nn.Module, start: Tensor, rows: int, **options: Any) -> Any:
    """Return a cache with the keys and values of the tokens `start` (P,), repeated for `rows` rows.

    Return None if padding between the beginning and a shorter rest would change the result: layers with a window count
    it, and recurrent layers read it.
    """
    cache = getattr(model(input_ids=start.unsqueeze(0), use_cache=True, **options), "past_key_values", None)
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.batch_repeat_interleave(rows)
    return cache
