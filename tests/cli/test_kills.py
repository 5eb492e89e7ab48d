"""A training that is killed at any moment, and started again, ends as one that was not: to the bit.

Killed is a process (SIGKILL) once it has used a random share of the processor time that the whole run takes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Setting, write_jsonl
from tests.processes import Commands
from tests.runs.text_runs import chat

OF_THE_SESSION = {"seconds", "peak_memory_bytes", "train_loss"}
OF_THE_SESSION |= {
    f"{part}_{name}" for part in ("train", "eval") for name in ("runtime", "samples_per_second", "steps_per_second")
}
"""Fields that are of the process that has ended the run: times, memory, and the Trainer's mean over its own steps."""
COMPARED = (".safetensors", ".json", ".yaml", ".jsonl")
UNTOLD = {"README.md", "report.html"}
"""Their text has the seconds of the training."""

BLORA = ("--method=blora", "--warmup-fraction=0.2", "--freeze-fraction=0.3")
METHODS = {
    "lora": ("--method=lora",),
    **{f"blora {mode}": (*BLORA, f"--mode={mode}") for mode in ("q", "ra", "q+ra")},
    "melora": ("--method=melora", "--samples=2"),
    "blob": ("--method=blob", "--samples=2"),
    "bayes_adalora": ("--method=bayes_adalora", "--importance=sensitivity"),
    "dylora": ("--method=dylora",),
    "full": ("--method=full",),
    "ivon": ("--method=lora", "--optim=ivon", "--samples=2"),
    "swag": ("--method=lora", "--swag=2", "--samples=2"),
    "accumulation": ("--method=melora", "--gradient-accumulation-steps=2"),
    "best": ("--method=lora", "--eval-strategy=steps", "--eval-steps=3", "--load-best-model-at-end=true"),
}
TASKS = ("classification", "generation")
STEPS = 12


@dataclass
class Whole:
    """A run that was not killed: its files by name, and the seconds of processor time that it took."""

    files: dict[str, Any]
    seconds: float


class Yard:
    """Trains, kills and resumes; whole runs are made once."""

    def __init__(self, folder: Path, commands: Commands, setting: Setting, talker: Path) -> None:
        self.folder, self.commands, self.setting, self.talker = folder, commands, setting, talker
        self.talk = write_jsonl(folder / "chat.jsonl", chat(20))
        self.asked = write_jsonl(folder / "asked.jsonl", chat(4))
        self._whole: dict[tuple[str, str], Whole] = {}

    def lines(self, method: str, task: str, out: Path, *more: str) -> list[list[str]]:
        """The command that trains, and one that uses the run."""
        shared = [*METHODS[method], f"--max-steps={STEPS}", "--save-steps=3", "--learning-rate=0.01"]
        shared += [*more, f"--output-dir={out}", "--per-device-train-batch-size=4", "--save-total-limit=2"]
        ranks = ["--init-r=4", "--target-r=2"] if method == "bayes_adalora" else ["--r=4"]
        shared += [] if method == "full" else ["--lora-dropout=0.1", *ranks]
        draws = [word for word in METHODS[method] if word.startswith("--samples")]
        answers = f"--output={out}-answers.jsonl"
        if task == "classification":
            use = ["predict", str(out), f"--input={self.setting.dev}", answers, *draws]
            return [["train", *self.setting.options, *shared], use]
        use = ["generate", str(out), f"--input={self.asked}", answers, "--max-new-tokens=2", *draws]
        return [["train", f"--model={self.talker}", f"--train-file={self.talk}", *shared], use]

    def whole(self, method: str, task: str) -> Whole:
        """Return the run that was not killed."""
        if (method, task) not in self._whole:
            out = self.folder / f"{method}-{task}".replace(" ", "-")
            training, use = self.lines(method, task, out)
            seconds = self.run([training], out)
            self.run([use], out)
            self._whole[method, task] = Whole(content(out), seconds)
        return self._whole[method, task]

    def run(self, lines: list[list[str]], out: Path) -> float:
        """Run to the end; return the processor time."""
        log = out.with_name(out.name + ".log")
        child = self.commands.start(self.folder, log, lines)
        seconds = 0.0
        while (used := _used(child)) is not None:
            seconds = used
            time.sleep(0.01)
        assert self.commands.wait() == 0, log.read_text()[-2000:]
        return seconds

    def killed(self, lines: list[list[str]], out: Path, seconds: float) -> bool:
        """Run until `seconds` of processor time are used, and kill; return False if it has ended before."""
        child = self.commands.start(self.folder, out.with_name(out.name + ".log"), lines)
        while (used := _used(child)) is not None and used < seconds:
            time.sleep(0.001)
        if used is not None:
            os.kill(child, signal.SIGKILL)
        return self.commands.wait() == -signal.SIGKILL

    def attempt(self, number: int, method: str, task: str, share: float) -> tuple[str, str]:
        """Kill a run at this share of its time and resume it; return what the kill left, and what differs."""
        whole = self.whole(method, task)
        out = self.folder / f"killed-{number}"
        training, use = self.lines(method, task, out)
        if not self.killed([training], out, share * whole.seconds):
            return "had ended", ""
        partial = out.with_name(out.name + ".partial")
        saved = sorted(path.parent.name for path in partial.glob("checkpoints/checkpoint-*/trainer_state.json"))
        left = "finished" if out.exists() else "nothing" if not partial.exists() else "a folder"
        left = "a checkpoint" if saved else left
        where = f"killed at {share:.4f} of {whole.seconds:.2f} s, which left {left} {saved}"
        again = [] if left == "finished" else [[*training, *([] if left == "nothing" else ["--resume"])]]
        try:
            self.run([*again, use], out)
        except AssertionError as failed:
            return left, f"{method}, {task}, {where}: {failed}"
        return left, _difference(whole.files, content(out), where, method, task)


def _used(child: int) -> float | None:
    """Return the seconds of processor time of a process; None if it has ended."""
    try:
        with open(f"/proc/{child}/schedstat", encoding="ascii") as file:
            seconds = int(file.read().split()[0]) / 1e9
        with open(f"/proc/{child}/stat", encoding="ascii") as file:
            return None if file.read().rpartition(")")[2].split()[0] == "Z" else seconds
    except (OSError, IndexError):
        return None


def content(out: Path) -> dict[str, Any]:
    """Return what the files of a run hold, without what is of the session and without the run's own name."""
    found: dict[str, Any] = {}
    for path in sorted([*out.rglob("*"), out.with_name(f"{out.name}-answers.jsonl")]):
        if path.is_dir():
            continue
        name = str(path.relative_to(out)) if out in path.parents else "answers"
        if path.suffix == ".safetensors" or path.suffix not in COMPARED or name == "adapter_config.json":
            found[name] = None if path.name in UNTOLD or path.suffix == ".png" else path.read_bytes()
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text(encoding="utf-8")))
        else:
            found[name] = path.read_text(encoding="utf-8")
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(each) for name, each in value.items() if name not in OF_THE_SESSION}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def _difference(whole: dict[str, Any], resumed: dict[str, Any], where: str, method: str, task: str) -> str:
    names = [name for name in sorted(whole.keys() | resumed.keys()) if whole.get(name, "") != resumed.get(name, "")]
    return f"{method}, {task}, {where}: {names} differ" if names else ""


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory, setting: Setting, tiny_causal_folder: Path) -> Iterator[Yard]:
    commands = Commands()
    yield Yard(tmp_path_factory.mktemp("yard"), commands, setting, tiny_causal_folder)
    commands.stop()


def tried(yard: Yard, kills: int, seed: int, say: Callable[[str], None]) -> tuple[Counter[str], list[str]]:
    """Kill that many runs, of every method and both tasks in turn; return what the kills left, and what was wrong."""
    generator = random.Random(seed)
    cases = [(method, task) for method in METHODS for task in TASKS]
    generator.shuffle(cases)
    counts: Counter[str] = Counter()
    wrong = []
    number = 0
    while sum(counts.values()) - counts["had ended"] < kills and number < 2 * kills:
        method, task = cases[number % len(cases)]
        left, fault = yard.attempt(number, method, task, generator.random())
        counts[left] += 1
        number += 1
        if fault:
            wrong.append(fault)
            say(fault)
        if number % 10 == 0:
            say(f"{number} runs: {dict(counts)}, {len(wrong)} wrong")
    return counts, wrong


@pytest.mark.slow
def test_runs_that_are_killed_end_as_they_would_have(yard: Yard, capfd: pytest.CaptureFixture[str]) -> None:
    """26 kills, one of each method and task; `BAYESLORA_KILLS` is another number, `BAYESLORA_SEED` other moments."""
    kills, seed = int(os.environ.get("BAYESLORA_KILLS", "26")), int(os.environ.get("BAYESLORA_SEED", "0"))

    def say(line: str) -> None:
        with capfd.disabled():
            print(line, flush=True)

    counts, wrong = tried(yard, kills, seed, say)
    say(f"kills: {dict(counts)}, {len(wrong)} wrong")
    assert not wrong
