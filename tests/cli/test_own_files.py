"""A stranger's one file, from `inspect` through `train` and `evaluate` to a spreadsheet with predictions."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml

import bayeslora
from bayeslora.cli.main import main
from bayeslora.runs.record import read_run
from tests.cli.conftest import Setting, review_rows, write_jsonl

Refused = Callable[..., str]
NAMES = ("schlecht", "gut")


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 labelled rows in the layout of a German spreadsheet, 2 of 3 of one class; and 4 with something wrong."""
    file = tmp_path_factory.mktemp("data") / "tickets.csv"
    rows = [row for i, row in enumerate(review_rows(80, seed=5)) if row["label"] == 0 or i % 4 == 1]
    lines = ["Nr;Text;Art;Kunde"]
    lines += [f"{i};{row['text']} ü{i};{NAMES[int(str(row['label']))]};k{i // 4}" for i, row in enumerate(rows)]
    lines += ["60;the plot;;k15", "61;the film;nan;k15", "62;;gut ;k16", "63;the movie; ;k16"]
    file.write_bytes("\r\n".join(lines).encode("cp1252"))
    return file


@pytest.fixture(scope="module")
def run(tickets: Path, setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    files = ["--train-file", str(tickets), "--text-column", "Text", "--label-column", "Art"]
    options = ["--eval-fraction", "0.25", "--group-column", "Kunde", "--max-steps", "3", "--output-dir", str(out)]
    options += ["--class-weights", "balanced"]
    assert main(["train", "--method", "lora", "--model", str(setting.model), *files, *options]) == 0
    return out


def test_the_run_has_the_split_and_uses_it_again(run: Path, tickets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = json.loads((run / "run.json").read_text())
    held = info["evaluation_rows"]
    assert info["labels"] == ["gut", "schlecht"] and 10 <= len(held) <= 22
    customers = [row["Kunde"] for row in csv.DictReader(io.StringIO(tickets.read_text("cp1252")), delimiter=";")]
    inside = {customers[row] for row in held}
    assert not inside & {name for row, name in enumerate(customers[:60]) if row not in held}
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    assert (recorded["eval_fraction"], recorded["group_column"]) == (0.25, "Kunde") and "split_seed" not in recorded
    metrics = json.loads((run / "metrics.json").read_text())
    with pytest.warns(UserWarning) as told:
        assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == len(held) and found["scores"] == pytest.approx(metrics["scores"], abs=1e-5)
    for scored in (metrics, found):
        assert (scored["task"], scored["split"]) == (tickets.name, "held-out rows")
    assert read_run(run).where == f"{tickets.name}, held-out rows"
    assert f"<h1>LoRA on {tickets.name}</h1>" in (run / "report.html").read_text()
    bad = sum("schlecht" in tickets.read_text("cp1252").splitlines()[row + 1] for row in held)
    assert found["baseline"] == metrics["baseline"]
    assert found["baseline"]["accuracy"] == max(bad, len(held) - bad) / len(held)
    notes = [str(warning.message) for warning in told]
    for part in ("windows-1252 and with semicolons", "3 of 64 rows without a label", "blanks", "empty text"):
        assert sum(part in note for note in notes) == 1, part


def test_what_came_of_it_and_how_to_train_longer_are_told(
    tickets: Path, setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--train-file", str(tickets), "--text-column", "Text", "--label-column", "Art", "--eval-fraction", "0.25"]
    options = ["--learning-rate", "1e-9", "--num-train-epochs", "1", "--output-dir", str(tmp_path / "out")]
    assert main(["train", "--method", "lora", "--model", str(setting.model), *files, *options]) == 0
    printed = capsys.readouterr().out
    assert "  Not clearly better than a constant answer; " in printed or "  Worse than a constant" in printed
    # 45 to 48 rows are two steps of 32, and 300 steps 150 epochs.
    assert "  2 steps of training are few: try --num-train-epochs 150\n" in printed
    options = ["--learning-rate", "100", "--num-train-epochs", "1", "--output-dir", str(tmp_path / "diverged")]
    assert main(["train", "--method", "lora", "--model", str(setting.model), *files, *options]) == 0
    printed = capsys.readouterr().out
    assert "try --learning-rate 10 before more steps\n" in printed and "of training are few" not in printed


def test_class_weights_are_recorded_and_give_both_classes_the_same_total(run: Path, tickets: Path) -> None:
    held = set(json.loads((run / "run.json").read_text())["evaluation_rows"])
    labels = [line.split(";")[2] for line in tickets.read_text("cp1252").splitlines()[1:61]]
    trained = [label for row, label in enumerate(labels) if row not in held] + ["gut"]  # and the row without a text
    trained = trained if 62 not in held else trained[:-1]
    weights = json.loads((run / "metrics.json").read_text())["class_weights"]
    assert weights == pytest.approx({name: len(trained) / 2 / trained.count(name) for name in ("gut", "schlecht")})
    assert yaml.safe_load((run / "config.yaml").read_text())["class_weights"] == ["balanced"]


def test_class_weights_need_classes(tmp_path: Path, setting: Setting, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "n.jsonl", [{"text": f"film {i}", "label": i + 0.5} for i in range(8)])
    files = ["--train-file", str(file), "--eval-file", str(file), "--text-column", "text"]
    given = ["train", "--method", "lora", "--model", str(setting.model), *files, "--class-weights", "balanced"]
    assert main([*given, "--output-dir", str(tmp_path / "out")]) == 2
    assert "--class-weights is given, but the task is regression" in capsys.readouterr().err


def test_scores_stand_beside_the_baseline(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run)]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("accuracy", "nll", "brier"):
        assert [name, f"{metrics['scores'][name]:.4f}", f"({metrics['baseline'][name]:.4f})"] in printed
    assert ["ece", f"{metrics['scores']['ece']:.4f}"] in printed


def test_the_training_rows_are_the_others(run: Path) -> None:
    from bayeslora.runs.info import RunInfo
    from bayeslora.runs.rows import evaluation_task, training_rows

    info = RunInfo.load(run)
    with pytest.warns(UserWarning):
        task, rows = training_rows(info)
    assert len(rows) + len(info.evaluation_rows) == 61
    assert not set(rows["Text"]) & set(task.eval_split["Text"])
    with pytest.warns(UserWarning):
        assert evaluation_task(info).eval_split["Text"][:] == task.eval_split["Text"][:]


def test_calibrating_takes_the_rows_held_out_and_no_training_rows(
    run: Path, tickets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    assert main(["calibrate", str(copied), "--json"]) == 0
    info = json.loads((run / "run.json").read_text())
    assert json.loads(capsys.readouterr().out)["rows"] == len(info["evaluation_rows"])
    assert "was trained on them" in refused_last(["calibrate", str(copied), "--eval-file", str(tickets)], capsys)


def refused_last(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of a command that is refused after notes on the file."""
    capsys.readouterr()
    assert main(argv) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_changed_file_is_refused(run: Path, tmp_path: Path, tickets: Path, refused: Refused) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    moved = shutil.copy(tickets, tmp_path / "tickets.csv")
    info = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**info, "files": {"train_file": str(moved)}}))
    assert main(["evaluate", str(copied)]) == 0
    moved.write_bytes(moved.read_bytes() + b"99;new;gut;k9\r\n")
    assert f"{moved} has changed" in refused("evaluate", copied)
    moved.unlink()
    assert "does not exist" in refused("evaluate", copied)
    for rows in (5, "3", [1, "2"], [[1]], None):
        (copied / "run.json").write_text(json.dumps({**info, "evaluation_rows": rows}))
        assert "run.json is damaged (evaluation_rows " in refused("evaluate", copied)


def test_the_extension_of_predictions_says_what_is_between_their_fields(run: Path, tmp_path: Path) -> None:
    source = tmp_path / "new.tsv"
    source.write_text("Text\tid\nthe plot, dull\t1\n", encoding="utf-8")
    for extension, between in ((".csv", ","), (".tsv", "\t")):
        target = tmp_path / f"answers{extension}"
        assert main(["predict", str(run), "--input", str(source), "--output", str(target)]) == 0
        (row,) = csv.DictReader(target.read_text("utf-8").splitlines(), delimiter=between)
        assert (row["Text"], row["id"], row["label"] in ("gut", "schlecht")) == ("the plot, dull", "1", True)


def test_a_lone_return_in_a_cell_does_not_end_the_row(run: Path, tmp_path: Path) -> None:
    rows = [{"Text": "the plot", "id": "a\rb"}, {"Text": "the\rfilm", "id": "\r"}]
    source, target = write_jsonl(tmp_path / "new.jsonl", rows), tmp_path / "answers.csv"  # type: ignore[arg-type]
    assert main(["predict", str(run), "--input", str(source), "--output", str(target)]) == 0
    found = list(csv.DictReader(io.StringIO(target.read_bytes().decode(), newline="")))
    assert [{name: row[name] for name in rows[0]} for row in found] == rows


def test_a_column_that_a_file_has_twice_is_told_or_refused(run: Path, tmp_path: Path, refused: Refused) -> None:
    source = tmp_path / "new.csv"
    target = tmp_path / "answers.csv"
    source.write_text("Text,id,id\nthe plot,1,2\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="several columns named 'id', of which the first is read"):
        assert main(["predict", str(run), "--input", str(source), "--output", str(target)]) == 0
    (row,) = csv.DictReader(target.read_text("utf-8").splitlines())
    assert row["id"] == "1"
    source.write_text("prompt,completion,completion\nwho,a,b\nhow,c,d\n", encoding="utf-8")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a", "b"])] * 3, names=["prompt", "completion", "completion"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    for file in (source, tmp_path / "twice.parquet"):
        train = [
            "train",
            "--method=lora",
            "--model=unread",
            f"--train-file={file}",
            f"--output-dir={tmp_path / 'out'}",
        ]
        assert "has 2 columns named 'completion'" in refused(*train)


def test_predictions_in_a_spreadsheet_keep_its_columns_and_form(run: Path, tickets: Path, tmp_path: Path) -> None:
    target = tmp_path / "answers.csv"
    assert main(["predict", str(run), "--input", str(tickets), "--output", str(target)]) == 0
    content = target.read_bytes()
    assert content.startswith(b"\xef\xbb\xbf")  # for Excel, as the file was not UTF-8
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter=";"))
    given = list(csv.DictReader(io.StringIO(tickets.read_text("cp1252"), newline=""), delimiter=";"))
    assert [{name: row[name] for name in given[0]} for row in rows] == given
    names = ["label", "confidence", "probability_gut", "probability_schlecht", "entropy"]
    assert list(rows[0])[4:] == [*names, "expected_entropy", "mutual_information"]
    with pytest.warns(UserWarning, match="read as a file in windows-1252"):
        wanted = bayeslora.load(run).predict(tickets)
    for row, expected in zip(rows, wanted, strict=True):
        assert row["label"] == expected.label and float(row["confidence"]) == pytest.approx(expected.confidence)
        given_p = [float(row["probability_gut"]), float(row["probability_schlecht"])]
        assert given_p == pytest.approx(expected.probabilities)


def test_predictions_keep_ids_and_rename_what_clashes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": {"a": [1]}, "Text": "the film", "label": "x", "none": None, "number": 1.5}, {"Text": "b", "id": 2}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)  # type: ignore[arg-type]
    for name, separated in (("out.jsonl", False), ("out.csv", True)):
        assert main(["predict", str(run), "--input", str(source), "--output", str(tmp_path / name)]) == 0
        assert "columns of the input renamed: label to input_label" in capsys.readouterr().out
        lines = (tmp_path / name).read_text().splitlines()
        if separated:
            found = list(csv.DictReader(lines))
            assert found[0]["id"] == '{"a": [1]}' and found[0]["none"] == "" and found[1]["id"] == "2"
        else:
            found = [json.loads(line) for line in lines]
            assert found[0]["id"] == {"a": [1]} and found[0]["none"] is None and found[1]["number"] is None
            assert list(found[0]["probabilities"]) == ["gut", "schlecht"]
        assert found[0]["input_label"] == "x" and found[0]["label"] in NAMES


def test_sets_and_bounds_have_columns(run: Path, tickets: Path, setting: Setting, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    assert main(["calibrate", str(copied)]) == 0
    target = tmp_path / "answers.csv"
    options = ["--coverage", "0.8", "--risk", "0.4"]
    assert main(["predict", str(copied), "--input", str(tickets), "--output", str(target), *options]) == 0
    rows = list(csv.DictReader(target.read_text("utf-8-sig").splitlines(), delimiter=";"))
    assert {row["ask_a_human"] for row in rows} <= {"true", "false"}
    assert all(set(json.loads(row["set"])) <= {*NAMES} for row in rows)


def test_numbers_are_trained_on_if_that_is_said(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": f"the film {i}", "label": i % 4 + 0.0} for i in range(20)])
    files = ["--train-file", str(file), "--eval-fraction", "0.2", "--text-column", "text", "--kind", "regression"]
    options = ["--max-steps", "1", "--output-dir", str(tmp_path / "out")]
    assert main(["train", "--method", "lora", "--model", str(setting.model), *files, *options]) == 0
    captured = capsys.readouterr()
    assert "note" not in captured.err and "in brackets: the score of predicting the same for every row" in captured.out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    values = [i % 4 for i in json.loads((tmp_path / "out" / "run.json").read_text())["evaluation_rows"]]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    assert metrics["baseline"] == pytest.approx({"pearson": 0.0, "spearman": 0.0, "mse": variance})
    target = tmp_path / "out.csv"
    assert main(["predict", str(tmp_path / "out"), "--input", str(file), "--output", str(target)]) == 0
    rows = list(csv.DictReader(target.read_text().splitlines()))
    assert list(rows[0]) == ["text", "input_label", "label", "std"] and float(rows[0]["input_label"]) == 0.0


def test_wrong_splits_are_refused(setting: Setting, tickets: Path, tmp_path: Path, refused: Refused) -> None:
    files = ["train", "--model", setting.model, "--train-file", setting.train, "--text-column", "text"]
    common = [*files, "--output-dir", tmp_path / "out"]
    assert "--eval-file is missing: give it, or --eval-fraction 0.2" in refused(*common)
    assert "--eval-fraction is given with --eval-file" in refused(
        *common, "--eval-file", setting.dev, "--eval-fraction", 0.2
    )
    for fraction in (0, 1, 20):
        assert f"--eval-fraction is {fraction}, but must be" in refused(*common, "--eval-fraction", fraction)
    assert "--group-column is given, but needs --eval-fraction" in refused(
        *common, "--eval-file", setting.dev, "--group-column", "b"
    )
    assert "--eval-fraction is given with --task sst2" in refused(
        "train", "--model", "m", "--task", "sst2", "--eval-fraction", 0.2, "--output-dir", tmp_path / "out"
    )
    assert "lacks column 'film', but has columns text, label" in refused(
        *common, "--eval-fraction", 0.2, "--group-column", "film"
    )
    assert "--kind is 'sorting', but must be one of classification, regression" in refused(
        *common, "--kind", "sorting", mistakes=2
    )


def test_inspect_says_what_training_then_reads(
    run: Path, tickets: Path, setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["inspect", str(tickets), "--text-column", "Text", "--label-column", "Art"]
    split = ["--eval-fraction", "0.25", "--group-column", "Kunde"]
    assert main([*command, *split, "--json", "--model", str(setting.model), "--max-length", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    held = json.loads((run / "run.json").read_text())["evaluation_rows"]
    assert found["evaluation"]["rows"] == len(held) and found["training"]["rows"] == 61 - len(held)
    assert found["training"]["unlabelled"] == 3 and found["texts"]["tokens"]["median"] > 5
    assert main([*command, *split]) == 0
    captured = capsys.readouterr()
    printed = captured.out
    assert f"{tickets}: 64 rows, windows-1252, semicolon between fields" in printed and captured.err == ""
    assert "label: Art, classification" in printed and f"evaluation: {len(held)} rows" in printed
    share = found["training"]["labels"]["schlecht"] / found["training"]["rows"]
    assert f"always saying schlecht is right for {share:.1%} of the training rows" in printed
    assert sum(line.startswith("note: ") for line in printed.splitlines()) == 3
    assert "with an empty text" in printed
    assert main(["inspect", str(tickets)]) == 0
    assert "text: Text (guessed)" in capsys.readouterr().out


def test_inspect_refuses_in_one_line_each(
    tickets: Path, tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in refused("inspect", tmp_path / "absent.csv")
    assert "lacks column 'Body'" in refused("inspect", tickets, "--text-column", "Body")
    assert "needs --model" in refused("inspect", tickets, "--max-length", 5)
    assert "needs --eval-fraction" in refused("inspect", tickets, "--split-seed", 5)
    one = write_jsonl(tmp_path / "one.jsonl", [{"text": "x", "label": 1}])
    assert main(["inspect", str(one)]) == 2
    captured = capfd.readouterr()
    assert "1 row" in captured.out and "every label in" in captured.err and len(captured.err.splitlines()) == 1
