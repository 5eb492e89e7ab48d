"""A word-counting task, a run of each method on the tiny BERT, and ways to call the commands."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from bayeslora.cli.main import main
from tests.cli.mutating import Machine

GOOD = "good great fine warm funny clever".split()
BAD = "bad poor dull cold tired clumsy".split()


def review_rows(count: int, seed: int) -> list[dict[str, object]]:
    """Short reviews whose words decide the label."""
    generator = random.Random(seed)
    rows: list[dict[str, object]] = []
    for index in range(count):
        words = (BAD, GOOD)[index % 2]
        subject = generator.choice(["movie", "film", "plot"])
        text = f"the {subject} was {generator.choice(words)} {generator.choice(words)}"
        rows.append({"text": text, "label": index % 2})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Setting:
    """Data files, a base model, and the options that name them."""

    train: Path
    dev: Path
    model: Path

    @property
    def options(self) -> list[str]:
        files = ["--train-file", str(self.train), "--eval-file", str(self.dev), "--text-column", "text"]
        return ["--model", str(self.model), *files]


@pytest.fixture(autouse=True)
def _undrawn_figures(undrawn_figures: None) -> None:
    """Only the runs of whole modules draw the figures of their reports."""


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_bert_folder: Path) -> Setting:
    folder = tmp_path_factory.mktemp("data")
    train = write_jsonl(folder / "train.jsonl", review_rows(64, seed=0))
    return Setting(train, write_jsonl(folder / "dev.jsonl", review_rows(20, seed=1)), tiny_bert_folder)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, setting: Setting) -> dict[str, Path]:
    """One finished run a method; read them, do not write into them."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("lora", "blora", "full", "melora"):
        steps = ["--max-steps", "30" if method == "blora" else "6", "--learning-rate", "0.01"]
        assert main(["train", "--method", method, *setting.options, *steps, "--output-dir", str(folder / method)]) == 0
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls a command that must refuse its input with status 2 and a line on stderr for each mistake; returns them."""

    def call(*argv: object, mistakes: int = 1) -> str:
        capfd.readouterr()
        status = main([str(argument) for argument in argv])
        captured = capfd.readouterr()
        assert status == 2, captured.err
        lines = captured.err.splitlines()
        assert len(lines) == mistakes, captured.err
        assert all(line.startswith("bayeslora: ") for line in lines)
        assert captured.out == ""
        return "\n".join(lines)

    return call


@pytest.fixture
def machine(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path / "machine", capfd, monkeypatch)
