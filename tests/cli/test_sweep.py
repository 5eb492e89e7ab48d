"""`train --seeds`: a run for each seed, which are those of single commands, and their comparison."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bayeslora.cli.main import main
from bayeslora.runs import train as runs
from tests.cli.conftest import Setting


def _options(setting: Setting, out: Path, *more: str) -> list[str]:
    return ["train", "--method", "lora", *setting.options, "--max-steps", "3", "--output-dir", str(out), *more]


def test_a_sweep_is_the_runs_of_its_seeds_and_their_comparison(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_options(setting, tmp_path / "out", "--seeds", "3,1")) == 0
    printed = capsys.readouterr().out
    assert "mean ± standard deviation over seeds" in printed and f"\n{tmp_path / 'out' / 'compare'}: these" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare", "seed-1", "seed-3"]
    table = json.loads((tmp_path / "out" / "compare" / "table.json").read_text())
    assert [group["seeds"] for group in table["groups"]] == [[1, 3]]
    assert main(_options(setting, tmp_path / "one", "--seed", "3")) == 0
    assert main(["compare", str(tmp_path / "out"), "--output-dir", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "table.json").read_text())
    assert [group["seeds"] for group in again["groups"]] == [[1, 3]]
    for name, tensor in load_file(tmp_path / "one" / "adapter_model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "out" / "seed-3" / "adapter_model.safetensors")[name], tensor)


def test_an_interrupted_sweep_goes_on_where_it_was(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = _options(setting, tmp_path / "out", "--seeds", "0,1,2")
    trained: list[int] = []
    whole = runs.train

    def counted(plan: runs.TrainPlan, bar: object) -> object:
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(plan.training_options["seed"])
        return whole(plan, bar)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "train", counted)
        assert main(options) == 130
    assert "go on with the same command and --resume" in capfd.readouterr().err
    before = (tmp_path / "out" / "seed-0" / "metrics.json").read_bytes()
    assert main([*options, "--resume"]) == 0
    assert (tmp_path / "out" / "seed-0" / "metrics.json").read_bytes() == before
    table = json.loads((tmp_path / "out" / "compare" / "table.json").read_text())
    assert [group["seeds"] for group in table["groups"]] == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--seeds", "0,0"], "must be different whole numbers below 2^32: write --seeds 0,1,2"),
        (["--seeds", "-1,2"], "must be different whole numbers"),
        (["--seeds", "0,x"], "--seeds"),
        (["--seeds", "0,1", "--seed", "2"], "--seed is given with --seeds, which lists all of them: leave one out"),
    ],
    ids=str,
)
def test_wrong_seeds_are_one_line_before_anything_is_made(
    more: list[str], sentence: str, setting: Setting, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert sentence in refused(*_options(setting, tmp_path / "out", *more))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_refused_before_the_first_run(
    setting: Setting, tmp_path: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "out" / "seed-1").mkdir(parents=True)
    line = refused(*_options(setting, tmp_path / "out", "--seeds", "0,1"))
    assert "seed-1 exists, but must be new" in line
    assert not (tmp_path / "out" / "seed-0").exists()


def test_the_folder_of_a_sweep_may_stand_in_its_file(setting: Setting, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(f"output_dir: {tmp_path / 'out'}\nmax_steps: 2\n", encoding="utf-8")
    assert main(["train", "--method", "lora", *setting.options, "--config", str(file), "--seeds", "0"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare", "seed-0"]
