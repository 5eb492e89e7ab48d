"""Tasks out of files and folders: what is read, and what is refused with one sentence."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from bayeslora.data import TASKS, Task, hold_out, load_files, load_task, load_texts
from bayeslora.data.inspection import inspect_file
from bayeslora.data.tables import read_table
from bayeslora.data.tasks import load_choices
from bayeslora.errors import BayesLoraError


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(labels: list[Any], **more: list[Any]) -> list[dict[str, Any]]:
    columns = {"text": [f"text {i}" for i in range(len(labels))], "label": labels, **more}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def load(tmp_path: Path, train: list[Any], evaluation: list[Any] | None = None, **options: Any) -> Task:
    train_file = jsonl(tmp_path / "a.jsonl", train)
    eval_file = jsonl(tmp_path / "b.jsonl", train if evaluation is None else evaluation)
    return load_files(train_file, eval_file, "text", "label", **options)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        quoted = ['"{}","{}",{}'.format(row["a"].replace('"', '""'), row["b"], row["y"]) for row in rows]
        path.write_text("\ufeffa,b,y\r\n" + "\r\n".join(quoted) + "\r\n", encoding="utf-8", newline="")
    else:
        jsonl(path, rows)
    return path


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("labels", [["no", "yes", "no"], [3, 1, 3], [0.5, 2.0, -1.25]], ids=["str", "int", "float"])
def test_every_format_gives_the_same_task(tmp_path: Path, extension: str, labels: list[Any]) -> None:
    texts = ['a "quoted", line', "", "two\nlines\u2028é"]
    rows = [{"a": text, "b": "second", "y": label} for text, label in zip(texts, labels, strict=True)]
    file = write(tmp_path / f"data.{extension}", rows)
    with pytest.warns(UserWarning, match=r"has 1 of 3 rows with an empty text in column 'a'"):
        task = load_files(file, file, ["a", "b"], "y", test_file=file)
    assert list(task.splits) == ["train", "validation", "test"]
    assert task.train_split["a"][:] == texts
    assert task.text_columns == ("a", "b") and task.label_column == "label"
    if isinstance(labels[0], float):
        assert (task.kind, task.labels, task.metrics) == ("regression", [], ("pearson", "spearman"))
        assert task.eval_split["label"][:] == labels
    else:
        assert (task.kind, task.metrics) == ("classification", ("accuracy",))
        # Strings by name, integers by size.
        assert task.labels == (["no", "yes"] if isinstance(labels[0], str) else ["1", "3"])
        assert task.eval_split["label"][:] == ([0, 1, 0] if isinstance(labels[0], str) else [1, 0, 1])


def test_integer_labels_are_called_by_their_label_text(tmp_path: Path) -> None:
    task = load(tmp_path, rows_of([1, 0, 1], label_text=["good", "bad", "good"]))
    assert task.labels == ["bad", "good"]
    assert task.train_split["label"][:] == [1, 0, 1]
    with pytest.raises(
        BayesLoraError, match=r"a.jsonl, line 2 calls the label 1 'fine', but each label needs one name"
    ):
        load(tmp_path, rows_of([1, 1, 0], label_text=["good", "fine", "bad"]))


def test_named_labels_fix_the_order_and_allow_classes_without_examples(tmp_path: Path) -> None:
    task = load(tmp_path, rows_of(["c", "a"]), labels=["a", "b", "c"])
    assert task.labels == ["a", "b", "c"] and task.train_split["label"][:] == [2, 0]
    task = load(tmp_path, rows_of([2, 0]), labels=["a", "b", "c"])
    assert task.train_split["label"][:] == [2, 0]
    grades = load(tmp_path, rows_of([5, 3]), labels=["1", "2", "3", "4", "5"])
    assert grades.train_split["label"][:] == [4, 2]
    with pytest.raises(BayesLoraError, match="line 2 has the label 0, but the labels that are known are"):
        load(tmp_path, rows_of([5, 0]), labels=["1", "2", "3", "4", "5"])
    spelled = load(tmp_path, rows_of([7, 3], label_text=["b", "a"]), labels=["a", "b", "c"])
    assert spelled.train_split["label"][:] == [1, 0]
    with pytest.raises(BayesLoraError, match="'d', but the labels that are known are"):
        load(tmp_path, rows_of(["d", "a"]), labels=["a", "b", "c"])
    with pytest.raises(BayesLoraError, match="at least 2 different names"):
        load(tmp_path, rows_of(["a", "a"]), labels=["a", "a"])


def test_a_label_never_seen_in_training_is_refused_with_its_place(tmp_path: Path) -> None:
    message = r"b.jsonl, line 2 has the label 'meh', but the labels of the training data are 'no', 'yes'"
    with pytest.raises(BayesLoraError, match=message):
        load(tmp_path, rows_of(["no", "yes"]), rows_of(["yes", "meh"]))


def test_csv_labels_are_read_as_the_training_files_were(tmp_path: Path) -> None:
    train, evaluation = tmp_path / "train.csv", tmp_path / "eval.csv"
    train.write_text("text,label\na,1\nb,2\nc,other\n")
    evaluation.write_text("text,label\na,2\nb,1\n")
    task = load_files(train, evaluation, "text", "label")
    assert task.labels == ["1", "2", "other"] and task.eval_split["label"][:] == [1, 0]
    train.write_text("text,label\na,1\nb,2\n")
    evaluation.write_text("text,label\na,2\nb,x\n")
    with pytest.raises(BayesLoraError, match="line 3 has the label 'x'"):
        load_files(train, evaluation, "text", "label")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, "yes"], r"line 2 has the label 'yes', but labels are all integers or all strings"),
        ([None, ""], r"a.jsonl has 0 rows with a label in column 'label', but needs some"),
        ([0, True], r"line 2 has the label 'True', but labels are all integers or all strings"),
        ([0, [1]], r"line 2 has the label \[1\] of type list"),
        ([0.5, "high"], r"line 2 has the label 'high', but labels are all"),
        (["one", "one"], r"every label in .* is 'one', but training needs 2 classes"),
    ],
)
def test_labels_that_make_no_task_are_refused(tmp_path: Path, labels: list[Any], message: str) -> None:
    with pytest.raises(BayesLoraError, match=message):
        load(tmp_path, rows_of(labels))


def test_regression_takes_finite_numbers_only(tmp_path: Path) -> None:
    assert load(tmp_path, rows_of([1, 2, 5]), kind="regression").train_split["label"][:] == [1.0, 2.0, 5.0]
    with pytest.raises(
        BayesLoraError, match="b.jsonl, line 1 has the label 'high', but regression needs a finite number"
    ):
        load(tmp_path, rows_of([0.5, 1.0]), rows_of(["high"]))
    with pytest.raises(BayesLoraError, match="line 2 has the label inf, but regression needs a finite number"):
        load(tmp_path, rows_of([0.5, float("inf")]))


def test_a_missing_column_names_those_there_are(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", rows_of([0, 1]))
    with pytest.raises(BayesLoraError, match=r"line 1 lacks column 'sentence', but has columns text, label: name"):
        load_files(file, file, "sentence", "label")
    later = jsonl(tmp_path / "b.jsonl", [*rows_of([0, 1]), {"text": "x"}])
    with pytest.raises(BayesLoraError, match=r"b.jsonl, line 3 lacks column 'label', but has columns text"):
        load_files(file, later, "text", "label")
    for name in ("data.csv", "data.parquet"):
        table = write(tmp_path / name, [{"a": "x", "b": "y", "y": 0}])
        with pytest.raises(
            BayesLoraError, match="'text', but has columns a, b, y: name one of them with --text-column"
        ):
            load_files(table, table, "text", "y")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x", "label": 0}\n\n{"text": "y", "lab', r"a.jsonl, line 3 is not valid JSON"),
        ("a.jsonl", '{"text": "x", "label": 0}\n[1]\n', r"a.jsonl, line 2 is a list, but must be an object"),
        ("a.json", '[{"text": "x"},\n {"text" 1}]', r"a.json, line 2 is not valid JSON"),
        ("a.csv", "text,label\nx,0\ny,1,2\n", r"a.csv, line 3 has 3 fields, but the header has 2"),
        ("a.csv", 'text,label\nx,0\n"y"z,1\n', r"a.csv, line 3 is not valid CSV"),
        ("a.csv", "text,text,label\nx,y,0\n", r"a.csv has 2 columns named 'text'"),
        ("a.parquet", "PAR1 but not really", r"a.parquet is not a valid Parquet file"),
        ("a.jsonl", "", r"a.jsonl has 0 rows"),
        ("a.json", "[]", r"a.json has 0 rows"),
        ("a.csv", "", r"a.csv is empty, but needs a header line"),
        ("a.csv", "text,label\n", r"a.csv has 0 rows"),
        ("a.xlsx", "", r"a.xlsx is .xlsx, but must be .jsonl, .json, .csv, .parquet"),
        ("a", "", r"a is missing, but must be .jsonl"),
    ],
)
def test_a_corrupt_or_empty_file_is_named_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(BayesLoraError, match=message) as caught:
        load_files(file, file, "text", "label")
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_another_encoding_are_named(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="none.jsonl does not exist"):
        load_files(tmp_path / "none.jsonl", tmp_path / "none.jsonl", "text", "label")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(BayesLoraError, match="folder.csv is a folder"):
        load_files(tmp_path / "folder.csv", tmp_path / "folder.csv", "text", "label")
    damaged = tmp_path / "damaged.csv"
    damaged.write_bytes("text,label\né,0\nüü,1\n".encode().replace("é".encode(), b"\xc3"))
    with pytest.raises(BayesLoraError, match="damaged.csv is not UTF-8 at byte 11"):
        load_files(damaged, damaged, "text", "label")


def test_text_without_a_string_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="line 2 has an empty value in column 'text', but a string is needed"):
        load(tmp_path, [{"text": "x", "label": 0}, {"text": None, "label": 1}])
    with pytest.raises(BayesLoraError, match="line 1 has 7 of type int in column 'text'"):
        load(tmp_path, [{"text": 7, "label": 0}, {"text": "x", "label": 1}])


def test_column_names_that_clash_are_refused(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", rows_of([0, 1]))
    for columns, label, message in (
        (["a", "b", "c"], "label", "must be one or two different ones"),
        (["text", "text"], "label", "must be one or two different ones"),
        ([], "label", "must be one or two different ones"),
        ("text", "text", "is a text column too"),
        (["text", "label"], "y", "a text column is 'label', but only the label may be"),
    ):
        with pytest.raises(BayesLoraError, match=message):
            load_files(file, file, columns, label)


def test_texts_to_predict_on_need_no_label(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"id": 1, "text": "x"}, {"id": 2, "text": ""}])
    with pytest.warns(UserWarning, match="a.jsonl has 1 of 2 rows with an empty text in column 'text'"):
        texts = load_texts(file, "text")
    assert texts.column_names == ["text"] and texts["text"][:] == ["x", ""]
    with pytest.raises(BayesLoraError, match="lacks column 'body', but has columns id, text"):
        load_texts(file, "body")


def test_known_tasks_come_from_a_data_folder(tmp_path: Path) -> None:
    single = rows_of([1, 0, 1], label_text=["positive", "negative", "positive"])
    jsonl(tmp_path / "sst2" / "train_sentences.jsonl", single)
    jsonl(tmp_path / "sst2" / "dev.jsonl", single[:2])
    jsonl(tmp_path / "sst2" / "test.jsonl", single[1:])
    task = load_task("sst2", tmp_path)
    assert task.labels == ["negative", "positive"] and task.metrics == ("accuracy",)
    assert {name: len(split) for name, split in task.splits.items()} == {"train": 3, "validation": 2, "test": 2}
    # Every similarity here is whole, and still the task is a regression.
    pairs = [{"text_a": "x", "text_b": "y", "label": value} for value in (0, 5, 3)]
    for split in ("train", "dev"):
        jsonl(tmp_path / "stsb" / f"{split}.jsonl", pairs)
        jsonl(tmp_path / "cola" / f"{split}.jsonl", single)
        jsonl(tmp_path / "mrpc" / f"{split}.jsonl", [{**pair, "label": i % 2} for i, pair in enumerate(pairs)])
    stsb = load_task("stsb", tmp_path)
    assert (stsb.kind, stsb.metric, stsb.text_columns) == ("regression", "pearson", ("text_a", "text_b"))
    assert load_task("cola", tmp_path).metric == "matthews_correlation"
    assert load_task("mrpc", tmp_path).metrics == ("accuracy", "f1")


def test_unknown_tasks_missing_folders_and_the_hub_offline_say_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="'sst3' is not a known task: use one of " + ", ".join(TASKS)):
        load_task("sst3", tmp_path)
    with pytest.raises(BayesLoraError, match="rte is not a folder"):
        load_task("rte", tmp_path)
    (tmp_path / "rte").mkdir()
    with pytest.raises(BayesLoraError, match="train.jsonl does not exist"):
        load_task("rte", tmp_path)
    with pytest.raises(
        BayesLoraError, match="rte is read from nyu-mll/glue, but could not be loaded .*give data_dir, a folder"
    ):
        load_task("rte")


def items_of(answers: list[Any], choices: int = 3, **more: Any) -> list[dict[str, Any]]:
    names = [f"choice {i}" for i in range(choices)]
    return [
        {"id": f"q{i}-1", "question": f"why {i}?", "choices": names, "answer": a, **more}
        for i, a in enumerate(answers)
    ]


def test_multiple_choice_tasks_come_from_a_data_folder(tmp_path: Path) -> None:
    jsonl(tmp_path / "arc_easy" / "train.jsonl", items_of([0, 2]) + items_of([4], choices=5))
    jsonl(tmp_path / "arc_easy" / "dev.jsonl", items_of([1]))
    task = load_task("arc_easy", tmp_path)
    assert (task.kind, task.metric, task.labels) == ("multiple_choice", "accuracy", list("ABCDE"))
    assert task.text_columns == ("question", "choices") and set(task.splits) == {"train", "validation"}
    assert task.train_split["label"][:] == [0, 2, 4]
    assert task.train_split["choices"][2] == [f"choice {i}" for i in range(5)]
    held = hold_out(task, 0.34)
    assert len(held.splits["selection"]) == 1
    # Nothing to train on, and examples for prompts by subject.
    jsonl(tmp_path / "mmlu" / "dev.jsonl", items_of([1, 0], subject="law"))
    jsonl(tmp_path / "mmlu" / "test.jsonl", items_of([2], subject="law"))
    mmlu = load_task("mmlu", tmp_path)
    assert set(mmlu.splits) == {"few_shot", "test"} and mmlu.splits["test"]["subject"][:] == ["law"]
    assert mmlu.labels == list("ABC")
    (tmp_path / "mmlu" / "test.jsonl").unlink()
    with pytest.raises(BayesLoraError, match="test.jsonl does not exist"):
        load_task("mmlu", tmp_path)
    with pytest.raises(
        BayesLoraError,
        match="openbookqa is read from allenai/openbookqa, but could not be loaded .*give data_dir, a folder",
    ):
        load_task("openbookqa")


def test_the_choices_of_winogrande_go_on_with_the_sentence(tmp_path: Path) -> None:
    def rows(*names: str) -> list[dict[str, Any]]:
        sentence = "Ann beat Eve because _ was faster ."
        return [{"id": name, "question": sentence, "choices": ["Ann", "Eve"], "answer": 0} for name in names]

    for size, count in (("xs", 1), ("s", 2), ("m", 3)):
        jsonl(tmp_path / "winogrande" / f"train_{size}.jsonl", rows(*[f"H{i // 2}-{i % 2}" for i in range(2 * count)]))
    jsonl(tmp_path / "winogrande" / "dev.jsonl", rows("D-1"))
    task = load_task("winogrande", tmp_path)
    assert len(task.train_split) == 4 and task.labels == ["A", "B"]
    assert task.train_split["question"][0] == "Ann beat Eve because"
    assert task.train_split["choices"][0] == ["Ann was faster .", "Eve was faster ."]
    # The two sentences of a pair are told apart by one word: they stay together.
    held = hold_out(task, 0.5)
    assert len(set(held.splits["train"]["group"]) | set(held.splits["selection"]["group"])) == 2
    assert not set(held.splits["train"]["group"]) & set(held.splits["selection"]["group"])
    assert len(load_task("winogrande", tmp_path, train_split="train_m").train_split) == 6
    with pytest.raises(BayesLoraError, match="'train_l', but winogrande has train_s, train_xs"):
        load_task("winogrande", tmp_path, train_split="train_l")
    with pytest.raises(BayesLoraError, match="rte has one training split, but 'train_s' was given"):
        load_task("rte", tmp_path, train_split="train_s")
    file = jsonl(tmp_path / "new.jsonl", [{"question": "He said _ left", "choices": ["Al", "Bo"]}])
    assert load_choices(file, task_name="winogrande")["choices"][0] == ["Al left", "Bo left"]
    assert load_choices(file)["question"][0] == "He said _ left"
    jsonl(tmp_path / "winogrande" / "dev.jsonl", items_of([1]))
    with pytest.raises(BayesLoraError, match="dev.jsonl, line 1 has 0 gaps '_' in its question, but needs 1"):
        load_task("winogrande", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["only"]}, "line 1 has 1 choice, but needs 2 to 5"),
        ({"choices": list("abcdef")}, "line 1 has 6 choices"),
        ({"choices": "ab"}, "line 1 has 'ab' in column 'choices', but needs a list of strings"),
        ({"choices": ["a", 2]}, r"line 1 has \['a', 2\] in column 'choices', but needs a list of strings"),
        ({"question": None}, "line 1 has an empty value in column 'question'"),
        ({"answer": 3}, r"line 1 has the answer 3, but needs the index of one of its 3 choices \(0 to 2\)"),
        ({"answer": "A"}, "line 1 has the answer 'A'"),
        ({"answer": True}, "line 1 has the answer True"),
    ],
)
def test_what_is_no_multiple_choice_item_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    for split in ("train", "dev"):
        jsonl(tmp_path / "openbookqa" / f"{split}.jsonl", [{**items_of([0])[0], **change}])
    with pytest.raises(BayesLoraError, match=message):
        load_task("openbookqa", tmp_path)


def task_with(labels: list[Any], kind: Any = "classification", group: list[str] | None = None) -> Task:
    columns = {"text": [f"text {i}" for i in range(len(labels))], "label": labels}
    if group:
        columns["group"] = group
    split = Dataset.from_dict(columns)
    splits = {"train": split, "validation": split}
    return Task("t", kind, ("text",), "label", ["a", "b"], "accuracy", splits, group_column="group" if group else None)


def test_holding_out_is_stratified_seeded_and_leaves_the_validation_split_alone() -> None:
    task = task_with([0] * 80 + [1] * 20)
    held = hold_out(task, 0.1, seed=3)
    train, selection = held.splits["train"], held.splits["selection"]
    assert np.bincount(selection["label"]).tolist() == [8, 2]
    assert sorted(train["text"][:] + selection["text"][:]) == sorted(task.train_split["text"][:])
    assert held.eval_split is task.eval_split and "selection" not in task.splits
    assert hold_out(task, 0.1, seed=3).splits["selection"]["text"][:] == selection["text"][:]
    assert hold_out(task, 0.1, seed=4).splits["selection"]["text"][:] != selection["text"][:]


def test_holding_out_keeps_rare_classes_in_training_and_groups_whole() -> None:
    rare = hold_out(task_with([0] * 30 + [1]), 0.5)
    assert set(rare.splits["train"]["label"]) == {0, 1}
    groups = [f"g{i // 5}" for i in range(100)]
    held = hold_out(task_with([0, 1] * 50, group=groups), 0.2)
    assert not set(held.splits["train"]["group"]) & set(held.splits["selection"]["group"])
    assert len(held.splits["selection"]) == 20
    assert len(hold_out(task_with([0.5] * 10, "regression"), 0.3).splits["selection"]) == 3


def test_holding_out_refuses_what_leaves_nothing() -> None:
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(BayesLoraError, match="must be between 0 and 1"):
            hold_out(task_with([0, 1]), fraction)
    with pytest.raises(BayesLoraError, match="but both parts need at least 1"):
        hold_out(task_with([0, 1]), 0.5)
    with pytest.raises(BayesLoraError, match="already has a selection split"):
        hold_out(hold_out(task_with([0, 1] * 10)))


def test_a_column_of_texts_does_not_name_the_labels(tmp_path: Path) -> None:
    rows = [{"mark_text": f"text {n}", "mark": n % 2} for n in range(8)]
    file = jsonl(tmp_path / "a.jsonl", rows)
    task = load_files(file, file, "mark_text", "mark")
    assert task.labels == ["0", "1"] and task.train_split["label"][:] == [0, 1] * 4
    found = inspect_file(file, ["mark_text"], "mark", eval_file=file)
    assert not found.problems and found.training.labels == {"0": 4, "1": 4}


def test_unnamed_columns_of_a_csv_file_that_are_not_read_are_told(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(",text,\n0,a,x\n1,b,y\n")
    with pytest.warns(UserWarning, match="has several columns named '', of which the first is read"):
        assert read_table(file, ("text",), None).columns == {"": ["0", "1"], "text": ["a", "b"]}
    file.write_text(",text,,\n0,a,, \n1,b,,\n")  # separators at the end of each line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_table(file, ("text",), None).columns == {"": ["0", "1"], "text": ["a", "b"]}
