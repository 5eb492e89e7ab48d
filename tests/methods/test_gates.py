"""The gates of a layer in numbers: what the decision used, before and after a cut, and in a file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from peft import PeftModel
from torch import nn

from bayeslora import GateDescription, describe, shrink
from tests.conftest import build_tiny_bert
from tests.methods.evidence_models import EXAMPLES, trained

KINDS = ["weight", "A", "E", "B", "A_out", "E_out", "out"]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()


def test_every_gate_has_its_numbers_and_their_probability(model: nn.Module) -> None:
    for layer in describe(model):
        names = [(gate.kind, gate.gate) for gate in layer.gates]
        assert names == [(kind, bits) for kind in KINDS for bits in (4, 8, 16, 32)] + [("rank", i) for i in range(4)]
        for gate in layer.gates:
            assert gate.delta >= 0 and gate.saving >= 0 and gate.price > 0
            logit = EXAMPLES * (gate.delta - gate.price * gate.saving)
            assert gate.probability == pytest.approx(1 / (1 + math.exp(-logit)))
            if gate.kind != "rank":
                assert gate.is_open == (layer.bits[gate.kind] >= gate.gate)
        assert sum(gate.is_open for gate in layer.gates if gate.kind == "rank") == layer.rank


def test_under_a_price_a_width_is_open_where_its_evidence_exceeds_what_it_saves() -> None:
    """The first gate of a tensor at 2 bits is not worth the price, nor are the wider ones taken together."""
    model = trained(target_bops=None, bops_price=0.5, mode="q")
    for layer in describe(model):
        assert {gate.price for gate in layer.gates} == {0.5}
        for kind in KINDS:
            gates = [gate for gate in layer.gates if gate.kind == kind]
            lost = sum(gate.delta - gate.price * gate.saving for gate in gates if not gate.is_open)
            kept = sum(gate.delta - gate.price * gate.saving for gate in gates if gate.is_open)
            assert lost <= 1e-6 and kept >= -1e-6


def test_fixed_widths_and_unlearned_halves_have_no_gates() -> None:
    kinds = {gate.kind for layer in describe(trained(fixed_bits={"A": 4})) for gate in layer.gates}
    assert kinds == {*KINDS, "rank"} - {"A"}
    ranks = [gate for layer in describe(trained(mode="ra", target_bops=None)) for gate in layer.gates]
    assert [(gate.kind, gate.price, gate.saving) for gate in ranks] == [("rank", pytest.approx(1e-3), 1 / 4)] * 16


def test_a_rank_that_bit_operations_decide_counts_in_these() -> None:
    found = describe(trained(target_bops=None, bops_price=0.5, rank_price=1e-9))
    ranks = [gate for layer in found for gate in layer.gates if gate.kind == "rank"]
    assert {gate.price for gate in ranks} == {0.5} and {gate.is_open for gate in ranks} == {True, False}
    assert all(gate.is_open == (gate.delta > gate.price * gate.saving) for gate in ranks)


def test_without_a_decision_there_are_no_gates() -> None:
    for model in (trained(steps=6), trained(gates="paper", target_bops=None)):
        for layer in describe(model):
            assert layer.gates == [] and "gates" not in layer.to_dict()


def test_without_the_number_of_examples_there_are_no_probabilities() -> None:
    assert {gate.probability for layer in describe(trained(num_examples=None)) for gate in layer.gates} == {None}


def test_components_keep_their_numbers_when_they_are_cut_and_in_a_file(tmp_path: Path) -> None:
    model = trained(target_rank=1.5, target_bops=None, bops_price=0.0)
    before = [layer.gates for layer in describe(model)]
    ranks = shrink(model)
    assert sum(ranks.values()) == 6 and shrink(model) == ranks, "the second cut finds nothing to cut"
    assert [layer.gates for layer in describe(model)] == before
    assert isinstance(before[0][-1], GateDescription)
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(build_tiny_bert(), tmp_path)
    assert [layer.gates for layer in describe(read)] == before
