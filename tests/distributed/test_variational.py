"""Two ranks of a variational method: noise of their own, one function for a seed, a divergence that counts once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed import variational_worker as worker
from tests.processes import run_ranks


@pytest.fixture(scope="module", params=["melora", "blob"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks found, and what one process alone finds."""
    folder = tmp_path_factory.mktemp("ranks")
    first, second = run_ranks(worker.main, request.param, ranks=2, folder=folder)
    return first, second, worker.results(request.param, 0, 1)


def test_ranks_that_are_seeded_alike_draw_other_noise_and_each_can_replay_its_own(ranks: Any) -> None:
    first, second, _ = ranks
    assert not torch.allclose(first["fresh"], second["fresh"], atol=1e-2)
    for rank in (first, second):
        assert not torch.allclose(rank["fresh"], rank["again"], atol=1e-2)
        assert torch.equal(rank["fresh"], rank["replayed"])


def test_a_seed_gives_one_function_on_one_rank_and_on_two(ranks: Any) -> None:
    first, second, alone = ranks
    for name in ("seeded", "seeded_examples"):
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], alone[name])


def test_ranks_that_share_the_rows_predict_what_one_process_does(ranks: Any) -> None:
    first, second, alone = (found["predicted"] for found in ranks)
    assert alone.shape[1] == 10 and not torch.allclose(alone[0], alone[1], atol=1e-3)  # draws differ
    torch.testing.assert_close(first, alone[:, 0::2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(second, alone[:, 1::2], atol=1e-6, rtol=1e-5)


def test_checkpointing_recomputes_the_ranks_own_noise(ranks: Any) -> None:
    for rank in ranks:
        plain, *checkpointed = rank["checkpointed"]
        assert any(value.any() for name, value in plain.items() if "rho" in name or "_G" in name)
        for gradients in checkpointed:
            assert gradients.keys() == plain.keys()
            for name, value in plain.items():
                assert torch.equal(gradients[name], value), name


def test_the_divergence_counts_once_whatever_the_ranks_and_micro_batches(ranks: Any) -> None:
    first, second, alone = ranks
    assert any(value.any() for value in alone["penalty_gradients"].values())
    for name, value in alone["penalty_gradients"].items():
        for rank in (first, second):
            torch.testing.assert_close(rank["penalty_gradients"][name], value, atol=1e-7, rtol=1e-5, msg=name)


def test_two_ranks_give_the_update_of_one_process_at_the_mean(ranks: Any) -> None:
    first, second, alone = ranks
    for name, value in alone["trained"].items():
        assert torch.equal(first["trained"][name], second["trained"][name]), name
        torch.testing.assert_close(first["trained"][name], value, atol=2e-5, rtol=1e-4, msg=name)
