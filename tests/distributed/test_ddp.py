"""Two ranks, or four micro-batches, compute the update of one process that sees the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import worker
from tests.distributed.worker import BIT_PENALTY, RANK_PENALTY, STEPS, Run
from tests.methods.reference import used_by_weights
from tests.processes import run_ranks

MODES = [(gates, mode) for gates in ("evidence", "paper") for mode in ("q+ra", "q", "ra")]
SHARDED = [(*each, False) for each in MODES] + [("evidence", "q+ra", True), ("paper", "q+ra", True)]


def _run(run: Run, folder: Path) -> list[dict[str, Any]]:
    if not run.distributed:
        return [worker.train(run, 0)]
    return run_ranks(worker.main, run, ranks=run.ranks, folder=folder)


@pytest.fixture(scope="module", params=MODES, ids=" ".join)
def reference(request: pytest.FixtureRequest) -> tuple[tuple[str, str], dict[str, Any]]:
    gates, mode = request.param
    return request.param, worker.train(Run(1, 1, mode, gates), 0)


def _assert_same_update(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for result in results:
        assert result["parameters"].keys() == expected["parameters"].keys()
        for name, value in expected["parameters"].items():
            one, two = value, result["parameters"][name]
            if result["activations are fixed"]:
                one, two = used_by_weights(name, one), used_by_weights(name, two)
            torch.testing.assert_close(two, one, atol=2e-5, rtol=1e-4, msg=name)
        assert result["widths"] == expected["widths"] and result["ranks"] == expected["ranks"]


def test_the_reference_run_moves_gates_and_weights(reference: tuple[tuple[str, str], dict[str, Any]]) -> None:
    (gates, mode), expected = reference
    first, last = expected["logits"][0], expected["logits"][-1]
    assert all((last[name] - first[name]).abs().max() > 1e-2 for name in first)
    if gates == "evidence":
        assert "q" not in mode or len({bits for widths in expected["widths"] for bits in widths.values()}) >= 2
        assert mode != "ra" or sum(expected["ranks"]) == 5
        assert mode != "q+ra" or 0 < sum(expected["ranks"]) <= 5  # the price of bits closes further ranks
    assert all(value.isfinite().all() for value in expected["parameters"].values())


def test_four_micro_batches_give_the_update_of_one_batch(reference: tuple[tuple[str, str], dict[str, Any]]) -> None:
    (gates, mode), expected = reference
    _assert_same_update([worker.train(Run(1, 4, mode, gates), 0)], expected)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_two_ranks_give_the_update_of_one_process(
    reference: tuple[tuple[str, str], dict[str, Any]], accumulation: int, tmp_path: Path
) -> None:
    (gates, mode), expected = reference
    results = _run(Run(2, accumulation, mode, gates), tmp_path)
    _assert_same_update(results, expected)

    first, second = results
    for name, value in first["parameters"].items():
        torch.testing.assert_close(second["parameters"][name], value, atol=0, rtol=0, msg=f"{name} differs by rank")
    for step in range(STEPS):
        for ours, theirs, alone in zip(
            first["noise"][step], second["noise"][step], expected["noise"][step], strict=True
        ):
            assert torch.equal(ours, theirs) and torch.equal(ours, alone)
    for result in results:
        _assert_penalty_counted_once(result, STEPS // 2 if gates == "paper" else 0)


def _assert_penalty_counted_once(result: dict[str, Any], steps: int) -> None:
    """What was added to the gates' gradient in `steps` is that of the penalty written out here, once; else it is 0."""
    added = 0
    for logits, gradients in zip(result["logits"], result["penalty_gradients"], strict=True):
        if not any(gradient.any() for gradient in gradients.values()):
            continue
        added += 1
        for name, value in logits.items():
            value = value.clone().requires_grad_()
            if name.endswith(".gates"):
                shift = (2 / 3) * torch.log(torch.tensor(0.1 / 1.1))
                penalty = BIT_PENALTY * torch.sigmoid(value - shift).cumprod(-1).sum()
            else:
                penalty = RANK_PENALTY * torch.sigmoid(value[1:]).cumprod(0).sum()
            penalty.backward()
            torch.testing.assert_close(gradients[name], value.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert added == steps  # a quarter warms up, a quarter is frozen


@pytest.mark.parametrize(
    ("sharded", "accumulation", "runs"),
    [
        ("layers", 1, [("evidence", "q+ra", True), ("paper", "q+ra", False), ("evidence", "ra", False)]),
        pytest.param("layers", 4, SHARDED, marks=pytest.mark.slow),
        pytest.param("model", 1, SHARDED, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_that_share_the_parameters_give_the_update_of_one_process(
    sharded: str, accumulation: int, runs: list[tuple[str, str, bool]], tmp_path: Path
) -> None:
    """Under FSDP2: rotation, which mixes Adam's moments too, evidence and decisions gather what is shared."""
    given = [Run(2, accumulation, mode, gates, adam=adam, sharded=sharded) for gates, mode, adam in runs]
    results = run_ranks(worker.main_of_all, given, ranks=2, folder=tmp_path)
    for run in given:
        expected = worker.train(Run(1, 1, run.mode, run.gates, adam=run.adam), 0)
        first, second = (found[worker.name_of(run)] for found in results)
        _assert_same_update([first, second], expected)
        for name, value in first["parameters"].items():
            assert torch.equal(second["parameters"][name], value), f"{worker.name_of(run)}: {name} differs by rank"
        assert first["steps counted"] == expected["steps counted"]
        _assert_penalty_counted_once(first, STEPS // 2 if run.gates == "paper" else 0)


@pytest.mark.parametrize("gates", ["evidence", "paper"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_adam_counts_the_same_steps_under_ddp_as_in_one_process(ranks: int, gates: str, tmp_path: Path) -> None:
    """DDP gives gates and ranges a gradient of zeros in every step, but they have an optimizer state as of LEARN."""
    alone = worker.train(Run(1, 1, "q+ra", gates, adam=True), 0)
    results = _run(Run(ranks, 1, "q+ra", gates, adam=True, wrapped=True), tmp_path)
    _assert_same_update(results, alone)
    for result in results:
        assert result["steps counted"] == alone["steps counted"]
        assert result["widths"] == alone["widths"]
    # Evidence moves gates and the base weight's range without a gradient.
    learned = ".log_ranges" if gates == "evidence" else ".blora_quantizers."
    gated = {name: steps for name, steps in alone["steps counted"].items() if learned in name}
    assert gated and set(gated.values()) == {STEPS // 2}  # a quarter warms up, a quarter is frozen
    assert {steps for name, steps in alone["steps counted"].items() if ".blora_A." in name} == {STEPS}


def test_ranks_that_see_other_activations_choose_alike(tmp_path: Path) -> None:
    """Ranges of activations depend on how a batch is divided, but never on the rank."""
    first, second = _run(Run(2, 2, "q+ra", activations=True), tmp_path)
    assert first["widths"] == second["widths"] and first["ranks"] == second["ranks"]
    assert all(torch.equal(value, second["parameters"][name]) for name, value in first["parameters"].items())
