"""The command answers at once where it needs no model: in 0.4 CPU seconds, and without torch."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bayeslora.cli.commands import COMMANDS

HEAVY = ("torch", "transformers", "peft", "numpy", "datasets", "bitsandbytes", "pandas", "yaml")
SECONDS = 0.4
DATA = ["--model", "m", "--train-file", "a.csv", "--eval-file", "b.csv", "--text-column", "t", "--output-dir", "o"]

# Runs the command and reports what it has imported.
DRIVER = """
import sys
from bayeslora.cli.main import main
status = main(sys.argv[1:])
print(*sys.modules, file=sys.stderr)
sys.exit(status)
"""


def quick(tmp_path: Path, *words: str) -> tuple[int, str, str]:
    """Run a command that must import nothing heavy; returns its status and what it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", DRIVER, *words], cwd=tmp_path, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    *said, modules = done.stderr.splitlines()
    assert not set(HEAVY) & set(modules.split()), done.stderr[-2000:]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= SECONDS
    return done.returncode, done.stdout, "\n".join(said)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_and_version_are_instant(tmp_path: Path, words: list[str]) -> None:
    status, printed, said = quick(tmp_path, *words)
    assert status == 0 and "bayeslora" in printed and said == ""
    if len(words) == 2:
        assert all(item.spelling in printed for item in COMMANDS[words[0]].options)


def test_inspect_is_instant(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text;label\n" + "".join(f"text number {i};{i % 3}\n" for i in range(2000)))
    status, printed, said = quick(tmp_path, "inspect", "a.csv", "--eval-fraction", "0.2")
    assert status == 0 and "a.csv: 2,000 rows" in printed and "evaluation: 399 rows" in printed and said == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["no command is given"]),
        (["trian"], ["did you mean train"]),
        (["evaluate", "out", "--jsno"], ["did you mean --json"]),
        (["export", "out", "--format", "tflite"], ["--format is 'tflite'", "--output-dir is missing"]),
        (["train", *DATA, "--method", "bloora"], ["did you mean blora"]),
        (["train", *DATA, "--task", "sst2", "--max-length", "0"], ["--max-length is 0", *["with --task sst2"] * 3]),
        (["train", "--method", "lora"], ["--model", "--output-dir", "--train-file", "--eval-file", "--text-column"]),
        (["train", *DATA, "--r", "x", "--mode", "foo"], ["--r is 'x'", "--mode is 'foo'"]),
        (["train", *DATA, "--sampels", "3"], ["did you mean --samples"]),
        (["train", *DATA, "--method", "lora", "--prior-std", "1"], ["belongs to --method melora, blob"]),
        (["train", *DATA, "--learning-rate", "fast", "--optim", "ivon"], ["--learning-rate is 'fast'"]),
        (["plan", "--model", "m", "--r", "0"], ["--r is 0"]),
        (["predict", "nix", "--input", "c.csv", "--output", "b.csv"], ["c.csv does not exist", "nix is not a folder"]),
        (["export", "nix", "--format", "onnx", "--output-dir", "o"], ["nix is not a folder"]),
        (["plan", "--tokens", "0"], ["--model is missing", "--tokens is 0"]),
    ],
)
def test_mistakes_are_told_without_torch_where_they_can_be(
    tmp_path: Path, words: list[str], expected: list[str]
) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("t,label\nsome text,1\n")
    status, printed, said = quick(tmp_path, *words)
    lines = said.splitlines()
    assert status == 2 and printed == "" and len(lines) == len(expected)
    for word in expected:
        assert any(word in line for line in lines)


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path: Path) -> None:
    # A stand-in for PEFT tells when its import has begun, and swallows exceptions as an import can.
    (tmp_path / "peft.py").write_text(
        "import pathlib, time\npathlib.Path('begun').touch()\nwhile True:\n"
        "    try:\n        time.sleep(0.1)\n    except BaseException:\n        pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "bayeslora", "train", *DATA, "--r", "4"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # A shell ignores SIGINT in what it starts in the background, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        for _ in range(1200):
            if (tmp_path / "begun").exists():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, said, printed) == (130, "bayeslora: interrupted; nothing was started\n", "")
