"""`OUT.partial`: one process owns it, and a resumed run starts from its newest checkpoint that is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bayeslora.errors import BayesLoraError
from bayeslora.runs.partial import CHECKPOINTS, CONFIG_FILE, claimed, complete, last_checkpoint
from bayeslora.runs.plan import RunOptions, TrainPlan

STEPS = (8, 9, 10)  # numbers, not words: 10 is the newest


def plan(out: Path, resume: bool = False) -> TrainPlan:
    return TrainPlan(RunOptions(method="full", model="m", output_dir=str(out), resume=resume), {}, {"seed": 0}, None)


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """An interrupted run with three checkpoints."""
    with claimed(plan(tmp_path / "out")) as folder:
        for step in STEPS:
            checkpoint = folder / CHECKPOINTS / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            save_file({"a": torch.zeros(100)}, checkpoint / "adapter_model.safetensors")
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                torch.save({"state": torch.arange(500)}, checkpoint / name)
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_the_newest_checkpoint_is_taken(partial: Path) -> None:
    assert last_checkpoint(partial) == partial / CHECKPOINTS / "checkpoint-10"


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("optimizer.pt", cut),
        ("optimizer.pt", flip),
        ("scheduler.pt", cut),
        ("rng_state.pth", Path.unlink),
        ("rng_state.pth", cut),
        ("adapter_model.safetensors", cut),
        ("adapter_model.safetensors", Path.unlink),
        ("trainer_state.json", cut),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    partial: Path, name: str, harm: Callable[[Path], None]
) -> None:
    harm(partial / CHECKPOINTS / "checkpoint-10" / name)
    with pytest.warns(UserWarning, match="checkpoint-10 is damaged .* goes on from checkpoint-9"):
        assert last_checkpoint(partial) == partial / CHECKPOINTS / "checkpoint-9"


def test_an_unfinished_one_is_passed_over_and_without_a_whole_one_training_starts_again(partial: Path) -> None:
    (partial / CHECKPOINTS / "checkpoint-10" / "trainer_state.json").unlink()  # it is written last
    assert last_checkpoint(partial) == partial / CHECKPOINTS / "checkpoint-9"
    for step in STEPS:
        cut(partial / CHECKPOINTS / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.warns(UserWarning, match="checkpoint-9 is damaged .*, checkpoint-8 .* goes on from the beginning"):
        assert last_checkpoint(partial) is None


def test_another_number_of_processes_is_refused(partial: Path) -> None:
    for step in STEPS:
        checkpoint = partial / CHECKPOINTS / f"checkpoint-{step}"
        (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
        shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    with pytest.raises(BayesLoraError, match="1 processes are started, but .* had 2: start as many"):
        last_checkpoint(partial)


def test_a_second_run_in_the_folder_is_refused_while_the_first_one_trains(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claimed(plan(out)) as folder:
        for second in (plan(out), plan(out, resume=True)):
            # The lock is that of an open file, so a second opening stands for a second process.
            with pytest.raises(BayesLoraError, match="another process is training in"), claimed(second):
                pass
        complete(folder, out, keep_checkpoints=False)
    assert [path.name for path in out.iterdir()] == [CONFIG_FILE]
    assert not folder.exists()


def test_what_a_killed_process_was_writing_is_not_in_the_finished_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claimed(plan(out)) as folder:
        (folder / ".seconds.json.1234.partial").write_text("1")
        complete(folder, out, keep_checkpoints=False)
    assert [path.name for path in out.iterdir()] == [CONFIG_FILE]


@pytest.mark.parametrize("content", [None, ""], ids=["nothing", "an empty file"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_a_run_that_was_killed_at_once_is_taken_over(
    tmp_path: Path, content: str | None, resume: bool
) -> None:
    folder = tmp_path / "out.partial"
    folder.mkdir()
    if content is not None:
        (folder / CONFIG_FILE).write_text(content)
    with claimed(plan(tmp_path / "out", resume=resume)) as found:
        assert found == folder
        assert "method: full" in (folder / CONFIG_FILE).read_text()


def test_a_failure_leaves_only_what_can_be_resumed(partial: Path, tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="holds an interrupted run"), claimed(plan(tmp_path / "out")):
        pass
    with pytest.raises(RuntimeError), claimed(plan(tmp_path / "out", resume=True)):
        raise RuntimeError
    assert partial.is_dir()
    with pytest.raises(RuntimeError), claimed(plan(tmp_path / "new")):
        raise RuntimeError
    assert not (tmp_path / "new.partial").exists()
