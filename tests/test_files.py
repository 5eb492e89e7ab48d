"""Files and folders appear whole or not at all, and JSON has no NaN."""

from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bayeslora.errors import BayesLoraError
from bayeslora.files import dump_yaml, finite, new_folder, parse_yaml, save_json, write_atomically


def test_a_file_replaces_the_old_one_only_when_it_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), write_atomically(target) as partial:
        partial.write_text("half")
        1 / 0  # noqa: B018
    assert target.read_text() == "old"
    with write_atomically(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_a_missing_folder_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="cannot be written"), write_atomically(tmp_path / "no" / "x") as partial:
        partial.write_text("x")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(ZeroDivisionError), new_folder(target) as partial:
        (partial / "file").write_text("half")
        1 / 0  # noqa: B018
    assert not list(target.parent.iterdir())
    with new_folder(target) as partial:
        (partial / "file").write_text("whole")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["file"]
    with pytest.raises(BayesLoraError, match="exists"), new_folder(target):
        pass


def test_innermost_values_stand_on_one_line_and_texts_stay_as_they_are(tmp_path: Path) -> None:
    content = {
        "rows": [{"a": 1, "b": "x"}, {"c": [1, 2]}],
        "texts": ["{ [\n  1,\n  2 }", "]  [", '"\\'],
        "empty": [{}, []],
    }
    save_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert '    { "a": 1, "b": "x" },\n' in text and '"c": [ 1, 2 ]\n' in text


def test_numbers_that_are_not_finite_are_saved_as_null(tmp_path: Path) -> None:
    content = {"a": math.nan, "b": [1.0, -math.inf, (2, math.inf)], "c": {"é": "text"}}
    save_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == finite(content)
    assert finite(content) == {"a": None, "b": [1.0, None, [2, None]], "c": {"é": "text"}}


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    with write_atomically(tmp_path / "link") as path:
        path.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    with write_atomically(pipe) as path:
        path.write_text("content")
    reader.join(10)
    assert received == ["content"]
    assert pipe.is_fifo()


def test_a_full_device_is_one_error_and_stays(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="/dev/full cannot be written"), write_atomically("/dev/full") as path:
        path.write_text("content")
    assert Path("/dev/full").is_char_device()


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="is a folder, but must be a file"), write_atomically(tmp_path):
        pass


def test_others_can_read_weights_as_they_can_other_files(tmp_path: Path) -> None:
    """safetensors makes files with the mode 0600: a server that runs as another user could not read a run."""
    usual = tmp_path / "usual"
    usual.touch()
    with write_atomically(tmp_path / "one.safetensors") as path:
        save_file({"a": torch.zeros(2)}, path)
    with new_folder(tmp_path / "export") as folder:
        save_file({"a": torch.zeros(2)}, folder / "two.safetensors")
    for path in (tmp_path / "one.safetensors", tmp_path / "export" / "two.safetensors"):
        assert path.stat().st_mode == usual.stat().st_mode, path


def test_yaml_is_read_as_it_was_written() -> None:
    texts = ["1e3", "-2E+5", "1.e1", ".5e-2", "1e", "no", "null", "1", "x: y", "é"]
    content = {"labels": texts, "1e3": [1e3, 1e-5, -2.5, 7, None, True], "none": {}}
    assert parse_yaml(dump_yaml(content)) == content
    assert dump_yaml({"a": "é", "b": "plain"}) == "a: é\nb: plain\n"
