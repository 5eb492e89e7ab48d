"""Labels as strangers write them: the same classes whatever the order, format and spelling, or a word about it."""

from __future__ import annotations

import csv
import itertools
import json
import random
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from bayeslora.data import Task, load_files
from bayeslora.errors import BayesLoraError


def rows_of(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    return path


def load(
    folder: Path, train: list[Any], evaluation: list[Any] | None = None, kind: str = "jsonl", **more: Any
) -> Task:
    first = write(folder / f"a.{kind}", rows_of(train))
    second = write(folder / f"b.{kind}", rows_of(train if evaluation is None else evaluation))
    return load_files(first, second, "text", "label", **more)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["refund", "billing", "login"], ["billing", "login", "refund"]),
        ([10, 9, -3], ["-3", "9", "10"]),
        (["10", "9", "1"], ["1", "9", "10"]),
        (["b", "10", "9"], ["10", "9", "b"]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_ids_do_not_depend_on_the_order_of_the_rows(
    tmp_path: Path, labels: list[Any], names: list[str], kind: str
) -> None:
    for order in itertools.permutations(labels):
        task = load(tmp_path, [*order], kind=kind)
        assert task.labels == names
        assert [names[number] for number in task.train_split["label"]] == list(map(str, order))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_whole_floats_are_classes_and_are_told(tmp_path: Path, kind: str) -> None:
    with pytest.warns(UserWarning, match="2 different whole numbers in column 'label', which are read as classes"):
        task = load(tmp_path, [1.0, 0.0, 1.0], kind=kind)
    assert (task.kind, task.labels, task.train_split["label"][:]) == ("classification", ["0", "1"], [1, 0, 1])
    # What is said is no guess, and is not told.
    first = tmp_path / f"a.{kind}"
    numbers = load_files(first, first, "text", "label", kind="regression")
    assert numbers.kind == "regression" and numbers.train_split["label"][:] == [1.0, 0.0, 1.0]
    classes = load_files(first, first, "text", "label", kind="classification")
    assert classes.labels == ["0", "1"]
    named = load_files(first, first, "text", "label", labels=["0", "1"])
    assert named.train_split["label"][:] == [1, 0, 1]


def test_the_kind_makes_classes_of_fractions_and_numbers_of_counts(tmp_path: Path) -> None:
    task = load(tmp_path, [2.5, 0.5, 10.0])
    assert task.kind == "regression"
    file = tmp_path / "a.jsonl"
    classes = load_files(file, file, "text", "label", kind="classification")
    assert classes.labels == ["0.5", "2.5", "10.0"] and classes.train_split["label"][:] == [1, 0, 2]
    with pytest.warns(UserWarning, match="30 different whole numbers in column 'label', which are read as classes"):
        counts = load(tmp_path, [*range(30)])
    assert len(counts.labels) == 30
    with pytest.raises(BayesLoraError, match="line 2 has the label 'high', but regression needs a finite number"):
        file = write(tmp_path / "words.jsonl", rows_of(["1", "high"]))
        load_files(file, file, "text", "label", kind="regression")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_booleans_are_the_same_classes_in_every_format(tmp_path: Path, kind: str) -> None:
    task = load(tmp_path, [True, False, True], kind=kind)
    assert (task.labels, task.train_split["label"][:]) == (["False", "True"], [1, 0, 1])
    task = load(tmp_path, [True, False], kind=kind, labels=["True", "False"])
    assert task.train_split["label"][:] == [0, 1]


def test_another_file_may_spell_labels_in_another_way(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", rows_of(["true", "false"]))
    other = write(tmp_path / "b.jsonl", rows_of([True, False, "TRUE"]))
    assert load_files(train, other, "text", "label").eval_split["label"][:] == [1, 0, 1]
    train = write(tmp_path / "a.csv", rows_of([1, 2, "other"]))
    other = write(tmp_path / "b.jsonl", rows_of([2, 1.0, "other"]))
    assert load_files(train, other, "text", "label").eval_split["label"][:] == [1, 0, 2]
    train = write(tmp_path / "a.jsonl", rows_of([1, 2]))
    other = write(tmp_path / "b.jsonl", rows_of(["2", "1.0"]))
    assert load_files(train, other, "text", "label").eval_split["label"][:] == [1, 0]
    with pytest.raises(BayesLoraError, match="line 1 has the label '3', but the labels of the training data are 1, 2"):
        load_files(train, write(tmp_path / "c.jsonl", rows_of(["3"])), "text", "label")


def test_names_of_a_run_that_mix_numbers_and_words_are_names_and_not_ids(tmp_path: Path) -> None:
    """Its evaluation rows may have numbers only."""
    file = write(tmp_path / "a.csv", rows_of([2, 1]))
    task = load_files(file, file, "text", "label", labels=["1", "2", "other"])
    assert task.eval_split["label"][:] == [1, 0]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_without_a_label_are_left_out_and_counted(tmp_path: Path, kind: str) -> None:
    missing = ["nan", "", "  ", "NaN", "<NA>"] + ([None] if kind != "csv" else [])
    labels = ["pos", *missing, "neg"]
    message = (
        rf"a.{kind} has {len(missing)} of {len(labels)} rows without a label in column 'label'.*first is \w+ [23]\)"
    )
    with pytest.warns(UserWarning, match=message) as found:
        task = load(tmp_path, labels, kind=kind)
    assert {str(warning.message).split(" has ")[0][-len(kind) - 2 :] for warning in found} == {
        f"a.{kind}",
        f"b.{kind}",
    }
    for split in task.splits.values():
        assert split["text"][:] == ["text 0", f"text {len(labels) - 1}"] and split["label"][:] == [1, 0]


def test_missing_numbers_are_left_out_too(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="a.jsonl has 2 of 4 rows without a label"):
        task = load(tmp_path, [0.5, float("nan"), None, 2.5])
    assert task.kind == "regression" and task.train_split["label"][:] == [0.5, 2.5]
    with pytest.warns(UserWarning, match="without a label"):
        counts = load(tmp_path, [1, None, 0], kind="parquet")
    assert counts.labels == ["0", "1"] and len(counts.train_split) == 2


def test_a_label_that_is_named_stays_what_it_is(tmp_path: Path) -> None:
    task = load(tmp_path, ["nan", "pos ", "pos"], labels=["nan", "pos ", "pos"])
    assert task.train_split["label"][:] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_blanks_around_a_label_are_stripped_and_told(tmp_path: Path, kind: str) -> None:
    with pytest.warns(
        UserWarning, match="has 1 of 3 labels with blanks around them, such as 'pos ', which are stripped"
    ):
        task = load(tmp_path, ["pos", "pos ", "neg"], kind=kind)
    assert task.labels == ["neg", "pos"] and task.train_split["label"][:] == [1, 1, 0]


def test_words_that_may_mean_no_label_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has 2 rows with the label 'None', which is read as a class"):
        task = load(tmp_path, ["None", "stance", "None"])
    assert task.labels == ["None", "stance"]


def test_decimal_commas_are_numbers_where_commas_are_no_delimiters(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text;label\na;0,5\nb;12,25\nc;3\n")
    with pytest.warns(UserWarning, match="has numbers with decimal commas in column 'label'"):
        task = load_files(file, file, "text", "label")
    assert task.kind == "regression" and task.train_split["label"][:] == [0.5, 12.25, 3.0]


def test_numbers_too_long_for_python_are_words(tmp_path: Path) -> None:
    long = "1" * 5000
    assert load(tmp_path, [long, "a"], kind="csv").labels == [long, "a"]


@pytest.mark.filterwarnings("ignore:.*read as two classes")
def test_shuffled_files_give_the_same_ids_for_any_labels(tmp_path: Path) -> None:
    generator = random.Random(1)
    for trial in range(30):
        kind = generator.choice(["jsonl", "csv"])
        pool: list[Any] = generator.choice([["a", "B", "ä", "1", "-"], [3, 20, -1, 100], ["x y", "x", "X"]])
        labels = [*pool, *generator.choices(pool, k=10)]
        seen = []
        for _ in range(2):
            generator.shuffle(labels)
            (tmp_path / str(trial)).mkdir(exist_ok=True)
            task = load(tmp_path / str(trial), labels, kind=kind)
            assert [task.labels[number] for number in task.train_split["label"]] == list(map(str, labels))
            seen.append(task.labels)
        assert seen[0] == seen[1]


def test_few_labels_that_make_classes_numbers_are_told(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"has 1 of 12 labels .* \(first line 3, 0.5\).* or give --kind classification"
    ):
        task = load(tmp_path, [0, 1, 0.5, *[0, 1] * 4, 1])
    assert task.kind == "regression"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, [0.5, 1, 2, 1.5]).kind == "regression"  # many fractions are no slip
        assert load(tmp_path, [0, 1, 0.5, *[0, 1] * 4, 1], kind="csv", labels=["0", "0.5", "1"]).kind != "regression"


def test_numbers_with_a_fraction_that_are_texts_are_told(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"as texts in column 'label' \(first line 1, '0.5'\), which are read as names"
    ):
        task = load(tmp_path, ["0.5", "1", "2.5"])
    assert task.labels == ["0.5", "1", "2.5"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = tmp_path / "a.jsonl"
        assert list(load_files(file, file, "text", "label", kind="regression").train_split["label"]) == [0.5, 1, 2.5]
        assert load(tmp_path, ["1.0", "2.0"]).labels == ["1.0", "2.0"]


def test_a_word_among_numbers_is_told(tmp_path: Path) -> None:
    """In CSV, whose cells have no types; elsewhere it is refused."""
    with pytest.warns(UserWarning, match="3 of 4 labels that are numbers in column 'label', but line 5 has 'x'"):
        task = load(tmp_path, [0.5, 1.5, 2.5, "x"], kind="csv")
    assert task.labels == ["0.5", "1.5", "2.5", "x"]
    with pytest.warns(UserWarning, match="so that all are read as names of classes"):
        load(tmp_path, [*range(12), "twelve"], kind="csv")
    with pytest.warns(UserWarning, match="1 of 4 labels that are numbers .*first line 4, '2.5'"):
        load(tmp_path, ["x", "y", 2.5, "x"], kind="csv")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, [1, 2, "other"], kind="csv").labels == ["1", "2", "other"]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_codes_with_zeros_in_front_are_names(tmp_path: Path, kind: str) -> None:
    task = load(tmp_path, ["02", "10", "01"], ["10", "02"], kind)
    assert (task.kind, task.labels) == ("classification", ["01", "02", "10"])
    assert task.splits["validation"]["label"][:] == [2, 1]
    assert load(tmp_path, ["0", "10", "2"], kind="csv").labels == ["0", "2", "10"]
    assert load(tmp_path, ["00.5", "10", "2"], kind="csv").kind == "regression"
    named = load(tmp_path, ["02", "01"], kind=kind, labels=["02", "01"])
    assert named.train_split["label"][:] == [0, 1]


def test_decimals_of_a_database_are_numbers(tmp_path: Path) -> None:
    whole, part = ([Decimal(text) for text in texts] for texts in (["0.00", "1.00"], ["0.50", "1.00"]))
    assert load(tmp_path, whole, kind="parquet", labels=["no", "yes"]).train_split["label"][:] == [0, 1]
    assert load(tmp_path, part, kind="parquet").train_split["label"][:] == [0.5, 1.0]


def test_names_that_differ_in_what_is_not_seen_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="which are read as two classes: write them the same way"):
        load(tmp_path, ["spam", "spam\u200b", "ham"])


def test_lists_in_cells_are_told_and_read_as_lists_if_that_is_said(tmp_path: Path) -> None:
    cells = ["['a', 'b']", "['a']", "['b']", "[]"]
    with pytest.warns(UserWarning, match="has lists such as .* the name of one class: give --kind multi_label"):
        assert load(tmp_path, cells, kind="csv").kind == "classification"
    file = write(tmp_path / "a.csv", rows_of(cells))
    task = load_files(file, file, "text", "label", kind="multi_label")
    assert task.labels == ["a", "b"] and task.train_split["label"][:] == [[1, 1], [1, 0], [0, 1], [0, 0]]


def test_a_column_that_is_different_in_most_rows_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has 30 different labels in 30 rows .*: name another column"):
        load(tmp_path, [f"{n}%" for n in range(30)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, [f"{n % 15}%" for n in range(30)])


def test_a_folder_is_told_as_one(tmp_path: Path) -> None:
    Dataset.from_list(rows_of([0, 1])).save_to_disk(tmp_path / "saved")
    with pytest.raises(BayesLoraError, match="saved is a folder, but a data file is needed: name one file in it"):
        load_files(tmp_path / "saved", tmp_path / "saved", "text", "label")


def spelled(labels: list[int], names: list[str]) -> list[dict[str, Any]]:
    return [{**row, "label_text": name} for row, name in zip(rows_of(labels), names, strict=True)]


def test_numbers_of_named_labels_mean_the_same_in_a_file_without_their_names(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", spelled([3, 1, 2, 1], ["happy", "sad", "mid", "sad"]))
    task = load_files(first, first, "text", "label")
    assert task.labels == ["sad", "mid", "happy"] and task.label_numbers == {"sad": 1, "mid": 2, "happy": 3}
    second = write(tmp_path / "b.jsonl", rows_of([2, 1, 2]))
    again = load_files(second, second, "text", "label", labels=task.label_numbers)
    assert again.labels == task.labels and again.eval_split["label"][:] == [1, 0, 1]
    third = write(tmp_path / "c.jsonl", spelled([1, 2], ["Sad", "mid"]))
    with pytest.raises(BayesLoraError, match="c.jsonl calls the label 1 'Sad', but the labels that are known are sad"):
        load_files(third, third, "text", "label", labels=task.label_numbers)
    plain = load(tmp_path, [0, 1, 1])
    assert plain.label_numbers == {}


def test_two_labels_of_one_name_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", spelled([0, 1, 2], ["a", "a", "b"]))
    with pytest.raises(BayesLoraError, match="line 2 calls the label 1 'a', but each label needs one name of its own"):
        load_files(file, file, "text", "label")


def test_numbers_are_not_ids_where_some_names_are_numbers(tmp_path: Path) -> None:
    names = ["10", "2", "n/a"]
    assert load(tmp_path, [2, 10], labels=names, kind="csv").eval_split["label"][:] == [1, 0]
    with pytest.raises(BayesLoraError, match="line 3 has the label '0', but the labels that are known are 10, 2"):
        load(tmp_path, [2, 0], labels=names, kind="csv")


def test_fractions_that_are_classes_are_found_by_their_names(tmp_path: Path) -> None:
    task = load(tmp_path, [0.5, 1.0, 1.5], kind="jsonl", labels=["0.5", "1.0", "1.5"])
    assert task.eval_split["label"][:] == [0, 1, 2]


def test_an_empty_name_tells_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", spelled([0, 1, 1], ["", "", ""]))
    assert load_files(file, file, "text", "label").labels == ["0", "1"]
    assert load_files(file, file, "text", "label", labels=["no", "yes"]).train_split["label"][:] == [0, 1, 1]
