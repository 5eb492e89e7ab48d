"""`export --format onnx` on finished runs: a folder that its card alone says how to use."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bayeslora
from bayeslora.cli.main import main
from tests.cli.conftest import review_rows

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TEXTS = [str(row["text"]) for row in review_rows(12, seed=5)]
RUNNER = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("bayeslora", "torch", "transformers", "peft"):
            raise AssertionError(f"the card imports {name}")

sys.meta_path.insert(0, Refuse())
names = {}
exec(sys.argv[1], names)
print(json.dumps(names["logits"](json.loads(sys.argv[2])).tolist()))
"""


def _answers_of_card(folder: Path) -> list[int]:
    """Do what the card's program does, in an environment with neither this library nor torch."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, code, json.dumps(TEXTS)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *printed, logits = done.stdout.strip().splitlines()
    assert len(printed) == 2  # its own examples
    return [max(range(len(row)), key=row.__getitem__) for row in json.loads(logits)]


@pytest.mark.parametrize("method", ["lora", "blora", "melora"])
def test_the_card_alone_gives_the_answers_of_the_run(
    method: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "onnx"
    capsys.readouterr()
    assert main(["export", str(runs[method]), "--format", "onnx", "--output-dir", str(target), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    own = bayeslora.load(runs[method]).predict(TEXTS)
    assert _answers_of_card(target) == [max(range(2), key=row.probabilities.__getitem__) for row in own]
    assert {path.name for path in target.iterdir()} == {
        "README.md",
        "config.json",
        "export.json",
        "model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for path in target.iterdir():  # nothing says where they were made
        content = path.read_bytes()
        assert str(tmp_path.parent).encode() not in content and str(Path.home()).encode() not in content
        assert path.name != "run.json" and b"/tmp/" not in content
    assert measured["file_bytes"] == (target / "model.onnx").stat().st_size and measured["rows"] == 32
    card = (target / "README.md").read_text(encoding="utf-8")
    assert f"{measured['changed']:.2%} of the answers change" in card and f"`{method}`" in card
    if method != "blora":
        assert measured["changed"] == 0 and measured["max_output_error"] < 1e-4


def test_without_training_rows_the_inputs_of_unadapted_layers_stay_float32(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in runs["blora"].iterdir():
        if path.is_file():
            (moved / path.name).write_bytes(path.read_bytes())
    info = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps({**info, "files": {"train_file": "gone.jsonl"}}))
    capsys.readouterr()
    assert main(["export", str(moved), "--format", "onnx", "--output-dir", str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    assert "dummy inputs" in printed.err and json.loads(printed.out)["unadapted"] == "int8 weights"
