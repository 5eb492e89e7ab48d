"""The runners: what a row is, what a run is called, and that a run is done once."""

from __future__ import annotations

import fcntl
import json
from argparse import Namespace
from collections import Counter
from pathlib import Path

import glue
import pytest
import rows
from harness import once
from peft import AdaLoraConfig, get_peft_model
from records import GLUE_ROWS, GLUE_TASKS, IMPORTANCES

from tests.conftest import build_tiny_bert


def given(folder: Path, model: Path, **changes: object) -> Namespace:
    defaults = {
        "data_dir": folder, "tasks": None, "methods": list(rows.ROWS), "seeds": [0, 1, 2], "model": str(model),
        "ablation": False, "importances": list(IMPORTANCES), "select": False, "set": [], "results": folder,
    }  # fmt: skip
    return Namespace(**{**defaults, **changes})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    build_tiny_bert().config.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_every_row_has_a_title_and_every_task_as_many_steps_for_all_rows(tmp_path: Path, model: Path) -> None:
    assert list(GLUE_ROWS) == list(rows.ROWS)
    wanted = glue.jobs(given(tmp_path, model))
    assert len(wanted) == 3 * len(GLUE_TASKS) * len(GLUE_ROWS)
    for task in GLUE_TASKS:
        (steps,) = {job.training.steps for job in wanted.values() if job.task == task}
        assert steps >= 300


def test_files_keep_their_names_and_settings(tmp_path: Path, model: Path) -> None:
    wanted = glue.jobs(given(tmp_path, model, tasks=["cola"], methods=["lora", "blora-q+ra"], seeds=[1]))
    assert [str(path.relative_to(tmp_path)) for path in wanted] == [
        "glue-tiny/cola-lora-1.json",
        "glue-tiny/cola-blora-q+ra-1.json",
    ]
    job = next(iter(wanted.values()))
    assert job.target_modules == ["query", "key", "value", "dense"]
    assert job.settings["training"] == {"steps": 960, "learning_rate": 5e-4, "batch_size": 32, "max_length": 128}


def test_settings_have_every_option_of_the_adapter(tmp_path: Path, model: Path) -> None:
    wanted = glue.jobs(given(tmp_path, model, tasks=["sst2"], seeds=[0]))
    adapters = {job.method: job.settings["adapter"] for job in wanted.values()}
    assert adapters.pop("full") is None
    assert adapters["blora-q+ra"]["bit_penalty"] == rows.bayeslora.BLoraConfig().bit_penalty
    assert json.loads(json.dumps(adapters)) == adapters and all(each["peft_type"] for each in adapters.values())


def test_the_ablation_has_every_importance_where_the_hessian_moves(tmp_path: Path, model: Path) -> None:
    wanted = glue.jobs(given(tmp_path, model, ablation=True, seeds=[0]))
    hessians = Counter(job.optimizer["hess_init"] for job in wanted.values())
    assert hessians == {1e-2: len(IMPORTANCES), 1.0: 1}


def test_the_ablation_of_some_importances(tmp_path: Path, model: Path) -> None:
    wanted = glue.jobs(given(tmp_path, model, ablation=True, seeds=[0], tasks=["mrpc"], importances=["magnitude"]))
    assert [path.name for path in wanted] == ["mrpc-magnitude-moving-0.json"]


def test_selection_changes_the_field_that_has_the_name(tmp_path: Path, model: Path) -> None:
    changes = ["ivon.hess_init=0.5", "steps=7", "target_r=3"]
    chosen = given(tmp_path, model, tasks=["mrpc"], methods=["bayes_adalora"], seeds=[0], select=True, set=changes)
    (job,) = glue.jobs(chosen).values()
    assert (job.training.steps, job.optimizer["hess_init"], job.options["target_r"]) == (7, 0.5, 3)


def test_ranks_of_pefts_adalora_are_those_that_are_left() -> None:
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["query"], task_type="SEQ_CLS")
    adapted = get_peft_model(build_tiny_bert(), config)
    assert {layer.rank for layer in rows.describe(adapted)} == {0}
    for name, parameter in adapted.named_parameters():
        if "lora_E" in name:
            parameter.data[:3] = 1.0
    assert {layer.rank for layer in rows.describe(adapted)} == {3}


def test_a_run_is_done_once_and_leaves_no_claim(tmp_path: Path) -> None:
    path, calls = tmp_path / "results" / "a.json", []

    def run() -> dict:
        calls.append(1)
        return {"score": 1}

    once(path, run)
    once(path, run)
    assert len(calls) == 1
    assert json.loads(path.read_text(encoding="utf-8"))["score"] == 1
    assert [each.name for each in path.parent.iterdir()] == ["a.json"]


def test_a_claimed_run_is_left_to_its_owner_and_a_dead_claim_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    lock = tmp_path / "a.json.lock"
    with open(lock, "w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        once(path, lambda: {"score": 1})
        assert not path.exists()
    once(path, lambda: {"score": 2})
    assert json.loads(path.read_text(encoding="utf-8"))["score"] == 2


def test_a_failed_run_can_be_taken_up_again(tmp_path: Path) -> None:
    def fail() -> dict:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        once(tmp_path / "a.json", fail)
    once(tmp_path / "a.json", lambda: {"score": 1})
    assert (tmp_path / "a.json").exists()
