r"""Bit-widths and ranks on one page: try every choice, and keep the best.

Reference for the tests, without the package's code. A problem has a table {bits: loss} for each tensor, a list of
component losses for each layer, and a cost: terms (amount, operand, operand, layer or None), an operand being a number
of bits or a tensor. Of k components that stay, the k dearest do.

    cost(widths, ranks) = sum over terms of amount * bits * bits * rank
    at a price:    minimise  loss + price * cost / baseline
    for a target:  minimise  loss  over all choices with  cost / baseline <= target
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple


class Problem(NamedTuple):
    tables: dict[tuple[str, str], dict[int, float]]
    components: dict[str, list[float]]
    terms: list[tuple[float, object, object, str | None]]
    baseline: float


class Choice(NamedTuple):
    widths: dict[tuple[str, str], int]
    ranks: dict[str, int]
    loss: float
    share: float


def share(problem: Problem, widths: dict[tuple[str, str], int], ranks: dict[str, int]) -> float:
    total = 0.0
    for amount, left, right, layer in problem.terms:
        total += (
            amount
            * (left if isinstance(left, int) else widths[left])
            * (right if isinstance(right, int) else widths[right])
            * (1 if layer is None else ranks[layer])
        )
    return total / problem.baseline


def loss(problem: Problem, widths: dict[tuple[str, str], int], ranks: dict[str, int]) -> float:
    of_widths = sum(problem.tables[tensor][bits] for tensor, bits in widths.items())
    of_ranks = sum(sum(sorted(problem.components[layer])[: len(problem.components[layer]) - kept])
                   for layer, kept in ranks.items())  # fmt: skip
    return of_widths + of_ranks


def choices(problem: Problem) -> Iterator[Choice]:
    tensors, layers = list(problem.tables), list(problem.components)
    for bits in itertools.product(*(problem.tables[tensor] for tensor in tensors)):
        widths = dict(zip(tensors, bits, strict=True))
        for kept in itertools.product(*(range(len(problem.components[layer]) + 1) for layer in layers)):
            ranks = dict(zip(layers, kept, strict=True))
            yield Choice(widths, ranks, loss(problem, widths, ranks), share(problem, widths, ranks))


def best_at_price(problem: Problem, price: float) -> Choice:
    return min(choices(problem), key=lambda choice: choice.loss + price * choice.share)


def best_for_target(problem: Problem, target: float) -> Choice:
    return min((choice for choice in choices(problem) if choice.share <= target), key=lambda choice: choice.loss)
