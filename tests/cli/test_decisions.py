"""`calibrate`, `predict --coverage --risk` and `select` on finished runs."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayeslora.cli.main import main
from bayeslora.report.comparison import group_runs
from bayeslora.runs.decisions import Calibration
from bayeslora.runs.record import read_run
from tests.cli.conftest import Setting, review_rows, write_jsonl

Refused = Callable[..., str]


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the Me-LoRA run that a test may write into."""
    shutil.copytree(runs["melora"], tmp_path / "out")
    return tmp_path / "out"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_calibrate_then_predict_sets_and_rows_for_a_person(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", review_rows(80, seed=9))
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert main(["calibrate", str(run), "--eval-file", str(held_out), "--samples", "3", "--batch-size", "16"]) == 0
    printed = capsys.readouterr().out
    assert f"{run / 'conformal.json'}: 80 rows of {held_out}, 3 samples, score lac" in printed
    assert "--coverage 0.95" in printed and "--risk 0.05" in printed
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.name != "conformal.json"} == before
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in review_rows(30, seed=4)])
    target = tmp_path / "predictions.jsonl"
    common = ["predict", str(run), "--input", str(source), "--output", str(target)]
    assert main([*common, "--coverage", "0.9", "--risk", "0.4", "--delta", "0.5"]) == 0
    decided = lines(target)
    assert len(decided) == 30
    for line in decided:
        assert list(line)[-2:] == ["set", "ask_a_human"] and isinstance(line["ask_a_human"], bool)
        assert line["set"] in (["0"], ["1"], ["0", "1"]) and line["label"] in line["set"]
    assert main([*common, "--samples", "3"]) == 0
    assert lines(target) == [{k: v for k, v in line.items() if k not in ("set", "ask_a_human")} for line in decided]
    assert main([*common, "--coverage", "0.5"]) == 0
    assert sum(len(line["set"]) for line in lines(target)) <= sum(len(line["set"]) for line in decided)
    assert "ask_a_human" not in lines(target)[0]


def test_the_runs_own_evaluation_rows_are_the_default(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(run), "--score", "aps", "--by-class", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 20 and found["score"] == "aps" and found["samples"] == 0
    assert [each["coverage"] for each in found["coverage"]] == [0.8, 0.9, 0.95]
    assert found["coverage"][0]["labels"] == [] and found["coverage"][2]["labels"] == ["0", "1"]  # 10 rows a class
    assert [each["answered"] for each in found["risk"]] == [0, 0, 0]  # 20 rows cannot show an error rate of 10%
    assert main(["calibrate", str(run), "--score", "aps", "--by-class"]) == 0
    printed = capsys.readouterr().out
    assert "too few rows: 0, 1 in every set" in printed
    assert "at a risk of 0.01 or 0.05 or 0.1 every row is left to a person: 20 rows of this model show none" in printed
    assert f"below {found['lowest_risk']:.2g}; give a higher --risk, more rows, or a better model" in printed
    calibration = Calibration.load(run)
    assert calibration.threshold(found["lowest_risk"] - 1e-6).coverage == 0
    assert calibration.threshold(found["lowest_risk"] + 1e-6).coverage > 0


def test_a_temperature_is_saved_used_and_left_out(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: Any) -> str:
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err

    run = shutil.copytree(runs["blora"], tmp_path / "out")
    noisy = [{**row, "label": int(row["label"] != (i % 5 == 0))} for i, row in enumerate(review_rows(81, seed=9))]  # type: ignore[comparison-overlap]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", noisy)  # type: ignore[arg-type]
    source = write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in review_rows(30, seed=4)])
    target = tmp_path / "predictions.jsonl"
    predict = ["predict", str(run), "--input", str(source), "--output", str(target)]
    evaluate = ["evaluate", str(run)]
    assert main(predict) == 0 and main([*evaluate, "--json"]) == 0
    plain, scores = lines(target), json.loads(capsys.readouterr().out.partition("\n")[2])
    calibrate = ["calibrate", str(run), "--eval-file", str(held_out)]
    assert "--isotonic is given with --temperature" in told(*calibrate, "--temperature", "--isotonic")
    assert main([*calibrate, "--temperature"]) == 0
    printed = capsys.readouterr().out
    temperature = json.loads((run / "conformal.json").read_text())["scaling"]["numbers"]["temperature"]
    named = f"temperature {temperature:.4g}"
    assert f": 41 rows of {held_out}" in printed and f"  {named}, fitted on 40 other rows of them" in printed
    assert main([*predict, "--coverage", "0.8"]) == 0
    assert capsys.readouterr().out == f"{target}: 30 rows, {named}\n"
    for line, before in zip(lines(target), plain, strict=True):
        odds = [math.log(each["probabilities"]["1"] / each["probabilities"]["0"]) for each in (line, before)]
        assert odds[0] == pytest.approx(odds[1] / temperature, rel=1e-4) and line["label"] == before["label"]
    assert main([*predict, "--uncalibrated"]) == 0
    assert lines(target) == plain
    assert "give --uncalibrated" in told(*predict, "--samples", 2)
    assert "--uncalibrated is given, but the sets" in told(*predict, "--uncalibrated", "--coverage", 0.9)
    assert main([*evaluate, "--json", "--output-dir", str(tmp_path / "scored")]) == 0
    scaled = json.loads(capsys.readouterr().out)
    assert scaled["calibrated"] == {"by": named, "rows": 40, "source": str(held_out)}
    assert scaled["scores"]["accuracy"] == scores["scores"]["accuracy"] and "calibrated" not in scores
    assert scaled["scores"]["nll"] != scores["scores"]["nll"]
    assert json.loads((tmp_path / "scored" / "metrics.json").read_text())["calibrated"] == scaled["calibrated"]
    assert f"{named}, fitted on 40 rows of" in (tmp_path / "scored" / "report.html").read_text()
    assert main([*evaluate, "--json", "--uncalibrated", "--output-dir", str(tmp_path / "plain")]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == scores["scores"]
    groups = group_runs([read_run(tmp_path / name) for name in ("scored", "plain")])
    assert len(groups) == 2 and "calibrated=temperature" in groups[0].label
    with pytest.warns(UserWarning, match="was fitted on 40 of these rows, so that they have better scores"):
        assert main([*evaluate, "--eval-file", str(held_out)]) == 0
    assert f"  probabilities by {named}, fitted on 40 rows of {held_out}" in capsys.readouterr().out


def test_decisions_that_cannot_be_are_refused(run: Path, setting: Setting, tmp_path: Path, refused: Refused) -> None:
    target = tmp_path / "predictions.jsonl"
    predict = ["predict", run, "--input", setting.dev, "--output", target]
    assert f"run `bayeslora calibrate {run}` first" in refused(*predict, "--coverage", 0.9)
    assert "--coverage is 90, but must be between 0 and 1" in refused(*predict, "--coverage", 90)
    assert "must be CSV, TSV or JSON Lines" in refused(*predict[:-1], tmp_path / "table.parquet")
    assert "--risk is 0, but must be between" in refused(*predict, "--risk", 0)
    assert "--delta is given, but needs --risk" in refused(*predict, "--delta", 0.1)
    assert main(["calibrate", str(run), "--samples", "2"]) == 0
    assert "samples is 4, but" in refused(*predict, "--coverage", 0.9, "--samples", 4)
    assert "was trained on them" in refused("calibrate", run, "--eval-file", setting.train)
    assert "score is residual, but must be lac or aps" in refused("calibrate", run, "--score", "residual")
    assert "--task is given with --eval-file" in refused("calibrate", run, "--eval-file", "a", "--task", "sst2")
    assert not target.exists()


def test_a_deterministic_run_is_calibrated_without_samples(
    runs: dict[str, Path], tmp_path: Path, refused: Refused
) -> None:
    shutil.copytree(runs["lora"], tmp_path / "lora")
    assert "deterministic" in refused("calibrate", tmp_path / "lora", "--samples", 5)
    assert not (tmp_path / "lora" / "conformal.json").exists()
    assert main(["calibrate", str(tmp_path / "lora")]) == 0


@pytest.mark.parametrize("score", ["mutual_information", "entropy", "margin", "random"])
def test_select_writes_the_chosen_rows_in_order(run: Path, tmp_path: Path, score: str) -> None:
    rows = [{"text": row["text"], "id": index} for index, row in enumerate(review_rows(40, seed=6))]
    source, target = write_jsonl(tmp_path / "pool.jsonl", rows), tmp_path / "chosen.jsonl"  # type: ignore[arg-type]
    command = ["select", str(run), "--input", str(source), "--output", str(target), "--budget", "7", "--score", score]
    assert main([*command, "--samples", "4"]) == 0
    found = lines(target)
    assert len({line["row"] for line in found}) == len(found) == 7
    for line in found:
        assert list(line) == ["row", "entropy", "mutual_information", "text"]
        assert line["text"] == rows[line["row"] - 1]["text"]
    if score == "mutual_information":
        values = tmp_path / "values.jsonl"
        assert main(["predict", str(run), "--input", str(source), "--output", str(values), "--samples", "4"]) == 0
        all_values = [line["mutual_information"] for line in lines(values)]
        assert found[0]["mutual_information"] == pytest.approx(max(all_values), rel=1e-6)
    if score == "entropy":
        assert [line["entropy"] for line in found] == sorted((line["entropy"] for line in found), reverse=True)
    again = target.read_bytes()
    assert main([*command, "--samples", "4", "--batch-size", "5"]) == 0
    assert [line["row"] for line in lines(target)] == [json.loads(line)["row"] for line in again.splitlines()]


def test_select_refuses_what_has_no_mutual_information(
    runs: dict[str, Path], setting: Setting, tmp_path: Path, refused: Refused
) -> None:
    target = tmp_path / "chosen.jsonl"
    files = ["--input", setting.dev, "--output", target]
    line = refused("select", runs["lora"], *files, "--budget", 5)
    assert "lora is deterministic, so that it is 0 for every row: give --score entropy" in line
    assert "--samples is 1, but" in refused("select", runs["melora"], *files, "--budget", 5, "--samples", 1)
    assert "--budget is 21, but" in refused("select", runs["melora"], *files, "--budget", 21)
    assert "--budget is 0" in refused("select", runs["melora"], *files, "--budget", 0)
    assert "--score is 'bald'" in refused("select", runs["melora"], *files, "--budget", 1, "--score", "bald")
    assert "deterministic" in refused(
        "select", runs["lora"], *files, "--budget", 1, "--score", "entropy", "--samples", 3
    )
    assert not target.exists()
    assert main(["select", str(runs["lora"]), *map(str, files), "--budget", "3", "--score", "entropy"]) == 0
    assert len(lines(target)) == 3
