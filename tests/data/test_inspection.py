"""What `inspect` says is what training reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bayeslora.data import HoldOut, inspect_file, load_files
from bayeslora.data.inspection import Lengths, Texts
from bayeslora.errors import BayesLoraError

TICKETS = """ticket id;Message;Category;priority
1;Die Rechnung ist falsch;billing;1
2;Ich kann mich nicht anmelden;login;2
3;;login;1
4;Paket fehlt;shipping ;1
5;Paket fehlt;shipping;1
6;Paket fehlt;billing;1
7;Hallo;;2
8;Rückerstattung bitte;nan;3
9;Meine Rechnung;billing;3
"""


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    file = tmp_path / "tickets.csv"
    file.write_bytes(TICKETS.encode("cp1252"))
    return file


def test_everything_that_training_would_read_and_tell(tickets: Path) -> None:
    found = inspect_file(tickets, ["Message"], "Category")
    assert (found.rows, found.encoding, found.delimiter) == (9, "windows-1252", ";")
    assert [(column.name, column.different, column.empty) for column in found.columns] == [
        ("ticket id", 9, 0), ("Message", 6, 1), ("Category", 5, 1), ("priority", 3, 0)
    ]  # fmt: skip
    assert (found.kind, found.guessed, found.problems, found.evaluation) == ("classification", [], [], None)
    assert (found.training.rows, found.training.unlabelled, found.training.empty_texts) == (7, 2, 1)
    assert found.training.labels == {"billing": 3, "login": 2, "shipping": 2}
    assert found.texts == Texts(2, 3, Lengths(11, 28, 28))
    with pytest.warns(UserWarning) as told:
        task = load_files(tickets, tickets, "Message", "Category")
    assert set(found.notes) <= {str(warning.message) for warning in told}
    assert task.labels == [*found.training.labels] and len(task.train_split) == found.training.rows


def test_columns_are_guessed_and_that_is_said(tickets: Path, tmp_path: Path) -> None:
    found = inspect_file(tickets)
    assert (found.text_columns, found.label_column) == (["Message"], "Category")
    assert found.guessed == ["Message", "Category"]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(
        '{"text_a": "x", "text_b": "yy", "label": 1, "n": 5}\n{"text_a": "", "text_b": "", "label": 0, "n": 6}\n'
    )
    found = inspect_file(pairs)
    assert found.text_columns == ["text_a", "text_b"] and found.label_column == "label"
    assert found.texts == Texts(0, 0, Lengths(0, 3, 3)) and found.training.empty_texts == 1
    several = tmp_path / "several.csv"
    several.write_text("body,a,b\nxx,1,2\nyyy,2,1\n")
    found = inspect_file(several)
    assert (found.text_columns, found.label_column, found.kind) == (["body"], None, None)


@pytest.mark.parametrize(
    ("header", "rows"),
    [
        ("id,message", ["1,a b", "2,b c", "3,c d", "4,d e"]),
        ("ticket id,message", ["7,a b", "7,a b", "8,c d", "8,c d"]),
        ("message,sent", ["a long text,monday", "b long text,tuesday", "c long text,friday", "d long text,monday"]),
    ],
)
def test_a_column_that_numbers_rows_or_hardly_repeats_is_not_guessed_as_the_label(
    tmp_path: Path, header: str, rows: list[str]
) -> None:
    file = tmp_path / "a.csv"
    file.write_text("\n".join([header, *rows, ""]))
    found = inspect_file(file)
    assert (found.text_columns, found.label_column, found.kind, found.problems) == (["message"], None, None, [])
    file.write_text("\n".join([f"{header},queue", *(f"{row},{'ab'[n % 2]}" for n, row in enumerate(rows)), ""]))
    assert inspect_file(file).label_column == "queue"


def test_questions_with_choices_are_multiple_choice(tmp_path: Path) -> None:
    items = [
        {"id": n, "question": f"q{n}", "choices": ["x", "yy", "z"][: 2 + n % 2], "labels": ["A", "B"], "answer": n % 3}
        for n in (0, 1, 3, 4, 5)
    ]
    file = write_rows(tmp_path / "a.jsonl", items)
    found = inspect_file(file, eval_file=file, count_tokens=lambda rows: [1] * len(rows))
    assert (found.kind, found.text_columns, found.label_column) == (
        "multiple_choice",
        ["question", "choices"],
        "answer",
    )
    assert found.problems == [] and found.training.labels == {"A": 2, "B": 2, "C": 1}
    assert found.evaluation is not None and (found.evaluation.rows, found.evaluation.shared) == (5, 5)
    assert "trained by the name of a task" in found.notes[0] and found.texts == Texts(0, 0, Lengths(8, 8, 8))
    bad = write_rows(tmp_path / "bad.jsonl", [*items, {"question": "q", "choices": ["x", "y"], "answer": 2}])
    for problems in (inspect_file(bad).problems, inspect_file(file, eval_file=bad).problems):
        assert len(problems) == 1 and f"{bad}, line 6 has the answer 2, but needs the index" in problems[0]
    assert inspect_file(file, ["question"], "answer").kind == "classification"


def test_the_split_is_that_of_training(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"text": f"t{i // 2}", "label": "abc"[i // 2 % 3], "user": i // 5} for i in range(120)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for held_out in (HoldOut(0.25, seed=4), HoldOut(0.25, "user", 4)):
        found = inspect_file(file, held_out=held_out)
        task = load_files(file, None, "text", "label", held_out=held_out)
        for part, split in ((found.training, task.train_split), (found.evaluation, task.eval_split)):
            assert part is not None and part.rows == len(split)
            assert [*part.labels.values()] == [count for _, count in sorted(Counter(split["label"]).items())]
        assert found.evaluation is not None
        assert found.evaluation.shared == sum(
            text in set(task.train_split["text"]) for text in task.eval_split["text"]
        )
        assert bool(found.evaluation.shared) == (held_out.group_column is not None)


def test_an_evaluation_file_is_compared_with_the_training_rows(tmp_path: Path) -> None:
    train, other = tmp_path / "a.csv", tmp_path / "b.csv"
    train.write_text("text,label\nx,1\ny,0\nz,1\n")
    other.write_text("text,label\nx,0\nw,1\nz,1\nv,\n")
    found = inspect_file(train, eval_file=other)
    assert found.evaluation is not None
    assert (found.evaluation.rows, found.evaluation.shared, found.evaluation.unlabelled) == (3, 2, 1)
    assert found.evaluation.labels == {"0": 1, "1": 2} and found.evaluation.file == str(other)
    other.write_text("text,label\nx,2\n")
    assert (
        "has the label '2', but the labels of the training data are 0, 1"
        in inspect_file(train, eval_file=other).problems[0]
    )


def test_numbers_and_tokens(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": "a b " * i, "label": i + 0.5}) + "\n" for i in range(1, 5)))

    def count(rows: list[tuple[str, ...]]) -> list[int]:
        return [len(" ".join(row).split()) + 2 for row in rows]

    found = inspect_file(file, count_tokens=count, max_length=7)
    assert found.kind == "regression" and found.training.labels == {}
    assert found.numbers == pytest.approx({"least": 1.5, "mean": 3.0, "most": 4.5, "deviation": 1.25**0.5})
    assert found.texts is not None
    assert found.texts.tokens == Lengths(6, 10, 10) and found.texts.too_long == 2
    assert inspect_file(file, kind="classification").training.labels == {"1.5": 1, "2.5": 1, "3.5": 1, "4.5": 1}


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"text": "x", "label": 1}, {"text": "y", "label": 1}], "every label in"),
        ([{"text": "x", "label": 1}, {"text": None, "label": 0}], "line 2 has an empty value in column 'text'"),
        ([{"text": "x", "label": None}], "0 rows with a label"),
        ([{"n": 1, "label": 1}, {"n": 2, "label": 0}], "lacks a column of texts"),
    ],
)
def test_what_training_refuses_is_a_problem_beside_the_rest(
    tmp_path: Path, rows: list[dict[str, Any]], problem: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = inspect_file(file)
    assert len(found.problems) == 1 and problem in found.problems[0] and found.rows == len(rows)


def test_conversations_and_completions_are_text_to_generate(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    file.write_text((json.dumps({"messages": turns, "id": 1}) + "\n") * 2)
    found = inspect_file(file)
    assert (found.kind, found.text_columns, found.label_column, found.problems) == (
        "generation",
        ["messages"],
        None,
        [],
    )
    assert found.training.rows == 2 and found.texts == Texts(1, 0, Lengths(9, 9, 9))
    file.write_text(json.dumps({"prompt": "ab", "completion": "cde", "label": 1}) + "\n")
    found = inspect_file(file)
    assert (found.kind, found.text_columns) == ("generation", ["prompt", "completion"])
    assert found.texts == Texts(0, 0, Lengths(5, 5, 5))


def test_a_named_column_must_be_there(tickets: Path) -> None:
    for columns in (["Text"], ["Message"]):
        with pytest.raises(BayesLoraError, match="but has columns ticket id, Message, Category, priority"):
            inspect_file(tickets, columns, "Label")


def test_columns_of_words_and_tags_must_be_there_too(tickets: Path) -> None:
    with pytest.raises(BayesLoraError, match="lacks column 'tokens', but needs one of words: name it with --text-col"):
        inspect_file(tickets, kind="token_classification")
    with pytest.raises(BayesLoraError, match="lacks column 'ner_tags', but needs one of tags: name it with --label-"):
        inspect_file(tickets, ["Message"], kind="token_classification")


def test_rows_to_generate_from_are_checked_as_in_training(tmp_path: Path) -> None:
    ask, tell = {"role": "user", "content": "who ?"}, {"role": "assistant", "content": "cat"}
    good = write_rows(tmp_path / "good.jsonl", [{"messages": [ask, tell]}] * 2)
    bad = write_rows(tmp_path / "bad.jsonl", [{"messages": [ask, tell]}, {"messages": [ask]}])
    assert inspect_file(good, eval_file=good).problems == []
    for problems in (inspect_file(bad).problems, inspect_file(good, eval_file=bad).problems):
        assert problems == [
            f"{bad}, line 2 has no answer of the assistant after its first message, but needs one: drop it"
        ]
    empty = write_rows(tmp_path / "empty.jsonl", [{"prompt": "who ?", "completion": " "}])
    assert "line 1 has an empty completion" in inspect_file(empty).problems[0]


def test_one_wrong_label_is_one_problem_and_not_one_for_each_file(tmp_path: Path) -> None:
    sets = write_rows(tmp_path / "sets.jsonl", [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": ["y"]}])
    mixed = write_rows(tmp_path / "mixed.jsonl", [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": 0.5}])
    assert inspect_file(sets, eval_file=sets).kind == "multi_label"
    assert len(inspect_file(mixed, eval_file=sets).problems) == 1
    marks = [{"text": "a", "joy": 1, "fear": 0}, {"text": "b", "joy": 0, "fear": 1}]
    right = write_rows(tmp_path / "right.jsonl", marks)
    wrong = write_rows(tmp_path / "wrong.jsonl", [*marks, {"text": "c", "joy": 2, "fear": 0}])
    (problem,) = inspect_file(wrong, label_column="joy,fear", eval_file=right).problems
    assert "line 3 has 2 in column 'joy', but 0 or 1 is needed" in problem


def test_a_guessed_label_that_a_row_lacks_is_a_problem_as_in_training(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 0}, {"text": "b", "labe": 1}, {"text": "c", "label": 1}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    said = f"{file}, line 2 lacks column 'label', but has columns text, labe: name one of them with --label-column"
    assert inspect_file(file).problems == [said]
    with pytest.raises(BayesLoraError, match="line 2 lacks column 'label'"):
        load_files(file, file, "text", "label")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
