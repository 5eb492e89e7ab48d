"""Sentences with a tag for each word: the files that are read, the numbers of tags, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from bayeslora.data import HoldOut, load_files
from bayeslora.data.inspection import inspect_file
from bayeslora.data.tables import read_table
from bayeslora.data.tagged import words_to_tag
from bayeslora.data.tasks import Task
from bayeslora.errors import BayesLoraError
from bayeslora.files import first_columns

ROWS: list[dict[str, Any]] = [
    {"tokens": ["John", "lives"], "ner_tags": ["B-PER", "O"]},
    {"tokens": ["in", "New", "York"], "ner_tags": ["O", "B-LOC", "I-LOC"]},
]
NAMES = ["B-LOC", "B-PER", "I-LOC", "O"]
CONLL = "-DOCSTART- -X- O\n\nJohn NNP B-PER\nlives VBZ O\n\n\nin IN O\nNew NNP B-LOC\r\nYork NNP I-LOC\n"


def load(rows: Any, evaluated: Any = None, words: str = "tokens", tags: str = "ner_tags", **options: Any) -> Task:
    return load_files(rows, evaluated or rows, words, tags, kind="token_classification", **options)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tags_are_numbered_in_sorted_order() -> None:
    task = load(ROWS)
    assert (task.kind, task.labels, task.metric, task.text_columns) == (
        "token_classification",
        NAMES,
        "span_f1",
        ("tokens",),
    )
    assert task.train_split[:] == {"tokens": [row["tokens"] for row in ROWS], "label": [[1, 3], [3, 0, 2]]}


def test_numbers_are_ids_of_the_names_that_are_given() -> None:
    rows = [{"tokens": ["a", "b"], "tags": [2, 0]}]
    assert load(rows, tags="tags", labels=["O", "B-X", "I-X"]).train_split["label"][:] == [[2, 0]]
    task = load(rows, tags="tags")
    assert (task.labels, task.train_split["label"][:], task.metric) == (["0", "2"], [[1, 0]], "accuracy")


@pytest.mark.parametrize("name", ["train.conll", "train.txt", "train.tsv", "train.bio"])
def test_a_conll_file_is_told_by_its_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(CONLL, encoding="utf-8")
    assert first_columns(path) == ["tokens", "column_2", "tags"]
    table = read_table(path, ("tokens", "tags"), ["column_2"])
    assert table.columns["tokens"] == [row["tokens"] for row in ROWS]
    assert table.columns["tags"] == [row["ner_tags"] for row in ROWS]
    assert table.columns["column_2"] == [["NNP", "VBZ"], ["IN", "NNP", "NNP"]]
    assert list(table.places) == ["line 3", "line 7"]
    # The training rows' names of the columns do not matter where both are usual ones.
    assert load(ROWS, path).eval_split["label"][:] == [[1, 3], [3, 0, 2]]
    with pytest.raises(BayesLoraError, match="lacks column 'mine'"):
        load(path, tags="mine")


def test_other_files_stay_what_they_are(tmp_path: Path) -> None:
    table = tmp_path / "a.tsv"
    table.write_text("text\tlabel\ngood\tyes\n\nbad\tno\n", encoding="utf-8")
    assert first_columns(table) == ["text", "label"]
    assert read_table(table, ("text", "label")).columns["label"] == ["yes", "no"]
    for name, text in (
        ("a.txt", "some prose of\nany length\n"),
        ("d.txt", "two words\n"),
        ("b.txt", "words\n\nalone\n"),
        ("c.txt", ""),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(BayesLoraError, match="extension of .*txt is .txt, but must be"):
            read_table(tmp_path / name, ())
    with pytest.raises(BayesLoraError, match="none.conll does not exist"):
        read_table(tmp_path / "none.conll", ())
    broken = tmp_path / "short.conll"
    broken.write_text("a O\n\nb\n", encoding="utf-8")
    with pytest.raises(BayesLoraError, match="short.conll is not a CoNLL file, but must have a word and its tags"):
        read_table(broken, ())
    broken = tmp_path / "broken.conll"
    broken.write_text("a O\n" * 1200 + "\nb\n", encoding="utf-8")
    with pytest.raises(BayesLoraError, match="line 1202 has 1 field, but the first line has 2"):
        read_table(broken, ())


def test_cells_of_csv_are_split_at_blanks_or_read_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'tokens,tags\nJohn lives,B-PER O\n"[""New York"", ""is""]","[""B-LOC"", ""O""]"\n', encoding="utf-8"
    )
    task = load(path, tags="tags")
    assert task.train_split["tokens"][:] == [["John", "lives"], ["New York", "is"]]
    assert task.labels == ["B-LOC", "B-PER", "O"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": ["a", "b"], "ner_tags": ["O"]}, "line 2 has 2 words but 1 tag, but each word needs one"),
        ({"tokens": [], "ner_tags": []}, "line 2 has 0 words in column 'tokens'"),
        ({"tokens": ["a", " "], "ner_tags": ["O", "O"]}, "line 2, word 2 is ' ', but must be a text"),
        ({"tokens": ["a", 7], "ner_tags": ["O", "O"]}, "line 2, word 2 is 7, but must be a text"),
        ({"tokens": None, "ner_tags": ["O"]}, "line 2 has an empty value in column 'tokens', but a list of words"),
        ({"tokens": ["a"], "ner_tags": None}, "line 2 has 'None' in column 'ner_tags', but a list of tags"),
        ({"tokens": ["a"], "ner_tags": [None]}, "line 2, word 1 has the tag None, but a text or a whole number"),
        ({"tokens": ["a"], "ner_tags": [-100]}, "line 2, word 1 has the tag -100, but a text or a whole number"),
        ({"tokens": ["a"], "ner_tags": [1]}, "line 2, word 1 has the label 1, but labels are all integers or all str"),
    ],
)
def test_a_row_that_is_not_tagged_is_told(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(BayesLoraError, match=said):
        load(write(tmp_path / "a.jsonl", [ROWS[0], row]))


def test_an_unknown_tag_of_the_evaluation_rows_is_told(tmp_path: Path) -> None:
    other = write(tmp_path / "a.jsonl", [ROWS[0], {"tokens": ["a", "b"], "ner_tags": ["O", "B-ORG"]}])
    with pytest.raises(BayesLoraError, match="line 2, word 2 has the label 'B-ORG', but the labels of the training"):
        load(ROWS, other)


def test_held_out_rows_keep_rare_tags_on_both_sides() -> None:
    rows = [{"tokens": [f"w{n}", "x"], "tags": ["B-A" if n % 10 == 0 else "O", "O"]} for n in range(40)]
    task = load_files(rows, None, "tokens", "tags", kind="token_classification", held_out=HoldOut(0.25))
    assert len(task.eval_split) == 10 and len(task.train_split) == 30
    assert sum(0 in tags for tags in task.eval_split["label"]) == 1
    again = load_files(rows, None, "tokens", "tags", kind="token_classification", held_out=task.evaluation_rows)
    assert again.eval_split[:] == task.eval_split[:]


def test_inspect_says_what_would_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text(CONLL, encoding="utf-8")
    found = inspect_file(path, eval_file=write(tmp_path / "b.jsonl", ROWS[:1]))
    assert (found.kind, found.text_columns, found.label_column) == ("token_classification", ["tokens"], "tags")
    assert found.training.labels == {"B-LOC": 1, "B-PER": 1, "I-LOC": 1, "O": 2} and found.rows == 2
    assert found.evaluation is not None and found.evaluation.labels["B-PER"] == 1 and found.evaluation.shared == 1
    assert found.guessed == ["tokens", "tags"] and not found.problems
    wrong = inspect_file(write(tmp_path / "c.jsonl", [{"tokens": ["a"], "tags": []}]))
    assert "1 word but 0 tags" in str(wrong.problems)


def cells(path: Path, *rows: tuple[str, str]) -> Path:
    """Write a CSV file with a row of words and of tags for each pair."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("tokens", "ner_tags"), *rows])
    return path


def test_cells_of_csv_are_lists_as_pandas_writes_them(tmp_path: Path) -> None:
    rows = [(str(row["tokens"]), str(row["ner_tags"])) for row in ROWS]
    task = load(cells(tmp_path / "a.csv", *rows))
    assert task.labels == NAMES and task.train_split["tokens"][:] == [row["tokens"] for row in ROWS]
    numbers = cells(tmp_path / "b.csv", ('["John", "lives"]', "[1, 0]"), ("['it\\'s', \"x\"]", "[0, 2]"))
    assert load(numbers).labels == ["0", "1", "2"]
    assert load(cells(tmp_path / "d.csv", ("a b", "10 9"), ("a b", "[9, 10]"))).labels == ["9", "10"]
    named = load(numbers, labels=["O", "B-PER", "I-PER"])
    assert named.train_split[:] == {"tokens": [["John", "lives"], ["it's", "x"]], "label": [[1, 0], [0, 2]]}
    empty = cells(tmp_path / "c.csv", *rows, ("[]", "[]"))
    with pytest.raises(BayesLoraError, match="line 4 has 0 words in column 'tokens'"):
        load(empty)


def test_a_sentence_between_brackets_has_words(tmp_path: Path) -> None:
    texts = ["[sic]", "[ 1 ] is here", "[1]", "[1, 2]", "[1 2]", "[CLS] a [SEP]", '[so "no" "yes"]', "['tis so]"]
    words = [text.split() for text in texts]
    tagged = [(text, " ".join("O" * len(own))) for text, own in zip(texts, words, strict=True)]
    file = cells(tmp_path / "a.csv", *tagged)
    found = words_to_tag(read_table(file, ("tokens", "ner_tags")), "tokens")
    assert found["tokens"] == words and load([*ROWS], file).eval_split["label"][2] == [3]
    places = zip(texts, found["offsets"], strict=True)
    assert [[text[start:end] for start, end in own] for text, own in places] == words
    assert words_to_tag(read_table([{"text": "['sic']"}], ("text",)), "text") == {"text": [["sic"]], "offsets": [[]]}


@pytest.mark.parametrize(
    ("words", "tags", "said"),
    [
        ("['John' 'lives']", "['B-PER' 'O']", "line 3 has .* in column 'tokens'"),
        ("['John'\n 'lives' \"it's\"]", "O O O", "line 4 has .* in column 'tokens'"),
        ("['John' 'lives', 'here']", "O O O", "line 3 has .* in column 'tokens'"),
        ("John lives", "[1 0]", r"line 3 has '\[1 0\]' in column 'ner_tags'"),
        ("John lives", "[0. 1.]", "line 3 has .* in column 'ner_tags'"),
    ],
)
def test_cells_that_numpy_wrote_are_refused(tmp_path: Path, words: str, tags: str, said: str) -> None:
    file = cells(tmp_path / "a.csv", ("a b", "B-PER O"), (words, tags))
    with pytest.raises(BayesLoraError, match=said + ", but a list with commas between its entries is needed: write"):
        load(file)


def test_a_table_that_ends_in_an_empty_line_is_no_conll_file(tmp_path: Path) -> None:
    rows = "good\tA\nfair\tB-\nbad\tO\n"
    for name, end in (("a.tsv", "\n"), ("b.tsv", "\n\n \n"), ("c.csv", "\n")):
        file = tmp_path / name
        file.write_text("text\tlabel\n" + rows + end, encoding="utf-8")
        assert first_columns(file) == ["text", "label"], name
    graded = tmp_path / "d.tsv"
    graded.write_text("text\tlabel\ngood\tA\n\nfair\tB-\n", encoding="utf-8")
    assert first_columns(graded) == ["text", "label"]
    for name, text in (
        ("e.tsv", "John\tB-PER\nlives\tO\n\n"),
        ("f.tsv", "John\tI-PER\nlives\tI-X\n\n"),
        ("g.tsv", "He\tX\n\nJohn\tB-PER\nlives\tO\n"),
        ("h.conll", "John NNP\nlives VBZ\n\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert first_columns(tmp_path / name) == ["tokens", "tags"], name
