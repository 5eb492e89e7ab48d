"""Choose the solved examples that a few-shot prompt shows before each question."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from bayeslora.data.choices import CHOICES, GROUP, LABEL, QUESTION, SUBJECT
from bayeslora.data.tasks import Task
from bayeslora.errors import BayesLoraError, counted

Row = Mapping[str, Any]


def few_shot_pool(task: Task) -> Dataset:
    """Return the split from which few-shot examples are taken: `few_shot` if the task has it, otherwise `train`."""
    return task.splits["few_shot"] if "few_shot" in task.splits else task.train_split


def examples_for(rows: Sequence[Row], pool: Dataset | None, count: int, seed: int | None = None) -> list[list[Row]]:
    """Choose for each row the first `count` rows of `pool` that are neither the row itself nor its twin.

    Where rows have a subject, examples share it. A pool that contains the question or a duplicate (as MMLU's dev split
    of college physics does) may give fewer; one warning counts the rows concerned.

    Args:
        rows: items with `question`, `choices`, and maybe `subject`.
        pool: rows with `label`; not needed for 0 examples.
        count: examples for each row.
        seed: seed of a permutation of the pool; None keeps its order.

    Raises:
        BayesLoraError: `count` is negative, or the pool is missing or has fewer rows.
    """
    if count < 0:
        raise BayesLoraError(f"few_shot is {count}, but must be at least 0: give the number of examples")
    if count == 0:
        return [[] for _ in rows]
    if pool is None or LABEL not in pool.column_names:
        raise BayesLoraError(f"few_shot is {count}, but a pool without answers was given: give rows with answers")
    candidates: list[Row] = list(pool)
    if seed is not None:
        candidates = [candidates[index] for index in np.random.default_rng(seed).permutation(len(candidates))]
    by_subject: dict[str | None, list[Row]] = {}
    totals = Counter(candidate.get(SUBJECT) for candidate in candidates)
    for candidate in candidates:
        first = by_subject.setdefault(candidate.get(SUBJECT), [])
        # One more than needed, since the question itself may be among them; duplicates count once.
        if len(first) <= count and not any(_same(candidate, other) for other in first):
            first.append(candidate)
    result, fewer = [], 0
    for row in rows:
        own = row.get(SUBJECT)
        shown = [example for example in by_subject.get(own, []) if not _same(example, row)][:count]
        if totals[own] < count:
            subject = f" of the subject {own!r}" if own else ""
            raise BayesLoraError(
                f"few_shot is {count}, but the pool has only {counted(totals[own], 'row')}{subject}: ask for "
                "fewer examples"
            )
        fewer += len(shown) < count
        result.append(shown)
    if fewer:
        warnings.warn(
            f"{fewer} of {len(rows)} rows get fewer than {count} examples because the pool contains the question "
            "itself or a duplicate",
            stacklevel=3,
        )
    return result


def _same(one: Row, other: Row) -> bool:
    """Return True for the same item or its twin (of one group), whose answer would give this one away."""
    if one.get(GROUP) is not None and one[GROUP] == other.get(GROUP):
        return True
    return bool(one[QUESTION] == other[QUESTION] and one[CHOICES] == other[CHOICES])
