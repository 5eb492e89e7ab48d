"""Outputs in places where they would destroy something, or cannot be: refused in one line, with nothing changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bayeslora.cli.main import main
from tests.cli.conftest import Setting


@pytest.mark.parametrize("name", ["run.json", "adapter_model.safetensors", "config.yaml", "README.md"])
def test_predictions_do_not_replace_the_files_of_a_run(
    runs: dict[str, Path], setting: Setting, tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["lora"], run)
    before = (run / name).read_bytes()
    said = refused("predict", run, f"--input={setting.dev}", f"--output={run / name}")
    assert f"--output is {run / name}, but must not be a file of a run" in said
    assert (run / name).read_bytes() == before
    for _ in range(2):  # answers may lie in the folder
        assert main(["predict", str(run), f"--input={setting.dev}", f"--output={run / 'answers.jsonl'}"]) == 0


@pytest.mark.parametrize("folder", ["", ".", "/", "/proc/out", "/dev/null/out"])
def test_a_run_that_cannot_lie_there_is_refused(setting: Setting, refused: Callable[..., str], folder: str) -> None:
    said = refused("train", "--method=lora", *setting.options, f"--output-dir={folder}", "--max-steps=1")
    assert "exists, but must be new" in said or "cannot be used" in said
