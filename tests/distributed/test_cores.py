"""Several cores on two ranks: each row has the member that it has in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import cores_worker as worker
from tests.processes import run_ranks


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["none", "closed_form"])
def test_two_ranks_train_the_members_of_one_process(variance: str, tmp_path: Path) -> None:
    first, second = run_ranks(worker.main, variance, ranks=2, folder=tmp_path)
    alone = worker.trained(variance, 0, 1)
    assert any("melora_M" in name for name in alone)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-3, msg=name)
    precisions = [value for name, value in alone.items() if "precision" in name]
    assert all((value.flatten(1).amax(1) > 0).all() for value in precisions)
    assert len(precisions) == (2 if variance == "closed_form" else 0)
