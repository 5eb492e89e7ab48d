"""`evaluate`, `predict`, `compare`, `export` on finished runs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bayeslora.cli import demo
from bayeslora.cli.arguments import build_plan
from bayeslora.cli.main import main
from bayeslora.runs.train import precision_options
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
    given = ["id", "text"] if extension == "csv" else ["text"]
    for line, row in zip(lines, rows, strict=True):
        own = ["label", "confidence", "probabilities", "entropy", "expected_entropy", "mutual_information"]
        assert list(line) == [*given, *own] and line["text"] == row["text"]
        assert list(line["probabilities"]) == ["0", "1"]
        assert sum(line["probabilities"].values()) == pytest.approx(1.0)
        assert line["confidence"] == line["probabilities"][line["label"]] == max(line["probabilities"].values())
        assert 0 <= line["entropy"] <= 0.6932
        assert line["mutual_information"] == 0 and line["expected_entropy"] == line["entropy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [source.name, "predictions.jsonl", "single.jsonl"]
    )


def foreign(path: Path) -> Path:
    rows = [{"words": f"who what when {'hello world ' * (i % 4)}question"} for i in range(12)]
    return write_jsonl(path, rows)


def test_evaluate_samples_a_posterior_and_detects_foreign_texts(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = foreign(tmp_path / "foreign.jsonl")
    options = ["evaluate", runs["melora"], "--ood-file", file, "--ood-text-column", "words"]
    found = _json(capsys, *options, "--samples", 4, "--json")
    assert found["samples"] == 4 and found["seed"] == 0
    assert found["ood"]["rows"] == 12 and found["ood"]["rows_in"] == 20
    by_features = ["energy", "mahalanobis", "relative_mahalanobis", "nearest_neighbors"]
    assert list(found["ood"]["scores"]) == ["max_probability", "entropy", "mutual_information", *by_features]
    assert found["ood"]["rows_fitted"] == 64
    for scores in found["ood"]["scores"].values():
        assert list(scores) == ["auroc", "aupr", "fpr95"] and all(0 <= value <= 1 for value in scores.values())
    for histogram in found["uncertainty"].values():
        assert sum(histogram["correct"]) + sum(histogram["wrong"]) == 20 and sum(histogram["ood"]) == 12
    assert found["risk_coverage"]["risk"][-1] == pytest.approx(1 - found["scores"]["accuracy"])
    again = _json(capsys, *options, "--samples", 4, "--batch-size", 7, "--json")
    assert again["scores"] == pytest.approx(found["scores"], abs=1e-5)
    assert again["ood"]["scores"]["mutual_information"]["auroc"] == pytest.approx(
        found["ood"]["scores"]["mutual_information"]["auroc"], abs=0.02
    )
    other = _json(capsys, *options, "--samples", 4, "--seed", 1, "--json")
    assert other["scores"]["nll"] != found["scores"]["nll"]
    mean = _json(capsys, *options, "--json")
    assert mean["samples"] == 0 and list(mean["ood"]["scores"]) == ["max_probability", "entropy", *by_features]
    for name in by_features:  # of one pass with the mean weights
        assert mean["ood"]["scores"][name] == pytest.approx(found["ood"]["scores"][name], abs=1e-6)


def test_evaluate_prints_a_line_for_each_measure_of_uncertainty(
    runs: dict[str, Path], setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The run's own column is the default.
    assert main(["evaluate", str(runs["melora"]), "--samples", "3", "--ood-file", str(setting.train)]) == 0
    printed = capsys.readouterr().out
    assert (
        "(rows of dev.jsonl, 20 rows, 3 samples)" in printed
        and f"out of distribution: {setting.train} (64 rows)" in printed
    )
    lines = [line.split() for line in printed.splitlines()]
    assert ["AUROC", "AUPR", "FPR95"] in lines
    (line,) = [line for line in lines if line[0] == "mutual_information"]
    assert len(line) == 4 and all(0 <= float(value) <= 1 for value in line[1:])


def test_scores_by_features_are_left_out_where_the_training_rows_are_gone(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(runs["lora"], tmp_path / "moved")
    content = json.loads((moved / "run.json").read_text())
    content["files"]["train_file"] = "gone.jsonl"
    (moved / "run.json").write_text(json.dumps(content))
    options = ["--ood-file", foreign(tmp_path / "foreign.jsonl"), "--ood-text-column", "words", "--json"]
    with pytest.warns(UserWarning, match="scores by features are left out, because .*gone.jsonl"):
        found = _json(capsys, "evaluate", moved, *options)
    assert list(found["ood"]["scores"]) == ["max_probability", "entropy"] and "rows_fitted" not in found["ood"]


def test_evaluate_scores_shifted_texts_and_another_domain(
    runs: dict[str, Path], setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"words": "the film was warm", "class": 1}] * 6)
    domain = ["--shift-file", other, "--shift-text-column", "words", "--shift-label-column", "class"]
    target = tmp_path / "shifted"
    command = ["evaluate", runs["full"], *domain, "--json", "--output-dir", target, "--shift"]
    found = _json(capsys, *command)
    levels = found["shift"]["levels"]
    assert [(level["suite"], level["severity"]) for level in levels[:5]] == [
        ("none", 0.0), ("typos", 0.02), ("typos", 0.05), ("typos", 0.1), ("truncation", 0.25)
    ]  # fmt: skip
    assert len(levels) == 14 and levels[-1]["name"] == str(other) and levels[-1]["rows"] == 6
    # What nothing was done to, by no shift or by one that the tokenizer does not see, has exactly the same scores.
    assert levels[0]["scores"] == found["scores"]
    assert [level["scores"] for level in levels if level["suite"] == "casing"] == [found["scores"]] * 3
    changed = {(level["suite"], level["severity"]): level.get("changed") for level in levels}
    assert [changed["casing", severity] for severity in (0.25, 0.5, 1.0)] == [0, 0, 0]
    assert changed["truncation", 0.25] == 20 and changed["none", 0.0] is changed["domain", 1.0] is None
    assert [changed["punctuation", severity] for severity in (0.25, 0.5, 1.0)] == [0, 0, 0]  # there is none
    cut = next(level for level in levels if (level["suite"], level["severity"]) == ("truncation", 0.75))
    words = [{**row, "text": " ".join(str(row["text"]).split()[:2])} for row in review_rows(20, seed=1)]
    short = _json(capsys, "evaluate", runs["full"], "--eval-file", write_jsonl(tmp_path / "s.jsonl", words), "--json")
    assert cut["scores"] == short["scores"]
    metrics = json.loads((target / "metrics.json").read_text())
    assert metrics["shift"] == found["shift"]
    assert (target / "shift.png").is_file() and "Shifted texts" in (target / "report.html").read_text()
    same = "asing (25%, 50%, 100%) and punctuation (25%, 50%, 100%) change no row: the model reads the same tokens"
    assert f"C{same}" in (target / "report.html").read_text()
    again = _json(capsys, "evaluate", runs["full"], "--json", "--shift", "truncation,typos")
    assert [level["suite"] for level in again["shift"]["levels"]] == ["none", *["truncation"] * 3, *["typos"] * 3]
    assert again["shift"]["levels"][4:] == levels[1:4]


def test_shifted_scores_have_the_coverage_of_a_calibrated_run(
    runs: dict[str, Path], setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(runs["lora"], tmp_path / "run")
    held_out = write_jsonl(tmp_path / "held_out.jsonl", review_rows(40, seed=9))
    assert main(["calibrate", str(run), "--eval-file", str(held_out)]) == 0
    plain = _json(capsys, "evaluate", run, "--shift", "truncation", "--json")["shift"]["levels"][0]["scores"]
    target = tmp_path / "predictions.jsonl"
    predict = ["predict", run, "--input", setting.dev, "--output", target, "--coverage", "0.9"]
    assert main([str(word) for word in predict]) == 0
    sets = [json.loads(line)["set"] for line in target.read_text().splitlines()]
    held = [str(row["label"]) in found for row, found in zip(review_rows(20, seed=1), sets, strict=True)]
    assert plain["coverage"] == sum(held) / 20 and plain["set_size"] == sum(map(len, sets)) / 20
    content = json.loads((run / "conformal.json").read_text())
    (run / "conformal.json").write_text(json.dumps({**content, "fingerprint": "another"}))
    with pytest.warns(UserWarning, match="the coverage of conformal sets is left out, because .* calibrate again"):
        found = _json(capsys, "evaluate", run, "--shift", "truncation", "--json")
    assert "coverage" not in found["shift"]["levels"][0]["scores"]


def test_evaluate_prints_a_table_of_shifts(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(runs["lora"]), "--shift", "truncation"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    start = lines.index(["suite", "severity", "accuracy", "nll", "ece", "brier"])
    assert ["accuracy", lines[start + 1][2], "(0.5000)"] in lines  # as in the table of scores, with the baseline
    assert [line[:2] for line in lines[start + 1 :]] == [
        ["none", "0%"], ["truncation", "25%"], ["truncation", "50%"], ["truncation", "75%"]
    ]  # fmt: skip
    assert "no row" not in printed
    assert main(["evaluate", str(runs["lora"]), "--shift", "truncation,casing"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "  casing (25%, 50%, 100%) changes no row: the model reads the same tokens as without it"


def test_evaluations_are_folders_that_compare_sets_beside_the_run(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, sampled, plain = foreign(tmp_path / "foreign.jsonl"), tmp_path / "sampled", tmp_path / "plain"
    ood = ["--ood-file", file, "--ood-text-column", "words"]
    before = _files(runs["melora"])
    found = _json(capsys, "evaluate", runs["melora"], "--samples", 3, *ood, "--output-dir", sampled, "--json")
    assert main([str(word) for word in ("evaluate", runs["lora"], *ood, "--output-dir", plain)]) == 0
    assert _files(runs["melora"]) == before
    names = [
        "adapter_config.json",
        "calibration.png",
        "config.yaml",
        "examples.json",
        "metrics.json",
        "report.html",
        "selective.png",
        "uncertainty.png",
    ]
    assert sorted(path.name for path in sampled.iterdir()) == names
    metrics = json.loads((sampled / "metrics.json").read_text())
    trained = json.loads((runs["melora"] / "metrics.json").read_text())
    assert metrics["scores"] == found["scores"] and metrics["ood"] == found["ood"] and metrics["samples"] == 3
    for name in ("method", "task", "model", "seed", "steps", "parameters", "layers", "labels"):
        assert metrics[name] == trained[name]
    assert metrics["evaluated"] == {"folder": str(runs["melora"]), "seed": 0}
    capsys.readouterr()
    table = _json(capsys, "compare", plain, runs["melora"], sampled, "--output-dir", tmp_path / "both", "--json")
    assert [group["setting"] for group in table["groups"]] == ["LoRA", "Me-LoRA, mean", "Me-LoRA, 3 samples"]
    figures = ["reliability.png", "risk_coverage.png", "uncertainty.png", "ood.png"]
    assert [name for name in table["figures"] if name != "score_bops.png"] == figures
    row = table["runs"][2]
    assert row["ood_mutual_information_auroc"] == found["ood"]["scores"]["mutual_information"]["auroc"]
    for name in ("nll", "ece", "adaptive_ece", "classwise_ece", "brier", "aurc"):
        assert row[name] == found["scores"][name]


def test_training_is_scored_with_the_samples_it_is_told_to(
    runs: dict[str, Path], setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--max-steps", "6", "--learning-rate", "0.01", "--samples", "3", "--output-dir", str(out)]
    assert main(["train", "--method", "melora", *setting.options, *options]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["samples"] == 3 and yaml.safe_load((out / "config.yaml").read_text())["samples"] == 3
    assert sum(metrics["uncertainty"]["mutual_information"]["correct"]) > 0
    assert {"adaptive_ece", "classwise_ece", "aurc"} <= set(metrics["scores"])
    found = _json(capsys, "evaluate", out, "--samples", 3, "--json")
    assert found["scores"] == pytest.approx(metrics["scores"], abs=1e-5)
    # The same options with samples left out train the same adapter and score its mean.
    assert _json(capsys, "evaluate", out, "--json")["scores"] == pytest.approx(
        json.loads((runs["melora"] / "metrics.json").read_text())["scores"], abs=1e-4
    )


def test_predict_with_samples_says_what_the_weights_leave_open(
    runs: dict[str, Path], setting: Setting, tmp_path: Path
) -> None:
    target = tmp_path / "predictions.jsonl"
    command = ["predict", str(runs["melora"]), "--input", str(setting.dev), "--output", str(target), "--samples", "4"]
    found = []
    for more in ([], ["--batch-size", "3"], ["--seed", "1"]):
        assert main([*command, *more]) == 0
        found.append([json.loads(line) for line in target.read_text().splitlines()])
    first, same, other = found
    for line, again in zip(first, same, strict=True):
        assert line["probabilities"] == pytest.approx(again["probabilities"], abs=1e-5)
        assert line["expected_entropy"] + line["mutual_information"] == pytest.approx(line["entropy"])
        assert line["mutual_information"] > 0
    assert [line["probabilities"] for line in first] != [line["probabilities"] for line in other]


def test_compare_prints_and_writes_a_table(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "comparison"
    folders = [str(runs["lora"]), str(runs["blora"])]
    assert main(["compare", *folders, "--output-dir", str(target)]) == 0
    printed, _, where = capsys.readouterr().out.strip().rpartition("\n\n")
    assert printed == (target / "table.md").read_text().strip() and where.startswith(f"{target}: these tables as")
    table = json.loads((target / "table.json").read_text())
    assert [row["method"] for row in table["runs"]] == ["lora", "blora"]
    assert list(target.glob("*.png"))
    assert _json(capsys, "compare", *folders, "--output-dir", tmp_path / "again", "--json")["runs"] == table["runs"]


def test_an_export_runs_with_plain_peft_and_is_a_run_itself(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "plain"
    command = ["export", str(runs["blora"]), "--format", "lora", "--output-dir", str(target)]
    assert main(command) == 2 and "allow and measure the error with --allow-error" in capsys.readouterr().err
    measured = _json(capsys, *command, "--allow-error", "--json")
    assert measured["max_output_error"] >= 0
    assert json.loads((target / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert _json(capsys, "evaluate", target, "--json")["rows"] == 20


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["--version"], *([name, "--help"] for name in ("train", "evaluate", "predict", "demo"))):
        assert main(argv) == 0
        assert "bayeslora" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["blora", "lora", "full", "demo"])
def test_the_shipped_configs_are_plans(name: str) -> None:
    given = {"config": str(CONFIGS / f"{name}.yaml"), "output_dir": "out"}
    data = {} if name == "demo" else {"model": "m", "task": "sst2"}
    assert build_plan({**given, **data}).options.method == ("blora" if name == "demo" else name)


def test_the_demo_config_is_the_demo() -> None:
    content = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    assert content == {"method": "blora", **demo.METHODS["blora"], **demo.SHARED, **demo.SHORT}


def test_the_demo_trains_in_bfloat16_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert precision_options() == {"bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    assert precision_options() == {}
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # older torch
    assert precision_options() == {}


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
    for word in (
        "accuracy",
        "attention BOPs",
        "median bits",
        "mean rank",
        "the 80% it is surest of",
        "1,000 reviews",
        "to hand to a person",
        "reliability.png",
        "report.html",
    ):
        assert word in printed
    assert {"lora", "blora", "melora", "compare"} == {path.name for path in tmp_path.iterdir()}
    assert main([*options, "--overwrite"]) == 0


def test_every_file_of_a_run_is_as_readable_as_its_scores(runs: dict[str, Path]) -> None:
    for folder in runs.values():
        modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
        assert set(modes.values()) == {modes["metrics.json"]}, modes


def test_weights_that_one_may_not_read_are_not_called_damaged(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_jsonl(tmp_path / "rows.jsonl", [{"text": "fine"}])
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith(".safetensors"))  # root may read all
    assert main(["predict", str(runs["lora"]), "--input", str(text), "--output", str(tmp_path / "out.csv")]) == 2
    assert "adapter_model.safetensors cannot be read (Permission denied)" in capsys.readouterr().err
