"""Known tasks: what the hub calls their columns and labels, and which split is which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from bayeslora.data import TASKS, load_task
from bayeslora.data.known import KNOWN
from bayeslora.errors import BayesLoraError
from bayeslora.runs.plan import RunOptions
from tests.data.test_tasks import jsonl

LETTERS, DIGITS = ["A", "B", "C", "D", "E"], ["1", "2", "3", "4"]
NLI = ["entailment", "neutral", "contradiction"]


def lettered(key: str, marks: list[str], question: str = "question") -> dict[str, Any]:
    choices = {"text": [f"choice {mark}" for mark in marks], "label": marks}
    return {question: "why?", "choices": choices, "answerKey": key}


def hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, list[dict[str, Any]]], **names: list[str]) -> list[Any]:
    """Serve these rows, with ClassLabel columns of these names; return the list of calls."""
    calls: list[Any] = []

    def load_dataset(path: str, name: str | None = None) -> DatasetDict:
        calls.append((path, name))
        served = {split: Dataset.from_list(rows) for split, rows in splits.items()}
        for column, classes in names.items():
            served = {split: data.cast_column(column, ClassLabel(names=classes)) for split, data in served.items()}
        return DatasetDict(served)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def pairs(labels: list[Any], first: str, second: str, label: str = "label") -> list[dict[str, Any]]:
    return [{first: f"one {i}", second: f"two {i}", label: value, "idx": i} for i, value in enumerate(labels)]


def test_mnli_is_scored_on_the_matched_split_and_keeps_the_mismatched_one(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"train": [0, 2, 1], "validation_matched": [1], "validation_mismatched": [2, 2], "test_matched": [-1]}
    rows = {split: pairs(labels, "premise", "hypothesis") for split, labels in names.items()}
    calls = hub(monkeypatch, rows, label=NLI)
    task = load_task("mnli")
    assert calls == [("nyu-mll/glue", "mnli")] and task.labels == NLI and task.metrics == ("accuracy",)
    assert {split: data["label"][:] for split, data in task.splits.items()} == {
        "train": [0, 2, 1], "validation": [1], "validation_mismatched": [2, 2]
    }  # fmt: skip
    assert task.train_split["text_b"][0] == "two 0"


def test_qqp_has_the_same_classes_from_the_hub_and_from_files_that_call_them_0_and_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub(
        monkeypatch,
        {"train": pairs([0, 1], "question1", "question2"), "validation": pairs([1], "question1", "question2"),
         "test": pairs([-1, -1], "question1", "question2")},
        label=["not_duplicate", "duplicate"],
    )  # fmt: skip
    task = load_task("qqp")
    for split in ("train", "dev"):
        rows = [{"text_a": "x", "text_b": "y", "label": i, "label_text": str(i)} for i in (1, 0)]
        jsonl(tmp_path / "qqp" / f"{split}.jsonl", rows)
    own = load_task("qqp", tmp_path)
    assert task.labels == own.labels == ["not_duplicate", "duplicate"]
    assert task.metrics == own.metrics == ("accuracy", "f1")
    assert set(task.splits) == {"train", "validation"} and own.train_split["label"][:] == [1, 0]


def test_names_of_the_hub_decide_if_its_ids_are_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs([0, 1, 1], "question", "sentence")
    hub(monkeypatch, {"train": rows, "validation": rows}, label=["not_entailment", "entailment"])
    task = load_task("qnli")
    assert task.labels == ["entailment", "not_entailment"] and task.train_split["label"][:] == [1, 0, 0]


def test_rows_of_snli_without_a_gold_label_are_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = pairs([-1, 2, 0, -1, 1], "premise", "hypothesis")
    hub(monkeypatch, {"train": rows, "validation": rows[:2], "test": rows[1:3]}, label=NLI)
    task = load_task("snli")
    assert [data["label"][:] for data in task.splits.values()] == [[2, 0, 1], [2], [2, 0]]
    assert task.train_split["text_a"][:] == ["one 1", "one 2", "one 4"]
    for split, kept in (("train", rows), ("dev", rows[:2])):
        jsonl(
            tmp_path / "snli" / f"{split}.jsonl",
            [{"text_a": r["premise"], "text_b": r["hypothesis"], "label": r["label"]} for r in kept],
        )
    assert load_task("snli", tmp_path).train_split["label"][:] == [2, 0, 1]
    # Only SNLI is known to have such rows: elsewhere -1 is a mistake.
    (tmp_path / "snli").rename(tmp_path / "mnli")
    with pytest.raises(BayesLoraError, match="train.jsonl, line 1 has the label -1, but the labels that are known"):
        load_task("mnli", tmp_path)
    hub(monkeypatch, {"train": rows[:1], "validation": rows}, label=NLI)
    with pytest.raises(BayesLoraError, match="snli/train has 0 rows with a label"):
        load_task("snli")


def test_boolq_pairs_a_question_with_its_passage_and_answers_no_or_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pairs([True, False, True], "question", "passage", "answer")
    hub(monkeypatch, {"train": rows, "validation": rows[:1]})
    task = load_task("boolq")
    assert task.kind == "classification" and task.labels == ["no", "yes"]
    assert task.train_split["label"][:] == [1, 0, 1] and task.train_split["text_a"][0] == "one 0"


def test_tasks_without_a_development_set_are_scored_on_the_test_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [
        {"text": f"t{i}", "label_coarse": i, "label_coarse_original": name} for i, name in enumerate(["NUM", "HUM"])
    ]
    hub(monkeypatch, {"train": rows, "test": rows[1:]})
    task = load_task("trec")
    assert task.labels == ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"] and task.train_split["label"][:] == [5, 3]
    assert {split: len(data) for split, data in task.splits.items()} == {"train": 2, "validation": 1}
    for split in ("train", "test"):
        jsonl(tmp_path / "subj" / f"{split}.jsonl", [{"text": "x", "label": i} for i in (0, 1)])
    assert set(load_task("subj", tmp_path).splits) == {"train", "validation"}
    jsonl(tmp_path / "subj" / "dev.jsonl", [{"text": "x", "label": "subjective"}] * 3)
    with pytest.raises(BayesLoraError, match="dev.jsonl, line 1 has the label 'subjective'"):
        load_task("subj", tmp_path)
    jsonl(tmp_path / "subj" / "dev.jsonl", [{"text": "x", "label": 1}] * 3)
    own = load_task("subj", tmp_path)
    assert {split: len(data) for split, data in own.splits.items()} == {"train": 2, "validation": 3, "test": 2}


def test_answers_of_the_hub_are_letters_digits_or_indices(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [lettered("C", LETTERS[:4]), lettered("4", DIGITS), lettered("A", LETTERS[:3])]
    calls = hub(monkeypatch, {"train": rows, "validation": rows[:1], "test": rows[1:]})
    task = load_task("arc_challenge")
    assert task.train_split["label"][:] == [2, 3, 0] and task.labels == LETTERS[:4]
    assert task.train_split["choices"][2] == ["choice A", "choice B", "choice C"]
    assert set(task.splits) == {"train", "validation", "test"} and calls == [("allenai/ai2_arc", "ARC-Challenge")]
    # Hidden answers of a test split.
    rows = [lettered("E", LETTERS)]
    hub(monkeypatch, {"train": rows, "validation": rows, "test": [lettered("", LETTERS)]})
    task = load_task("commonsenseqa")
    assert task.train_split["label"][:] == [4] and set(task.splits) == {"train", "validation"}
    rows = [lettered("B", LETTERS[:4], "question_stem")]
    hub(monkeypatch, {"train": rows, "validation": rows, "test": rows})
    assert load_task("openbookqa").splits["test"]["label"][:] == [1]
    rows = [{"goal": "open it", "sol1": "push", "sol2": "pull", "label": i} for i in (1, 0)]
    hub(monkeypatch, {"train": rows, "validation": rows, "test": [{**rows[0], "label": -1}]}, label=["0", "1"])
    task = load_task("piqa")
    assert task.train_split["label"][:] == [1, 0] and task.train_split["choices"][0] == ["push", "pull"]
    assert task.train_split["question"][0] == "open it" and task.labels == ["A", "B"] and "test" not in task.splits
    hub(monkeypatch, {split: [lettered("F", LETTERS)] for split in ("train", "validation")})
    with pytest.raises(BayesLoraError, match="row 1 has the answer 'F', but needs the index"):
        load_task("arc_easy")


def test_winogrande_and_mmlu_come_from_the_hub_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = {"sentence": "Ann beat Eve because _ was faster.", "option1": "Ann", "option2": "Eve"}
    other = {"sentence": "Al saw Bo but _ left.", "option1": "Bo", "option2": "Al", "answer": "1"}
    rows = [{**sentence, "answer": "1"}, {**sentence, "answer": "2"}, other]
    calls = hub(monkeypatch, {"train": rows, "validation": rows[:1], "test": [{**sentence, "answer": ""}]})
    task = load_task("winogrande", train_split="train_xs")
    assert task.train_split["label"][:] == [0, 1, 0] and set(task.splits) == {"train", "validation"}
    assert task.train_split["choices"][0] == ["Ann was faster.", "Eve was faster."]
    assert task.group_column == "group" and len(set(task.train_split["group"])) == 2
    load_task("winogrande")
    assert [name for _, name in calls] == ["winogrande_xs", "winogrande_s"]
    row = {"question": "why?", "subject": "law", "choices": list("abcd"), "answer": 3}
    hub(monkeypatch, {"dev": [row], "validation": [row], "test": [row, row], "auxiliary_train": [row]}, answer=LETTERS)
    task = load_task("mmlu")
    assert {split: len(data) for split, data in task.splits.items()} == {"few_shot": 1, "test": 2}
    assert task.splits["test"]["subject"][:] == ["law", "law"] and task.splits["test"]["label"][:] == [3, 3]


def test_training_splits_can_be_chosen_only_where_there_are_several() -> None:
    for name in TASKS:
        if name != "winogrande":
            with pytest.raises(BayesLoraError, match="training split"):
                load_task(name, None, train_split="train_s")


def test_the_help_names_every_task_that_can_be_trained() -> None:
    text = RunOptions.__dataclass_fields__["task"].metadata["help"]
    named = text.replace(" or ", ", ").split(", ")
    assert sorted(named) == sorted(name for name in TASKS if name not in KNOWN or "train" in KNOWN[name].splits)
