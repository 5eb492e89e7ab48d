"""`evaluate`, `predict`, `compare`, `export` on finished runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bayeslora.cli import demo
from bayeslora.cli.arguments import build_plan
from bayeslora.cli.main import main
from tests.cli.conftest import Setting, review_rows, write_jsonl

CONFIGS = Path(__file__).parents[2] / "configs"


def _json(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([str(argument) for argument in argv]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["lora", "blora", "full"])
def test_evaluate_gives_the_scores_of_training_and_writes_nothing(
    runs: dict[str, Path], method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _files(runs[method])
    found = _json(capsys, "evaluate", runs[method], "--json")
    expected = json.loads((runs[method] / "metrics.json").read_text())["scores"]
    assert found["scores"] == pytest.approx(expected, abs=1e-5)
    assert found["rows"] == 20
    assert _files(runs[method]) == before


def test_evaluate_prints_a_table(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(runs["lora"])]) == 0
    printed = capsys.readouterr().out
    accuracy = json.loads((runs["lora"] / "metrics.json").read_text())["scores"]["accuracy"]
    assert f"{accuracy:.4f}" in printed
    assert "20 rows" in printed


def test_evaluate_takes_another_file_with_the_runs_labels(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only_good = [row for row in review_rows(10, 5) if row["label"] == 1]
    file = write_jsonl(tmp_path / "good.jsonl", only_good)
    found = _json(capsys, "evaluate", runs["full"], "--eval-file", file, "--json")
    flipped = write_jsonl(tmp_path / "flipped.jsonl", [{**row, "label": 0} for row in only_good])
    other = _json(capsys, "evaluate", runs["full"], "--eval-file", flipped, "--json")
    assert found["rows"] == 5
    assert found["scores"]["accuracy"] + other["scores"]["accuracy"] == pytest.approx(1.0)


def test_labels_that_do_not_count_from_zero_keep_their_meaning(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": row["text"], "label": (2, 5)[int(str(row["label"]))]} for row in review_rows(48, 6)]
    # The labels come in another order, and the file names them in CSV's untyped way.
    train = tmp_path / "train.csv"
    with train.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(reversed(rows))
    dev = write_jsonl(tmp_path / "dev.jsonl", rows)
    out = tmp_path / "out"
    files = ["--train-file", str(train), "--eval-file", str(dev), "--text-column", "text"]
    options = [*files, "--max-steps", "40", "--learning-rate", "0.003", "--output-dir", str(out)]
    assert main(["train", "--method", "full", "--model", str(setting.model), *options]) == 0
    trained = json.loads((out / "metrics.json").read_text())
    assert trained["labels"] == ["2", "5"]
    assert trained["scores"]["accuracy"] > 0.8
    found = _json(capsys, "evaluate", out, "--eval-file", dev, "--json")
    assert found["scores"] == pytest.approx(trained["scores"], abs=1e-6)


@pytest.mark.parametrize("extension", ["jsonl", "csv"])
@pytest.mark.parametrize("method", ["blora", "full"])
def test_predict_writes_a_line_a_row_in_order(
    runs: dict[str, Path], setting: Setting, tmp_path: Path, method: str, extension: str
) -> None:
    rows = [json.loads(line) for line in setting.dev.read_text().splitlines()]
    # Rows of different lengths: batches are sorted by length inside, the output must not be.
    for index, row in enumerate(rows):
        row["text"] = " ".join([row["text"]] * (1 + index % 3))
    source, target = tmp_path / f"rows.{extension}", tmp_path / "predictions.jsonl"
    if extension == "jsonl":
        write_jsonl(source, [{"text": row["text"]} for row in rows])
    else:
        with source.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["id", "text"])
            writer.writeheader()
            writer.writerows({"id": index, "text": row["text"]} for index, row in enumerate(rows))
    common = ["predict", str(runs[method]), "--output", str(target)]
    assert main([*common, "--input", str(source), "--batch-size", "7"]) == 0
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(lines) == len(rows)
    single = tmp_path / "single.jsonl"
    for index in (0, 11):
        write_jsonl(single, [{"text": rows[index]["text"]}])
        assert main([*common, "--input", str(single)]) == 0
        (alone,) = [json.loads(line) for line in target.read_text().splitlines()]
        assert alone["label"] == lines[index]["label"]
        assert alone["probabilities"] == pytest.approx(lines[index]["probabilities"], abs=1e-5)
    for line in lines:
        assert set(line) == {"label", "probabilities", "entropy", "mutual_information"}
        assert sum(line["probabilities"]) == pytest.approx(1.0)
        assert line["label"] == ("0", "1")[line["probabilities"].index(max(line["probabilities"]))]
        assert 0 <= line["entropy"] <= 0.6932
        assert line["mutual_information"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [source.name, "predictions.jsonl", "single.jsonl"]
    )


def test_compare_prints_and_writes_a_table(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "comparison"
    folders = [str(runs["lora"]), str(runs["blora"])]
    assert main(["compare", *folders, "--output-dir", str(target)]) == 0
    assert capsys.readouterr().out.strip() == (target / "table.md").read_text().strip()
    table = json.loads((target / "table.json").read_text())
    assert [row["method"] for row in table["runs"]] == ["lora", "blora"]
    assert list(target.glob("*.png"))
    assert _json(capsys, "compare", *folders, "--output-dir", tmp_path / "again", "--json")["runs"] == table["runs"]


def test_an_export_runs_with_plain_peft_and_is_a_run_itself(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "plain"
    measured = _json(capsys, "export", runs["blora"], "--format", "lora", "--output-dir", target, "--json")
    assert measured["max_output_error"] >= 0
    assert json.loads((target / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert _json(capsys, "evaluate", target, "--json")["rows"] == 20


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["--version"], *([name, "--help"] for name in ("train", "evaluate", "predict", "demo"))):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0
        assert "bayeslora" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["blora", "lora", "full", "demo"])
def test_the_shipped_configs_are_plans(name: str) -> None:
    given = {"config": str(CONFIGS / f"{name}.yaml"), "output_dir": "out"}
    data = {} if name == "demo" else {"model": "m", "task": "sst2"}
    assert build_plan({**given, **data}).options.method == ("blora" if name == "demo" else name)


def test_the_demo_config_is_the_demo() -> None:
    content = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    assert content == {"method": "blora", **demo.METHODS["blora"], **demo.SHARED}


def test_an_earlier_demo_is_kept_unless_told_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lora").mkdir()
    assert main(["demo", "--output-dir", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "lora").is_dir()


@pytest.mark.slow
def test_the_demo_ends_with_a_table_and_can_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["demo", "--output-dir", str(tmp_path), "--max-steps", "20"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    for word in ("accuracy", "attention BOPs", "median bits", "mean rank", "report.html"):
        assert word in printed
    assert {"lora", "blora", "compare"} == {path.name for path in tmp_path.iterdir()}
    assert main([*options, "--overwrite"]) == 0
