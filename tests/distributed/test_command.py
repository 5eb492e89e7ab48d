"""`bayeslora train` in two processes, as torchrun starts them: one folder, one report, the weights of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bayeslora.cli.main import main
from tests.cli.conftest import review_rows, write_jsonl
from tests.methods.reference import used_by_weights
from tests.processes import start_commands

GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, tiny_bert_folder: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    train = write_jsonl(folder / "train.jsonl", review_rows(64, seed=0))
    dev = write_jsonl(folder / "dev.jsonl", review_rows(20, seed=1))
    files = ["--train-file", str(train), "--eval-file", str(dev), "--text-column", "text"]
    return ["train", "--model", str(tiny_bert_folder), *files, "--use-cpu", "true", "--disable-tqdm"]


def _batch(processes: int) -> list[str]:
    return ["--per-device-train-batch-size", str(GLOBAL_BATCH // processes)]


def _run(folder: Path, *arguments: str, ranks: int = 2) -> list[tuple[int | None, str]]:
    """Run the command in `ranks` processes; returns the status of each and what it printed."""
    logs = [folder / f"log{rank}" for rank in range(ranks)]
    processes = start_commands(logs, folder, *arguments)
    try:
        for process in processes:
            process.join(300)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [(process.exitcode, log.read_text()) for process, log in zip(processes, logs, strict=True)]


def _largest_difference(first: Path, second: Path, by_weights: bool = False) -> float:
    left, right = (load_file(run / "adapter_model.safetensors") for run in (first, second))
    assert left.keys() == right.keys()
    left = {key: value for key, value in left.items() if not key.endswith("evidence.passes")}  # that counts batches
    if by_weights:  # gates that are far from closing have no effect
        left, right = ({key: used_by_weights(key, value) for key, value in each.items()} for each in (left, right))
    return max(float((left[key].float() - right[key].float()).abs().max()) for key in left if left[key].numel())


def test_two_processes_end_in_one_folder_with_the_weights_of_one(options: list[str], tmp_path: Path) -> None:
    lora = [*options, "--method", "lora", "--optim", "sgd", "--learning-rate", "0.1", "--max-steps", "6"]
    assert main([*lora, *_batch(1), "--output-dir", str(tmp_path / "one")]) == 0
    before = set(tmp_path.iterdir())
    found = _run(tmp_path, *lora, *_batch(2), "--output-dir", "two")
    assert [status for status, _ in found] == [0, 0], found
    assert "two: accuracy" in found[0][1] and not found[1][1]
    assert set(tmp_path.iterdir()) - before == {tmp_path / name for name in ("two", "log0", "log1")}
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert _largest_difference(tmp_path / "one", tmp_path / "two") < 1e-6
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert two["scores"] == pytest.approx(one["scores"], abs=1e-5)
    assert two["steps"] == one["steps"] == 6


def test_a_mistake_is_told_once_and_leaves_nothing(options: list[str], tmp_path: Path) -> None:
    found = _run(tmp_path, *options, "--method", "lora", "--label-column", "stars", "--output-dir", "out")
    assert [status for status, _ in found] == [2, 2], found
    assert "'stars'" in found[0][1] and len(found[0][1].splitlines()) == 1 and not found[1][1]
    assert {path.name for path in tmp_path.iterdir()} == {"log0", "log1"}


@pytest.mark.slow
def test_an_interrupted_run_of_two_processes_resumes_with_as_many(options: list[str], tmp_path: Path) -> None:
    """The signal reaches one of them only."""
    long = [*options, "--method", "lora", *_batch(2), "--lora-dropout", "0.1", "--output-dir", "out"]
    long += ["--max-steps", "4000", "--save-steps", "10"]
    logs = [tmp_path / "log0", tmp_path / "log1"]
    processes = start_commands(logs, tmp_path, *long)
    checkpoints = tmp_path / "out.partial" / "checkpoints"
    try:
        deadline = time.monotonic() + 200
        while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
            assert all(process.is_alive() for process in processes), logs[0].read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert processes[1].pid is not None
        os.kill(processes[1].pid, signal.SIGTERM)
        for process in processes:
            process.join(100)
        assert [process.exitcode for process in processes] == [130, 130]
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert "continue with" in logs[0].read_text()
    ((status, said),) = _run(tmp_path, *long, "--resume", ranks=1)
    assert status == 2 and "1 processes are started, but the interrupted run in" in said


@pytest.mark.slow
@pytest.mark.parametrize("method", ["blora", "bayes_adalora", "dylora", "melora", "blob"])
def test_every_method_trains_in_two_processes(options: list[str], tmp_path: Path, method: str) -> None:
    run = [*options, "--method", method, "--max-steps", "30", "--learning-rate", "0.01"]
    # B-LoRA's ranges of activations are means over the batches of single processes: its widths are left out.
    run += {"bayes_adalora": ["--importance", "sensitivity"], "blora": ["--mode", "ra"]}.get(method, [])
    assert main([*run, *_batch(1), "--output-dir", str(tmp_path / "one")]) == 0
    found = _run(tmp_path, *run, *_batch(2), "--output-dir", "two")
    assert [status for status, _ in found] == [0, 0], found
    if method in ("melora", "blob"):  # noise is a row's own, so that ranks draw other noise than one does
        weights = load_file(tmp_path / "two" / "adapter_model.safetensors")
        assert all(torch.isfinite(value).all() for value in weights.values())
    else:
        assert _largest_difference(tmp_path / "one", tmp_path / "two", method == "blora") < 1e-4


@pytest.mark.slow
def test_torchrun_starts_the_command(options: list[str], tmp_path: Path) -> None:
    launcher: list[Any] = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "bayeslora", *options, "--method", "melora", "--rank", "4", "--max-steps", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    whole = [*launcher, *command, "--output-dir", "out"]
    outcome = subprocess.run(whole, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    assert outcome.stdout.count("out: accuracy") == 1
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4
