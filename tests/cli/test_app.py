"""`bayeslora app`: what is told without gradio. The page's functions are tested in runs/test_play.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bayeslora.cli import app
from bayeslora.cli.main import main


def test_without_gradio_it_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["app", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err, "a wrong folder comes first"
    info = {"method": "lora", "model": "m", "task": "t", "kind": "classification", "metric": "accuracy"}
    more = {
        "text_columns": ["text"],
        "label_column": "label",
        "labels": ["a", "b"],
        "max_length": 8,
        "dtype": "float32",
        "base_fingerprint": "",
        "base_name": "m",
    }
    (tmp_path / "run.json").write_text(json.dumps(info | more))
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    assert main(["app", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "gradio is not installed, but the page needs it: pip install bayeslora[app]" in error
    assert error.count("\n") == 1
