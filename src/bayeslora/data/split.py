"""Split the rows of one file into those to train on and those to score."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from bayeslora.data.tables import Table
from bayeslora.errors import BayesLoraError, counted


@dataclass(frozen=True)
class HoldOut:
    """A random share of the training rows to hold out for evaluation.

    Attributes:
        fraction: share of the rows, between 0 and 1.
        group_column: column whose equal values keep rows together; by default, rows with the same text stay together.
        seed: seed of the draw.
    """

    fraction: float
    group_column: str | None = None
    seed: int = 0

    def rows(self, table: Table, classes: Sequence[Any], text_columns: tuple[str, ...]) -> list[int]:
        """Return the numbers of the rows of `table` to hold out; `classes` has the class of each row."""
        names = text_columns if self.group_column is None else (self.group_column,)
        values = list(zip(*(table.columns[name] for name in names), strict=True))
        # A row without a group or a text is a group of its own.
        units = [row if all(map(_is_blank, key)) else repr(key) for row, key in enumerate(values)]
        return held_out_rows(classes, units, self.fraction, self.seed, str(table.path))


def _is_blank(value: Any) -> bool:
    return value is None or value != value or not str(value).strip()


def held_out_rows(
    classes: Sequence[Hashable], units: Sequence[Hashable], fraction: float, seed: int = 0, what: str = "the file"
) -> list[int]:
    """Return the numbers of the rows to hold out, in their order: stratified by class, with whole units.

    Units are taken in a random order, whatever their size. One is held out if that brings the counts of its classes
    nearer to their targets: with n_c rows of class c in all, t_c = round(fraction n_c), at least 1 and at most
    n_c - 1, and h_c held out so far, if it lowers Σ_c (h_c - t_c)² / n_c. So single rows meet every target exactly.
    Every class keeps at least one training row. The same seed gives the same rows.

    Args:
        classes: class of each row; the same one for all rows of a regression.
        units: of each row, what must not be on both sides: a group, or its text.
        fraction: share to hold out, between 0 and 1.
        seed: of the random order.
        what: the file, in an error.

    Raises:
        BayesLoraError: `fraction` is outside (0, 1), or no unit can be held out.
    """
    if not 0 < fraction < 1:
        raise BayesLoraError(f"eval_fraction is {fraction:g}, but must be between 0 and 1: give 0.2 for a fifth")
    members: dict[Hashable, list[int]] = {}
    for row, unit in enumerate(units):
        members.setdefault(unit, []).append(row)
    counts = Counter(classes)
    targets = {name: min(max(1, round(fraction * n)), n - 1) for name, n in counts.items()}
    # random() is the same in every version of Python, which shuffle() and sample() need not be.
    generator = random.Random(seed)
    order = {unit: generator.random() for unit in members}
    held: list[int] = []
    taken: Counter[Hashable] = Counter()
    for unit in sorted(members, key=order.__getitem__):
        own = Counter(classes[row] for row in members[unit])
        change = sum(n * (n + 2 * (taken[name] - targets[name])) / counts[name] for name, n in own.items())
        if change < 0 and all(taken[name] + n < counts[name] for name, n in own.items()):
            taken += own
            held += members[unit]
    if not held:
        raise BayesLoraError(
            f"{what} has {counted(len(classes), 'row')} in {len(members):,} groups or different texts, but none "
            "can be held out with every class still in training: give an evaluation file, or more rows"
        )
    return sorted(held)
