"""The rounding benchmark: one file a task and seed, an adapter that is trained once, and what a file holds."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from pathlib import Path

import pytest
import rounding

from bayeslora.errors import BayesLoraError


def rows(count: int) -> str:
    words = ("good", "bad", "warm", "dull", "fine")
    texts = [
        (f"{words[i % 5]} film", f"the {words[(i * 3) % 5]} plot is not {words[(i * 2) % 5]}") for i in range(count)
    ]
    lines = [{"id": f"r{i}", "text_a": a, "text_b": b, "label": i % 2} for i, (a, b) in enumerate(texts)]
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def job(tmp_path: Path, tiny_bert_folder: Path) -> rounding.Job:
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte" / "train.jsonl").write_text(rows(40), encoding="utf-8")
    (tmp_path / "rte" / "dev.jsonl").write_text(rows(16), encoding="utf-8")
    given = Namespace(
        data_dir=tmp_path, adapters=tmp_path / "adapters", tasks=["rte"], seeds=[1], model=str(tiny_bert_folder),
        steps=2, results=tmp_path, only_cuts=False, without_cuts=False, scopes=rounding.SCOPES,
        settings=list(rounding.NAMED),
    )  # fmt: skip
    given.adapters.mkdir()
    ((path, found),) = rounding.jobs(given).items()
    assert path == tmp_path / f"rounding-{tiny_bert_folder.name}" / "rte-lora-1.json"
    return found


def test_cuts_alone_are_a_file_of_another_folder(job: rounding.Job) -> None:
    found = rounding.run(dataclasses.replace(job, only_cuts=True))
    assert "rounded" not in found and len(found["cut"]) == 8


def test_some_roundings_may_be_asked_for(job: rounding.Job) -> None:
    found = rounding.run(dataclasses.replace(job, scopes=("attention",), widths=((2, 4),), without_cuts=True))
    assert found["cut"] == []
    assert {(each["setting"], each["scope"]) for each in found["rounded"]} == {("W2A4", "attention")}
    assert len(found["rounded"]) == 4


def test_a_file_has_every_setting_and_the_adapter_is_trained_once(job: rounding.Job) -> None:
    found = rounding.run(job)
    assert json.loads(json.dumps(found)) and found["held_out"] == 16
    settings = {(each["setting"], each["output_bits"], each["scope"], each["rounding"]) for each in found["rounded"]}
    assert len(settings) == len(found["rounded"]) == 2 * (9 + 8)
    shares = {(each["setting"], each["scope"]): each["relative_bops"]["attention"] for each in found["rounded"]}
    assert shares["W2A4", "attention"] < shares["W8A8", "attention"] < found["lora"]["relative_bops"]["attention"]
    for each in found["rounded"]:
        assert each["bytes"]["model"] < found["lora"]["bytes"]["model"]
        assert {"accuracy", "nll", "ece"} <= each["scores"].keys()
    assert [each["mean_rank"] for each in found["cut"]] == [1, 1.5, 2, 4, 1, 2, 1, 1.5]
    assert [each["bytes"]["adapter"] < found["lora"]["bytes"]["adapter"] for each in found["cut"]] == [True] * 8
    trained = {path: path.read_bytes() for path in job.adapter.iterdir()}
    again = rounding.run(job)
    assert again == found and trained == {path: path.read_bytes() for path in job.adapter.iterdir()}
    with pytest.raises(BayesLoraError, match="training.json records training"):
        rounding.run(dataclasses.replace(job, steps=3))
