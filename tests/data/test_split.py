"""One file is enough: a share of its rows is held out, by class and by group, the same for a seed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bayeslora.data import HoldOut, load_files
from bayeslora.data.split import held_out_rows
from bayeslora.errors import BayesLoraError


def test_single_rows_are_stratified_exactly() -> None:
    classes = ["a"] * 50 + ["b"] * 30 + ["c"] * 12 + ["d"] * 2 + ["e"]
    held = held_out_rows(classes, range(len(classes)), 0.2)
    assert Counter(classes[row] for row in held) == {"a": 10, "b": 6, "c": 2, "d": 1}  # e has nothing to spare
    assert held == sorted(held) and held == held_out_rows(classes, range(len(classes)), 0.2, seed=0)
    assert held != held_out_rows(classes, range(len(classes)), 0.2, seed=1)


def test_the_rows_are_those_of_any_process_and_version() -> None:
    """Recorded once: a changed draw would split the files of finished runs in another way."""
    recorded = [3, 5, 7, 15, 20, 25]
    code = "from bayeslora.data.split import held_out_rows as f; print(f([i % 3 for i in range(30)], range(30), .2))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert json.loads(printed) == recorded


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_whole_and_classes_near_their_share(seed: int) -> None:
    generator = random.Random(seed)
    groups = [group for group in range(60) for _ in range(generator.randrange(1, 8))]
    classes = [generator.choice("aabc") for _ in groups]
    held = set(held_out_rows(classes, groups, 0.25, seed))
    for group in set(groups):
        assert len({row in held for row, other in enumerate(groups) if other == group}) == 1
    for name, count in Counter(classes).items():
        taken = sum(classes[row] == name for row in held)
        assert abs(taken - 0.25 * count) <= max(4, 0.1 * count) and taken < count


def test_large_groups_are_held_out_as_often_as_small_ones() -> None:
    groups = [group for group in range(40) for _ in range(1 + group % 8)]
    shares = []
    for seed in range(100):
        held = {groups[row] for row in held_out_rows([0] * len(groups), groups, 0.25, seed)}
        shares.append([sum(group % 8 == size for group in held) / 5 for size in range(8)])
    means = [sum(column) / 100 for column in zip(*shares, strict=True)]
    assert all(0.15 < mean < 0.35 for mean in means), means


def test_every_class_stays_in_training() -> None:
    # The only group with a class is not held out, whatever the share.
    classes, groups = ["a"] * 10 + ["b"] * 3, [*range(10), "all", "all", "all"]
    for seed in range(20):
        held = held_out_rows(classes, groups, 0.5, seed)
        assert not {10, 11, 12} & set(held) and len(held) == 5
    with pytest.raises(
        BayesLoraError, match="x.csv has 4 rows in 1 groups or different texts, but none can be held out"
    ):
        held_out_rows(list("aabb"), ["one"] * 4, 0.5, what="x.csv")
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(BayesLoraError, match="but must be between 0 and 1"):
            held_out_rows(list("aabb"), range(4), fraction)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_task_from_one_file_has_each_labelled_row_once(tmp_path: Path) -> None:
    labels = [None if i % 10 == 0 else "ab"[i % 2] for i in range(100)]
    file = write(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    with pytest.warns(UserWarning, match="10 of 100 rows without a label"):
        task = load_files(file, None, "text", "label", held_out=HoldOut(0.2, seed=3))
    assert list(task.splits) == ["train", "validation"]
    assert len(task.eval_split) == 18 and len(task.train_split) == 72
    assert sorted([*task.train_split["text"], *task.eval_split["text"]]) == sorted(
        f"t{i}" for i in range(100) if labels[i] is not None
    )
    # Numbers of rows of the file, not of those with a label.
    assert [f"t{row}" for row in task.evaluation_rows] == task.eval_split["text"][:]
    assert Counter(task.eval_split["label"]) == {0: 8, 1: 10}
    with pytest.warns(UserWarning, match="without a label"):
        again = load_files(file, None, "text", "label", held_out=task.evaluation_rows)
    assert again.eval_split["text"][:] == task.eval_split["text"][:]
    assert again.train_split["text"][:] == task.train_split["text"][:]


def test_equal_texts_and_groups_are_on_one_side(tmp_path: Path) -> None:
    rows = [{"text": f"t{i // 3}", "label": i // 3 % 2, "user": "" if i % 7 == 0 else f"u{i % 7}"} for i in range(90)]
    file = write(tmp_path / "a.jsonl", rows)
    task = load_files(file, None, "text", "label", held_out=HoldOut(0.3))
    assert not set(task.eval_split["text"]) & set(task.train_split["text"])
    # 15 of 45 is the nearest to 13.5 that whole triples of rows can make.
    assert Counter(task.eval_split["label"]) == {0: 15, 1: 15}
    grouped = load_files(file, None, "text", "label", held_out=HoldOut(0.3, "user"))
    users = [{rows[row]["user"] for row in range(90) if (row in grouped.evaluation_rows) == side} for side in (0, 1)]
    assert users[0] & users[1] <= {""} and grouped.splits["train"].column_names == ["text", "label"]
    for row in rows:
        row["user"] = 0 if row["user"] == "u1" else None if row["user"] == "" else row["user"]
    write(file, rows)  # a number is a name too, and 0 is one
    zero = load_files(file, None, "text", "label", held_out=HoldOut(0.3, "user"))
    assert len({row in zero.evaluation_rows for row in range(90) if rows[row]["user"] == 0}) == 1
    empty = write(tmp_path / "b.jsonl", [{"text": " " if i % 2 else f"t{i}", "label": i // 2 % 2} for i in range(80)])
    with pytest.warns(UserWarning, match="40 of 80 rows with an empty text"):
        task = load_files(empty, None, "text", "label", held_out=HoldOut(0.3))
    assert 3 < sum(not text.strip() for text in task.eval_split["text"]) < 21 and len(task.eval_split) == 24
    with pytest.raises(BayesLoraError, match="lacks column 'film'"):
        load_files(file, None, "text", "label", held_out=HoldOut(0.3, "film"))


def test_numbers_are_held_out_without_classes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": i + 0.5} for i in range(10)])
    task = load_files(file, None, "text", "label", held_out=HoldOut(0.3))
    assert task.kind == "regression" and len(task.eval_split) == 3


def test_one_of_two_ways_to_evaluate_is_needed(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(10)])
    for options in ({"held_out": HoldOut(0.3)}, {}):
        source = file if options else None
        with pytest.raises(BayesLoraError, match="are both given or both missing"):
            load_files(file, source, "text", "label", **options)
    with pytest.raises(BayesLoraError, match="0 of the 10 labelled rows"):
        load_files(file, None, "text", "label", held_out=[99])
