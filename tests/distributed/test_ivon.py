"""IVON on two ranks is IVON on one: replicated with and without gradient accumulation, and sharded by FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import ivon_worker as worker
from tests.processes import run_ranks

KINDS = ("replicated", "accumulated", "sharded")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What two ranks found, and what one process alone finds."""
    folder = tmp_path_factory.mktemp("ivon-ranks")
    first, second = run_ranks(worker.main, ranks=2, folder=folder)
    return first, second, worker.train(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_update_of_one_and_the_same_bits(ranks: Any, kind: str) -> None:
    first, second, alone = ranks
    for what in ("weights", "deviations", "drawn"):
        for name, expected in alone[what].items():
            ours, theirs = first[kind][what][name], second[kind][what][name]
            assert torch.equal(ours, theirs), f"{what} of {name} differs by rank"
            torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5, msg=f"{what} of {name}")


def test_the_run_moves_means_and_deviations_and_leaves_what_has_no_gradient(ranks: Any) -> None:
    alone = ranks[2]
    initial = 1 / (16.0 * (0.1 + 1e-4)) ** 0.5
    for name, deviation in alone["deviations"].items():
        moved = (deviation - initial).abs().max() > 1e-2
        assert moved != name.startswith("idle"), name
    assert not torch.equal(alone["drawn"]["idle.weight"], alone["weights"]["idle.weight"])


def test_under_ddp_a_parameter_that_no_rank_used_takes_no_step(ranks: Any) -> None:
    assert ranks[2]["steps"]["idle.weight"] == 0 and ranks[2]["steps"]["first.weight"] == worker.STEPS
    assert ranks[0]["replicated"]["steps"] == ranks[2]["steps"]
