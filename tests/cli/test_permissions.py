"""Files and folders that may not be read or written: a finished run needs to be readable only, and the rest is told.

Root may read and write everything, so that the commands run in a process without its capabilities.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bayeslora.cli.main import main
from tests.cli.conftest import write_jsonl

_TRIES = """
import json, sys
from bayeslora.cli.main import main
for words in json.loads(sys.argv[1]):
    print("status", main(words), *words, file=sys.stderr, flush=True)
"""
ROWS = [{"text": text, "label": label} for text, label in (("good film", "yes"), ("bad film", "no")) * 8]


@pytest.fixture
def folder(tmp_path: Path, tiny_bert_folder: Path) -> Iterator[Path]:
    """A folder with a run in `out`, which cannot be written to."""
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    write_jsonl(tmp_path / "held.jsonl", ROWS[::-1])
    options = ["--method", "melora", "--model", str(tiny_bert_folder), "--train-file", str(rows), "--max-steps", "1"]
    options += ["--eval-file", str(tmp_path / "held.jsonl"), "--text-column", "text", "--label-column", "label"]
    assert main(["train", *options, "--output-dir", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "sealed.jsonl").write_text("before")
    for path in (tmp_path / "out").iterdir():
        path.chmod(0o444)
    (tmp_path / "out").chmod(0o555)
    yield tmp_path
    (tmp_path / "out").chmod(0o755)


def tried(folder: Path, *commands: list[str]) -> list[tuple[int, list[str]]]:
    """Return the status and the lines that a process without capabilities gives for each command."""
    without = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if without and not shutil.which("setpriv"):
        pytest.skip("root has no setpriv to give up its capabilities with")
    words = [*without, sys.executable, "-W", "ignore", "-c", _TRIES, json.dumps(commands)]
    ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    found: list[tuple[int, list[str]]] = []
    said: list[str] = []
    for line in ended.stderr.splitlines():
        if line.startswith("status "):
            found.append((int(line.split()[1]), said))
            said = []
        elif line.startswith("bayeslora: "):
            said.append(line)
    return found


def test_a_run_that_cannot_be_written_to_is_used_and_what_would_write_says_so_first(folder: Path) -> None:
    rows = ["--input", "rows.jsonl"]
    worked = tried(
        folder,
        ["predict", "out", *rows, "--output", "answers.jsonl"],
        ["evaluate", "out", "--output-dir", "scores"],
        ["export", "out", "--format", "merged", "--output-dir", "merged"],
    )
    assert [status for status, _ in worked] == [0, 0, 0], worked
    before = sorted(path.name for path in (folder / "out").iterdir())
    refused = tried(
        folder,
        ["predict", "out", *rows, "--output", "out/answers.jsonl"],
        ["predict", "out", *rows, "--output", "out/sealed.jsonl"],
        ["select", "out", *rows, "--budget", "1", "--score", "entropy", "--output", "out/a.jsonl"],
        ["evaluate", "out", "--output-dir", "out/scores"],
        ["evaluate", "out", "--output-dir", "out/new/scores"],
        ["calibrate", "out", "--eval-file", "held.jsonl"],
        ["export", "out", "--format", "merged", "--output-dir", "out/merged"],
        ["compare", "out", "scores", "--output-dir", "out/table"],
    )
    assert len(refused) == 8
    for status, said in refused:
        assert status == 2 and len(said) == 1 and "out is not writable: choose a writable folder" in said[0], said
    assert sorted(path.name for path in (folder / "out").iterdir()) == before
    assert (folder / "out" / "sealed.jsonl").read_text() == "before"


@pytest.mark.parametrize("name", ["run.json", "adapter_config.json", "adapter_model.safetensors", "digests.json"])
def test_a_file_that_cannot_be_read_is_not_called_damaged(folder: Path, name: str) -> None:
    (folder / "out" / name).chmod(0)
    ((status, said),) = tried(folder, ["evaluate", "out"])
    assert status == 2 and len(said) == 1
    assert f"{name} cannot be read (Permission denied): `chmod a+r`" in said[0], said


def test_a_folder_that_cannot_be_entered_is_not_said_to_be_written(folder: Path) -> None:
    (folder / "out").chmod(0)
    ((status, said),) = tried(folder, ["evaluate", "out"])
    assert status == 2 and len(said) == 1 and "cannot be used (Permission denied)" in said[0], said
