"""The patterns of the papers: said to hold where they do, and not where they do not."""

from __future__ import annotations

import pytest
from patterns import (
    adapter_bits_are_low,
    attention_bops_at_most,
    base_has_more_bits,
    head_is_untouched,
    later_layers_have_more_rank,
    many_matrices_at_rank_one,
    not_below,
    value_has_more_bits,
    value_has_more_rank,
)

from .files import layer, run

GOOD = [
    layer(0, "query", 1, A=2, E=4, B=4), layer(0, "key", 1, A=2, E=4, B=4), layer(0, "value", 4, A=4, E=4, B=4),
    layer(1, "query", 2, A=2, E=4, B=4), layer(1, "key", 2, A=2, E=4, B=4), layer(1, "value", 8, A=8, E=4, B=4),
]  # fmt: skip
BAD = [layer(block, matrix, 8 - block) for block in (0, 1) for matrix in ("query", "key", "value")]
PATTERNS = [
    value_has_more_rank,
    value_has_more_bits,
    later_layers_have_more_rank,
    many_matrices_at_rank_one,
    adapter_bits_are_low,
    base_has_more_bits,
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_holds_where_it_does(pattern) -> None:
    assert pattern([run(layers=GOOD)]).holds is True
    assert pattern([run(layers=BAD)]).holds is False
    assert pattern([run(layers=[])]).holds is None


def test_the_numbers_are_those_of_the_layers() -> None:
    assert value_has_more_rank([run(layers=GOOD)]).seen == "V 6.00, Q 1.50, K 1.50"
    assert later_layers_have_more_rank([run(layers=GOOD)]).seen == "second half 4.00, first half 2.00"
    assert many_matrices_at_rank_one([run(layers=GOOD)]).seen == "33%"


def test_an_adapted_head_is_named() -> None:
    assert head_is_untouched([run(layers=GOOD)]).holds is True
    touched = head_is_untouched([run(layers=[{**GOOD[0], "name": "classifier"}])])
    assert touched.holds is False and touched.seen == "classifier"


def test_methods_are_compared_on_the_seeds_that_both_have() -> None:
    runs = [run("lora", 0, 0.80), run("lora", 1, 0.99), run("blora-q+ra", 0, 0.796)]
    assert not_below(runs, "blora-q+ra", "lora", 0.5).holds is True
    assert not_below(runs, "blora-q+ra", "lora", 0.3).holds is False
    assert not_below(runs, "blora-q+ra", "lora", 0.5).seen == "-0.40 points over 1 task"
    assert not_below(runs, "adalora", "lora", 0.5).holds is None


def test_bit_operations_are_averaged_over_tasks() -> None:
    other = run("blora-q+ra", task="cola", relative_bops={"attention": 0.15})
    runs = [run("blora-q+ra", 0), run("blora-q+ra", 1), other]
    assert attention_bops_at_most(runs, "blora-q+ra", 0.2).holds is True
    assert attention_bops_at_most(runs[:2], "blora-q+ra", 0.2).holds is False
