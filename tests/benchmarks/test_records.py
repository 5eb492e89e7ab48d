"""Result files: old ones read like new ones, and files of different settings are never mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from records import check_alike, check_settings, read_run, row_titles, spread, with_sampled

from bayeslora.errors import BayesLoraError

from .files import TRAINING, run


def saved(folder: Path, content: dict) -> Path:
    path = folder / "mrpc-lora-0.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_an_old_file_has_its_steps_and_rate_as_training(tmp_path: Path) -> None:
    old = run()
    for name in ("training", "model", "optimizer"):
        del old[name]
    path = saved(tmp_path, {**old, "steps": 345, "learning_rate": 1e-3})
    assert read_run(path)["training"] == TRAINING
    check_settings(path, {"training": TRAINING, "model": "minilm", "optimizer": {"name": "adamw"}})


@pytest.mark.parametrize("name", ["training", "optimizer", "target_modules", "model"])
def test_a_file_with_other_settings_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, run())
    changed = {
        "training": {**TRAINING, "steps": 300},
        "optimizer": {"name": "ivon"},
        "target_modules": [],
        "model": "x",
    }
    check_settings(path, {name: run()[name]})
    with pytest.raises(BayesLoraError, match="mrpc-lora-0.json.*" + name):
        check_settings(path, {name: changed[name]})


def test_an_adapter_with_other_options_is_refused_where_the_file_says_them(tmp_path: Path) -> None:
    check_settings(saved(tmp_path, run()), {"adapter": {"r": 8}})
    path = saved(tmp_path, {**run(), "adapter": {"r": 8}})
    check_settings(path, {"adapter": {"r": 8}})
    with pytest.raises(BayesLoraError, match=r"mrpc-lora-0.json records adapter \{.r.: 8\}"):
        check_settings(path, {"adapter": {"r": 4}})
    check_settings(path, {"adapter": {"r": 8, "an option since then": None}})
    with pytest.raises(BayesLoraError, match="adapter"):
        check_settings(path, {"adapter": {"r": 8, "an option since then": 0}})
    told = {**run(), "adapter": {"r": 8}, "file": "a.json"}
    check_alike([told, {**run(seed=1), "file": "b.json"}])
    with pytest.raises(BayesLoraError, match="adapter"):
        check_alike([told, {**run(seed=1), "adapter": {"r": 4}, "file": "b.json"}])


def test_a_file_that_is_not_there_is_no_conflict(tmp_path: Path) -> None:
    check_settings(tmp_path / "nothing.json", {"training": TRAINING})


def test_a_row_of_runs_of_different_length_is_refused() -> None:
    short = {**run(seed=1), "training": {**TRAINING, "steps": 260}, "file": "b.json"}
    with pytest.raises(BayesLoraError, match=r"b\.json.*a\.json"):
        check_alike([{**run(), "file": "a.json"}, short])


def test_mean_and_sample_deviation() -> None:
    assert spread([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert spread([1.5, None], 1) == "1.5"
    assert spread([None, float("nan")]) == "–"


def test_samples_are_a_row_of_their_own_behind_the_mean() -> None:
    melora = run("melora", sampled={"samples": 10, "scores": {"accuracy": 0.9}})
    both = with_sampled([melora])
    assert [each["scores"]["accuracy"] for each in both] == [0.8, 0.9]
    names = list(row_titles([melora]))
    assert names.index("melora-sampled") == names.index("melora") + 1
    assert row_titles([melora])["melora-sampled"] == "Me-LoRA, learned variances, 10 samples"
