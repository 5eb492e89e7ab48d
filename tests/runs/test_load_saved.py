"""`bayeslora.load` of what a script of one's own saved: without `run.json`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoTokenizer

import bayeslora
from bayeslora import BayesLoraError
from bayeslora.cli.main import main
from tests.conftest import build_tiny_bert, build_tiny_tokenizer
from tests.runs.conftest import NAMES, tickets, write_rows

TEXTS = [row["text"] for row in tickets(6, seed=3)]
ROWS = [{"id": n, "message": row["text"], "topic": row["label"]} for n, row in enumerate(tickets(60, seed=1))]
NAMED: dict[str, Any] = {"labels": NAMES, "text_columns": "message", "label_column": "topic"}


def saved(folder: Path, base: Path, classes: int = len(NAMES), kind: str = "SEQ_CLS") -> Path:
    """An adapter as a script saves it: its classes have no names in the folder, nor in the base model's."""
    model = build_tiny_bert(num_labels=classes)
    model.name_or_path = str(base)
    config = bayeslora.MeLoraConfig(r=2, target_modules=["query"], task_type=kind, init_weights=False)
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder


@pytest.fixture
def adapter(tmp_path: Path, tiny_bert_folder: Path) -> Path:
    return saved(tmp_path / "adapter", tiny_bert_folder)


@pytest.fixture
def merged(adapter: Path, tmp_path: Path) -> Path:
    bayeslora.export(load(adapter).model, tmp_path / "merged", format="merged")
    return tmp_path / "merged"


def load(folder: Path, **given: Any) -> Any:
    return bayeslora.load(folder, **given)


def refused(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(BayesLoraError, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")


def test_an_export_without_a_tokenizer_says_where_to_take_it_from(merged: Path, tiny_bert_folder: Path) -> None:
    refused(
        lambda: load(merged),
        r"merged lacks the tokenizer .*, or give load\(…, tokenizer=…\) the folder or hub id of the model",
    )
    refused(lambda: load(merged, tokenizer=merged), r"merged lacks a tokenizer, .* model that was fine-tuned")
    assert len(load(merged, tokenizer=tiny_bert_folder).predict(TEXTS)) == 6


def test_a_tokenizer_with_hardly_any_of_the_models_tokens_is_refused(
    merged: Path, adapter: Path, tmp_path: Path
) -> None:
    """Such as Transformers makes of a folder whose vocabulary is gone."""
    build_tiny_tokenizer().save_pretrained(tmp_path / "gone")
    shutil.copy(merged / "config.json", tmp_path / "gone")
    (tmp_path / "gone" / "tokenizer.json").unlink()
    (tmp_path / "gone" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    empty = AutoTokenizer.from_pretrained(tmp_path / "gone")
    assert len(empty) == 5
    for given in (tmp_path / "gone", empty):
        for folder in (merged, adapter):
            refused(
                lambda folder=folder, given=given: load(folder, tokenizer=given),  # type: ignore[misc]
                r"has 5 tokens, but the model knows \d+: give .* the model that was fine-tuned",
            )


def test_a_base_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    build_tiny_bert().save_pretrained(tmp_path / "base")
    folder = saved(tmp_path / "adapter", tmp_path / "base")
    refused(lambda: load(folder), "base lacks a tokenizer")


@pytest.mark.parametrize("name", ["spm.model", "sentencepiece.bpe.model", "merges.txt", "tekken.json"])
def test_tokenizers_of_every_kind_of_file_are_found(tmp_path: Path, name: str) -> None:
    from bayeslora.runs.base import has_tokenizer

    assert not has_tokenizer(tmp_path)
    (tmp_path / name).touch()
    assert has_tokenizer(tmp_path)


@pytest.mark.parametrize("labels", [NAMES, tuple(NAMES), {id: name for id, name in reversed([*enumerate(NAMES)])}])
def test_names_given_are_those_of_the_answers(adapter: Path, labels: Any) -> None:
    assert load(adapter).labels == [f"LABEL_{index}" for index in range(6)]
    run = load(adapter, labels=labels)
    assert run.labels == NAMES and run.model.config.id2label == dict(enumerate(NAMES))
    assert set(run.predict(TEXTS).labels) <= set(NAMES)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_folder_with_names_takes_files_as_a_run_does(
    adapter: Path, merged: Path, form: str, tmp_path: Path, tiny_bert_folder: Path
) -> None:
    run = load(adapter if form == "adapter" else merged, tokenizer=tiny_bert_folder, **NAMED)
    expected = run.predict([row["message"] for row in ROWS]).probabilities
    for rows in (write_rows(tmp_path / "new.jsonl", ROWS), ROWS):
        assert torch.equal(run.predict(rows).probabilities, expected)
    samples = 3 if form == "adapter" else 0
    for held_out in (write_rows(tmp_path / "held_out.jsonl", ROWS), ROWS):
        calibration = run.calibrate(held_out, samples=samples)
        assert calibration.rows == 60 and calibration.labels == NAMES
    found = run.predict(TEXTS, coverage=0.5, risk=0.5)
    assert all(set(row.set) <= set(NAMES) and row.ask_a_human is not None for row in found)


def test_a_folder_of_pairs_has_two_columns(tmp_path: Path, tiny_bert_folder: Path) -> None:
    folder = saved(tmp_path / "pairs", tiny_bert_folder, classes=1)
    run = load(folder, text_columns=["a", "b"], label_column="score")
    rows = [{"a": text, "b": "the plot", "score": index / 7} for index, text in enumerate(TEXTS * 4)]
    assert run.kind == "regression" and run.calibrate(rows).rows == 24
    assert run.predict(rows[:2]).labels == run.predict([(row["a"], row["b"]) for row in rows[:2]]).labels


def test_the_usual_columns_need_no_names(adapter: Path) -> None:
    run = load(adapter, labels=NAMES)
    assert run.calibrate([{"text": row["message"], "label": row["topic"]} for row in ROWS]).rows == 60


def test_what_cannot_be_told_names_the_argument(adapter: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "held_out.jsonl", ROWS)
    where = r"held_out\.jsonl|the input"
    for given, argument in (
        ({}, "text_columns"),
        ({"text_columns": "message"}, "label_column"),
        ({"text_columns": "message", "label_column": "topic"}, "labels"),
    ):
        run = load(adapter, **given)
        for rows in (file, ROWS):
            refused(lambda run=run, rows=rows: run.calibrate(rows), rf"({where}).*load\(…, {argument}=…\)")  # type: ignore[misc]
    inputs: list[Any] = [file, ROWS, ROWS[0]]
    for each in inputs:
        refused(
            lambda each=each: load(adapter).predict(each),  # type: ignore[misc]
            rf"({where}) has the columns id, message, topic, .*load\(…, text_columns=…\)",
        )
    refused(lambda: load(adapter).predict(Path("absent.csv")), r"absent\.csv does not exist")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"labels": NAMES[:4]}, "labels has 4 names, but the model in .* has 6 classes: give one for each"),
        ({"labels": {1: "a", 2: "b"}}, "labels is {1: .*, but must be different names, one for each class"),
        ({"labels": ["a"] * 6}, "labels is .*, but must be different names"),
        ({"labels": "billing"}, "labels is 'billing', but must be"),
        ({"text_columns": ["a", "b", "c"]}, "text_columns is .*, but must be one name, or two different ones"),
        ({"text_columns": ["a", "a"]}, "text_columns is .*, but must be one name, or two different ones"),
        ({"text_columns": []}, "text_columns is .*, but must be one name, or two different ones"),
        ({"label_column": ["a"]}, "label_column is .*, but must be a name"),
    ],
)
def test_names_that_do_not_fit_are_refused(adapter: Path, given: dict[str, Any], sentence: str) -> None:
    refused(lambda: load(adapter, **given), sentence)


def test_names_of_another_kind_of_model_are_refused(tmp_path: Path, tiny_bert_folder: Path) -> None:
    number = saved(tmp_path / "number", tiny_bert_folder, classes=1)
    refused(lambda: load(number, labels=["a"]), "labels is given, but .* predicts numbers: leave it out")
    words = saved(tmp_path / "words", tiny_bert_folder, kind="TOKEN_CLS")
    refused(lambda: load(words, text_columns=["a", "b"]), "text_columns is .*, but must be one name")


@pytest.mark.parametrize("name", NAMED)
def test_what_run_json_says_may_be_repeated_but_not_changed(run_of: Callable[[str], Path], name: str) -> None:
    folder = run_of("lora")
    own = {"labels": NAMES, "text_columns": "text", "label_column": "label"}
    assert load(folder, **{name: own[name]}).labels == NAMES
    other = {"labels": NAMES[::-1], "text_columns": "message", "label_column": "topic"}
    refused(lambda: load(folder, **{name: other[name]}), rf"{name} is .*, but .*run\.json has .*: leave it out")


def test_a_description_that_is_saved_makes_the_folder_one_for_the_commands(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load(adapter, **NAMED)
    expected = run.predict(TEXTS).probabilities
    run.tokenizer.save_pretrained(adapter)
    run.info.save(adapter)
    assert torch.equal(load(adapter).predict(TEXTS).probabilities, expected)
    file = str(write_rows(tmp_path / "new.jsonl", ROWS))
    chosen = tmp_path / "chosen.jsonl"
    assert main(["calibrate", str(adapter), "--eval-file", file]) == 0
    assert main(["select", str(adapter), "--input", file, "--budget", "3", "--output", str(chosen)]) == 0
    assert chosen.read_text(encoding="utf-8").count('"message"') == 3


def test_the_names_of_a_base_with_as_many_classes_are_taken(tmp_path: Path) -> None:
    names = dict(enumerate(NAMES))
    build_tiny_bert(num_labels=6, id2label=names).save_pretrained(tmp_path / "base")
    build_tiny_tokenizer().save_pretrained(tmp_path / "base")
    assert AutoConfig.from_pretrained(tmp_path / "base").id2label == names
    assert load(saved(tmp_path / "adapter", tmp_path / "base")).labels == NAMES
