"""Ctrl-C leaves a checkpoint, and `--resume` ends where the uninterrupted run would have ended."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bayeslora.cli.main import main
from bayeslora.cli.progress import ProgressBar
from tests.cli.conftest import Setting
from tests.processes import start_command

STEPS = 30


def _options(setting: Setting, method: str, out: Path, steps: int = STEPS) -> list[str]:
    # Dropout makes the result depend on the random state, which resuming must restore too.
    more = ["--learning-rate", "0.01", "--max-steps", str(steps), "--lora-dropout", "0.1"]
    return [
        "train",
        "--method",
        method,
        *setting.options,
        *more,
        "--per-device-train-batch-size",
        "8",
        "--output-dir",
        str(out),
    ]


def _interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    original = ProgressBar.on_step_end

    def on_step_end(self: ProgressBar, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(ProgressBar, "on_step_end", on_step_end)


def _assert_same_weights(first: Path, second: Path) -> None:
    left, right = (load_file(run / "adapter_model.safetensors") for run in (first, second))
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize(("method", "number"), [("lora", signal.SIGINT), ("blora", signal.SIGTERM)])
def test_a_resumed_run_ends_exactly_where_an_uninterrupted_one_does(
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    method: str,
    number: signal.Signals,
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(_options(setting, method, whole)) == 0
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 11, number)  # in the second epoch, between two regular checkpoints
        capfd.readouterr()
        assert main(_options(setting, method, out)) == 130
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("bayeslora: interrupted; continue with `bayeslora train")
    assert not out.exists()
    assert (tmp_path / "out.partial" / "checkpoints" / "checkpoint-12").is_dir()
    command = last.split("`")[1].split()
    assert main(command[1:]) == 0
    _assert_same_weights(whole, out)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("limit", ["1", "2"])
def test_a_run_that_is_interrupted_after_its_last_step_takes_none_more(
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
) -> None:
    """With one checkpoint it begins again; a constant rate would move the weights in a step too many."""
    more = ["--lr-scheduler-type", "constant", "--save-steps", "4", "--save-total-limit", limit]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*_options(setting, "lora", whole, steps=12), *more]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("bayeslora.runs.train.finish", interrupted)
        assert main([*_options(setting, "lora", out, steps=12), *more]) == 130
    assert (tmp_path / "out.partial" / "checkpoints" / "checkpoint-12").is_dir()
    with warnings.catch_warnings(record=True) as said:
        assert main([*_options(setting, "lora", out, steps=12), *more, "--resume"]) == 0
    begins_again = any("checkpoint-12 is from after the last step" in str(each.message) for each in said)
    assert begins_again == (limit == "1")
    _assert_same_weights(whole, out)
    steps = [json.loads((run / "metrics.json").read_text())["steps"] for run in (whole, out)]
    assert steps == [12, 12]


def test_an_interrupted_run_is_not_overwritten_and_not_resumed_with_other_options(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    options = _options(setting, "lora", out, steps=4)
    with monkeypatch.context() as patch:
        _interrupt_at(patch, 1, signal.SIGINT)
        assert main(options) == 130
    before = sorted(path.name for path in (tmp_path / "out.partial" / "checkpoints").iterdir())
    assert "--resume" in refused(*options)
    line = refused(*options, "--resume", "--weight-decay", "0.5")
    assert "--weight-decay is 0.5" in line
    assert "None" in line
    line = refused(*options[:-2], "--lora-alpha", "4", "--output-dir", out, "--resume")
    assert "--lora-alpha is 4" in line
    assert "has 16" in line
    assert sorted(path.name for path in (tmp_path / "out.partial" / "checkpoints").iterdir()) == before
    assert main([*options, "--resume"]) == 0


def test_there_is_nothing_to_resume_without_an_interrupted_run(
    setting: Setting, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert "lacks an interrupted run" in refused(*_options(setting, "lora", tmp_path / "out"), "--resume")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_before_the_first_step_leaves_nothing(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("bayeslora.runs.train.load_base", interrupted)
    assert main(_options(setting, "lora", tmp_path / "out")) == 130
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_real_process(setting: Setting, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = _options(setting, "lora", out, steps=20_000)
    log = tmp_path / "log"
    process = start_command(log, tmp_path, *options, "--save-steps", "10", "--logging-steps", "10")
    try:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "out.partial" / "checkpoints").glob("checkpoint-*/trainer_state.json")):
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        process.join(300)
        assert process.exitcode == 130
    finally:
        process.kill()
        process.join()
    text = log.read_text()
    assert "Traceback" not in text
    assert "--resume" in text.splitlines()[-1]
    assert not out.exists()
    assert (tmp_path / "out.partial" / "config.yaml").is_file()
