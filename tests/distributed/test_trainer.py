"""`attach(trainer)` under `torchrun`: two ranks give the update of one, with and without gradient accumulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.reference import used_by_weights

SCRIPT = Path(__file__).with_name("train_with_trainer.py")


def _train(folder: Path, ranks: int, batch: int, accumulation: int) -> list[dict[str, dict[str, Any]]]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    outcome = subprocess.run(
        [*command, str(SCRIPT), str(folder), str(batch), str(accumulation)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.mark.slow
def test_two_ranks_under_torchrun_give_the_update_of_one(tmp_path: Path) -> None:
    (alone,) = _train(tmp_path / "one", ranks=1, batch=8, accumulation=1)
    for name, batch, accumulation in (("two", 4, 1), ("two-accumulated", 1, 4)):
        results = _train(tmp_path / name, ranks=2, batch=batch, accumulation=accumulation)
        for kind, expected in alone.items():
            for key, value in expected["parameters"].items():
                first, second = (result[kind]["parameters"][key] for result in results)
                assert torch.equal(first, second), f"{kind}: {key} differs by rank"
                one, two = value, first
                if kind == "blora":
                    one, two = used_by_weights(key, one), used_by_weights(key, two)
                torch.testing.assert_close(two, one, atol=5e-5, rtol=1e-3, msg=f"{name}, {kind}: {key}")
            assert results[0][kind]["evaluation loss"] == pytest.approx(expected["evaluation loss"], rel=1e-4)
    logged = [entry for entry in alone["blora paper"]["history"] if "loss" in entry]
    assert logged and all("penalty_bits" in entry for entry in logged if entry["phase"] == 1)
