"""Data of one row through the commands: what they say of one thing is not in the plural."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bayeslora.cli.main import main
from bayeslora.errors import counted
from tests.cli.conftest import Setting, write_jsonl
from tests.runs.text_runs import pairs

PLURAL = re.compile(r"(?<!of )(?<![\w.,])1 [a-z]+s\b(?! (is|was)\b)")
ROW: dict[str, object] = {"text": "the movie was good", "label": 1}


def test_a_number_has_its_noun() -> None:
    assert [counted(number, "row") for number in (0, 1, 2, 2000)] == ["0 rows", "1 row", "2 rows", "2,000 rows"]


def test_one_row_is_not_called_rows(
    runs: dict[str, Path], setting: Setting, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", [ROW])
    two = write_jsonl(tmp_path / "two.jsonl", [ROW, {**ROW, "label": 0}])
    talk = write_jsonl(tmp_path / "talk.jsonl", pairs(1))
    run = ["--text-column=text", f"--output-dir={tmp_path / 'out'}", "--max-steps=1"]
    drawn = ["--samples=1", str(runs["melora"])]
    capfd.readouterr()
    for words in (
        ["inspect", str(two), f"--model={setting.model}", "--max-length=3", f"--eval-file={one}"],
        ["inspect", str(talk)],
        ["train", "--method=melora", f"--model={setting.model}", f"--train-file={two}", f"--eval-file={one}", *run]
        + ["--samples=1"],
        ["evaluate", *drawn, f"--eval-file={one}"],
        ["predict", *drawn, f"--input={one}", f"--output={tmp_path / 'answers.jsonl'}"],
        ["select", *drawn, "--score=entropy", "--budget=1", f"--input={one}", f"--output={tmp_path / 'chosen.jsonl'}"],
        ["plan", f"--model={setting.model}", "--method=lora"],
    ):
        assert main(words) == 0, capfd.readouterr().err
        said = capfd.readouterr()
        assert not PLURAL.search(said.out + said.err), (words, said)
    for words, seen in (
        (
            ["select", *drawn, "--score=entropy", "--budget=2", f"--input={one}", "--output=x.jsonl"],
            "has 1 row: give at most 1",
        ),
        (["evaluate", *drawn, f"--eval-file={one}", "--text-column=a,b"], "names 2 columns, but"),
    ):
        assert main(words) == 2
        assert seen in capfd.readouterr().err


def test_one_field_or_tag_is_not_called_several(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.csv"
    short.write_text("text,label\ngood\n", encoding="utf-8")
    tags = write_jsonl(tmp_path / "tags.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}])
    for file, seen in ((short, "line 2 has 1 field, but the header has 2"), (tags, "has 2 words but 1 tag, but each")):
        assert main(["inspect", str(file)]) == 2
        assert seen in capfd.readouterr().err


def test_answers_are_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str], tiny_causal_folder: Path) -> None:
    data, out = write_jsonl(tmp_path / "pairs.jsonl", pairs(12)), tmp_path / "out"
    words = [f"--model={tiny_causal_folder}", f"--train-file={data}", f"--output-dir={out}", "--max-steps=1"]
    assert main(["train", "--method=lora", *words]) == 0
    asked = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": "the cat is"}])
    capfd.readouterr()
    assert main(["generate", str(out), f"--input={asked}", "--max-new-tokens=1", f"--output={tmp_path}/a.jsonl"]) == 0
    assert capfd.readouterr().out.strip() == f"{tmp_path}/a.jsonl: 1 answer"
    assert len(json.loads((tmp_path / "a.jsonl").read_text())["tokens"]) == 1
