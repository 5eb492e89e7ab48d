"""Every option of every command with other values: it works and the option is read, or one line says why not.

The options come from the commands' own tables, so that a new one is tried without a change here; of `train` and
`plan` also every field of each method's config, of IVON and of `TrainingArguments`.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bayeslora.cli.arguments import ivon_field_hints, method_field_hints, training_field_hints
from bayeslora.cli.coercion import _choices, _members
from bayeslora.cli.commands import COMMANDS
from bayeslora.cli.main import main
from bayeslora.errors import BayesLoraError
from bayeslora.errors import option as _spelled
from tests.cli.conftest import Setting, review_rows, write_jsonl
from tests.cli.mutating import Case, Machine, shown, spread, tried
from tests.runs.text_runs import chat

TEXTS = (
    *("", " ", "x", "-1", "-0.5", "0", "1", "3", "0.5", "1.0", "1e3", "nan", "-inf", "1e308", "1e-320", "9" * 20),
    *("true", "no", "null", "~", "[]", "{}", "[1,", "{a: 1}", "a,b", "a,,b", "text,text", "text,label", "=,="),
    *(
        "é🙂",
        "\udcff",
        "\u202e1",
        "x" * 5000,
        "a\nb",
        ".",
        "..",
        "/",
        "/dev/null",
        "--",
        "%s{0}",
        "*",
        "(([a-z]+)+)+!",
    ),
)
VALUES: tuple[Any, ...] = (None, True, -1, 0, 3, 0.5, 1e308, [], [[[]]], ["x", 1], {}, {"a": [1]}, "\0", "x\ud800")
"""Of a YAML file."""
METHODS = ("lora", "blora", "melora", "blob", "bayes_adalora", "dylora", "full")
WORK = {
    *("samples", "max_steps", "num_train_epochs", "max_new_tokens", "draws", "gradient_accumulation_steps", "seeds"),
    "few_shot",
}
"""Options that say how much to do: who asks for 10^20 samples gets them."""
NOT_TRIED = {("torch_compile", "true"), ("torch_compile", "1")}
"""A minute of a compiler."""
PROCESSES = "dataloader_num_workers"


@pytest.fixture(scope="session")
def places(
    tmp_path_factory: pytest.TempPathFactory, setting: Setting, runs: dict[str, Path], tiny_causal_folder: Path
) -> dict[str, Path]:
    """Data files, models and runs by the words that stand for them in `BASES`."""
    folder = tmp_path_factory.mktemp("places")
    rows = [{**row, "group": index % 8} for index, row in enumerate(review_rows(24, seed=2))]
    talk = write_jsonl(folder / "chat.jsonl", chat(12))
    found = {"MODEL": setting.model, "TRAIN": setting.train, "DEV": write_jsonl(folder / "dev.jsonl", rows)}
    found |= {"TALK": talk, "LORA": runs["lora"], "MELORA": runs["melora"], "CALIBRATED": folder / "calibrated"}
    found |= {"TEXT": folder / "text", "EXPORT": folder / "export", "DONE": folder / "done"}
    options = ["--method", "melora", "--model", str(tiny_causal_folder), "--train-file", str(talk), "--r", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayeslora.report.page.png_bytes", lambda figure: b"")
        assert main(["train", *options, "--max-steps", "1", "--output-dir", str(found["TEXT"])]) == 0
    shutil.copytree(runs["melora"], found["CALIBRATED"])
    assert main(["calibrate", str(found["CALIBRATED"]), "--eval-file", str(found["DEV"]), "--samples", "2"]) == 0
    export = ["export", str(runs["melora"]), "--format", "merged", "--output-dir", str(found["EXPORT"])]
    assert main(export) == 0
    (found["DONE"] / "lora").mkdir(parents=True)
    return found


NEEDED = {
    "blora": ["--warmup-fraction=0", "--freeze-fraction=0", "--mode=ra"],
    "bayes_adalora": ["--importance=sensitivity"],
}
"""Options without which a method does not train for one step."""
FILES = ["--train-file=TRAIN", "--eval-file=DEV", "--text-column=text", "--max-steps=1", "--output-dir=out"]
BASES: dict[str, list[list[str]]] = {
    "inspect": [["DEV"], ["DEV", "--eval-fraction=0.25", "--json"], ["TALK"]],
    "train": [["--model=MODEL", f"--method={method}", *FILES, *NEEDED.get(method, ())] for method in METHODS],
    "evaluate": [["LORA", "--eval-file=DEV", "--json"], ["MELORA", "--samples=2"], ["TEXT", "--eval-file=TALK"]],
    "predict": [
        ["LORA", "--input=DEV", "--output=out.csv"],
        ["CALIBRATED", "--input=DEV", "--output=out.jsonl", "--coverage=0.9"],
    ],
    "generate": [
        ["TEXT", "--input=TALK", "--output=out.jsonl", "--max-new-tokens=2"],
        ["TEXT", "--prompt=who", "--samples=2", "--max-new-tokens=2"],
    ],
    "app": [["LORA"]],
    "calibrate": [["copy", "--eval-file=DEV"], ["copy", "--eval-file=DEV", "--samples=2", "--json"]],
    "select": [["MELORA", "--input=DEV", "--output=out.jsonl", "--budget=2"]],
    "compare": [["LORA", "MELORA", "--output-dir=out"]],
    "export": [
        ["MELORA", "--format=lora", "--output-dir=out"],
        ["MELORA", "--format=lora", "--draws=2", "--output-dir=out"],
        ["MELORA", "--format=merged", "--output-dir=out", "--json"],
        ["LORA", "--format=lora", "--mean-rank=4", "--output-dir=out"],
    ],
    "verify": [["EXPORT", "--against=MELORA"], ["EXPORT", "--against=MELORA", "--rows=DEV", "--json"]],
    "plan": [["--model=MODEL", f"--method={method}"] for method in METHODS],
    "demo": [["--output-dir=DONE"]],
}
"""Command lines that work (of `demo` one that is refused, as it would take minutes)."""
ALLOWED = {"verify": (0, 1)}
"""A comparison whose answer is no has status 1."""


def test_every_command_has_a_line_that_works() -> None:
    assert BASES.keys() == COMMANDS.keys()


@functools.cache
def _options(command: str, method: str) -> dict[str, Any]:
    """Names and type hints of the options; those without a value have the hint bool."""
    found = {item.name: item.hint for item in COMMANDS[command].options}
    if COMMANDS[command].is_open:
        found |= method_field_hints(method)
    if command == "train":
        found |= {**training_field_hints(), **ivon_field_hints(), "rank": int}
    return found


def _texts(command: str, name: str, hint: Any) -> Iterator[str | None]:
    """Values of an option on a command line: texts, every choice, files; None for a name alone."""
    yield None
    for text in (*TEXTS, *map(str, _choices(_members(hint))), "text", "label", "0,1", "TRAIN", "DEV", "LORA", "MODEL"):
        is_large = text in ("9" * 20, "1e308", "1e3") or (name == PROCESSES and text in ("1", "3", "1.0"))
        if not (is_large and name in {*WORK, PROCESSES}) and (name, text) not in NOT_TRIED:
            yield text


def _groups(seed: int) -> dict[Any, list[list[tuple[str, list[str], tuple[str, ...]]]]]:
    """Command lines in which one or two options are changed, by command and option, with the changed ones."""
    generator = random.Random(seed)
    groups: dict[Any, list[Any]] = {}
    for command, bases in BASES.items():
        for number, base in enumerate(bases):
            method = METHODS[number] if COMMANDS[command].is_open else ""
            options = _options(command, method)
            for name, hint in options.items():
                lines = groups.setdefault((command, name), [])
                for text in _texts(command, name, hint):
                    changed = _with(base, name, text)
                    lines.append((command, changed, (_spelled(name),)))
                    other = generator.choice(sorted(options))
                    second = generator.choice([*_texts(command, other, options[other])])
                    if other != name and generator.random() < 0.3:
                        pair = (_spelled(name), _spelled(other))
                        lines.append((command, _with(changed, other, second), pair))
                    if command == "train" and generator.random() < 0.3:
                        value = generator.choice(VALUES)
                        if name not in WORK | {PROCESSES} and not (name == "torch_compile" and value):
                            lines.append(
                                (command, [*_without(base, name), f"--config={name}", repr(value)], (_spelled(name),))
                            )
    return groups


def _without(base: list[str], name: str) -> list[str]:
    return [word for word in base if word.partition("=")[0] != _spelled(name)]


def _with(base: list[str], name: str, text: str | None) -> list[str]:
    return [*_without(base, name), _spelled(name) if text is None else f"{_spelled(name)}={text}"]


def _cases(machine: Machine, places: dict[str, Path], count: int, seed: int) -> Iterator[Case]:
    for command, line, names in spread(_groups(seed), count, seed):
        yield (
            f"{command} {shown(line)}",
            functools.partial(_attempt, machine, places, command, line, names),
        )


def _attempt(
    machine: Machine, places: dict[str, Path], command: str, line: list[str], changed: tuple[str, ...] = ()
) -> tuple[str, str]:
    for path in machine.folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if "copy" in line:
        shutil.copytree(places["MELORA"], machine.folder / "copy")
    if command == "train" and not line[-1].startswith("--"):
        name = line[-2].partition("=")[2]
        value = next(value for value in VALUES if repr(value) == line[-1])
        (machine.folder / "options.yaml").write_text(yaml.safe_dump({name: value}), encoding="utf-8")
        line = [*line[:-2], "--config=options.yaml"]
    words = [command, *(_placed(word, places) for word in line)]
    ended, fault = machine.fault(words, changed, ALLOWED.get(command, (0,)))
    listed = "--list-options" in changed
    if (
        not fault
        and command == "train"
        and not listed
        and ended.status == 0
        and not list(machine.folder.rglob("metrics.json"))
    ):
        fault = "wrote no metrics.json"
    return {0: "worked", 1: "worked", 2: "refused"}.get(ended.status or 0, ""), fault


def _placed(word: str, places: dict[str, Path]) -> str:
    name, equals, value = word.rpartition("=")
    return f"{name}{equals}{places.get(value, value)}"


@pytest.fixture
def machine(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Machine:
    """With a `demo` that ends before it trains, and a seed of everything else."""

    def refuse(plan: object) -> int:
        raise BayesLoraError("a demo takes minutes, but a test must not: leave it out")

    monkeypatch.setattr("bayeslora.cli.demo.build_plan", refuse)
    return Machine(tmp_path / "machine", capfd, monkeypatch)


@pytest.mark.parametrize("command", sorted(set(BASES) - {"demo", "app"}))
def test_the_lines_work(machine: Machine, places: dict[str, Path], command: str) -> None:
    for line in BASES[command] if command != "train" else BASES[command][:1]:
        assert _attempt(machine, places, command, line) == ("worked", "")


def test_a_changed_option_works_or_is_refused(machine: Machine, places: dict[str, Path]) -> None:
    counts, wrong = tried(list(_cases(machine, places, 60, seed=0)))
    assert not wrong, "\n".join(wrong)
    assert counts["refused"] > 20, counts


PARTS = 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_many_changed_options(
    machine: Machine, places: dict[str, Path], part: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """400 of them; `BAYESLORA_MUTATIONS` is another number of all, `BAYESLORA_SEED` another choice."""
    count = int(os.environ.get("BAYESLORA_MUTATIONS", "400"))
    cases = list(_cases(machine, places, count, seed=int(os.environ.get("BAYESLORA_SEED", "1"))))
    counts, wrong = tried(cases[part::PARTS])
    with capfd.disabled():
        print(f"options, part {part + 1} of {PARTS}: {dict(counts)}")
        print("\n".join(wrong))
    assert not wrong
