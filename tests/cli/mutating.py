"""Commands on changed input, watched: how they end, what they say, write and read.

A command must end with status 0, or with 2, one line and nothing written. Everything else is a fault: a traceback,
another status, half a result, an option that nobody has read, or no end within `LONGEST` seconds.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bayeslora.cli import main as command
from bayeslora.cli.arguments import check_paths, parse

LONGEST = 20
"""Seconds."""
_TOLD = re.compile(r"note: |\w+: (step|scoring) \d|Writing model shards")
"""Lines on stderr that are no errors: notes, and the progress of a training."""


class Hang(BaseException):
    """The command did not end in time. No `except Exception` of a library may take it for something else."""


class Watched(dict[str, Any]):
    """Options that remember which of them were read."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.read.add(str(name))
        return super().__contains__(name)


@dataclass
class Ended:
    """How a command has ended; `fault` is an exception or that it hung, `unread` the options that nobody has read."""

    status: int | None
    printed: str
    errors: list[str]
    notes: list[str]
    fault: str = ""
    unread: set[str] = field(default_factory=set)


class Machine:
    """Runs commands in a folder of their own, which is the working directory."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.folder, self._capfd = folder, capfd
        self._given: Watched | None = None
        folder.mkdir(parents=True, exist_ok=True)
        patch.chdir(folder)
        patch.setattr(command, "parse", self._parse)
        # Whether a path exists is no use of it.
        patch.setattr(command, "check_paths", lambda name, given, found: check_paths(name, dict(given), found))

    def _parse(self, name: str, words: list[str]) -> Any:
        given, problems = parse(name, words)
        if name not in ("train", "plan"):  # which make a plan of all options
            self._given = given = Watched(given)
        return given, problems

    def run(self, words: Sequence[str]) -> Ended:
        """Run one command."""
        self._given, status, fault = None, None, ""
        self._capfd.readouterr()
        before = signal.signal(signal.SIGALRM, _hung)
        signal.setitimer(signal.ITIMER_REAL, LONGEST)
        with warnings.catch_warnings(record=True) as caught:  # which are notes on stderr elsewhere
            try:
                status = command.main(list(words))
            except (Exception, SystemExit, Hang) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                fault = f"{type(error).__name__}: {str(error)[:200]} ({Path(where.filename).name}:{where.lineno})"
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
        printed = self._capfd.readouterr()
        said = [line for line in printed.err.split("\n") if line.strip()]
        errors = [line for line in said if not _TOLD.match(line)]
        notes = [str(warning.message) for warning in caught] + [line for line in said if line.startswith("note: ")]
        unread = set(self._given) - self._given.read if self._given is not None else set()
        return Ended(status, printed.out, errors, notes, fault, unread)

    def files(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of every file in the folder, and of the folders."""
        found = {}
        for root, _, names in os.walk(self.folder):
            for name in (".", *names):
                path = os.path.join(root, name)
                state = os.lstat(path)
                found[os.path.relpath(path, self.folder)] = (state.st_size, state.st_mtime_ns)
        return found

    def fault(
        self, words: Sequence[str], changed: Sequence[str] = (), statuses: tuple[int, ...] = (0,)
    ) -> tuple[Ended, str]:
        """Run a command with these options changed; return how it has ended, and what is wrong about it or "".

        A refusal is one line for each, and one for every other option that it does not fit, which names both.
        """
        before = self.files()
        ended = self.run(words)
        after = self.files()
        new = sorted(name for name in after if before.get(name) != after[name] and name != ".")
        if ended.fault:
            return ended, ended.fault
        if any("outputs are not finite" in line for line in ended.errors):
            return ended, ""  # it has trained, and its checkpoint stays for a look
        if any(".partial" in name for name in new):
            return ended, f"left {new}"
        if ended.status == 2:
            unnamed = [line for line in ended.errors if not any(name in line for name in changed)]
            is_told = ended.errors and all(line.startswith("bayeslora: ") for line in ended.errors)
            if not is_told or len(unnamed) > max(1, len(changed)):
                return ended, f"says {ended.errors}"
            return ended, f"wrote {new} and refused: {ended.errors[0]}" if new else ""
        if ended.status not in statuses:
            return ended, f"status {ended.status}: {ended.errors}"
        if ended.unread:
            return ended, f"{sorted(ended.unread)} not read"
        if ended.errors:
            return ended, f"says {ended.errors}"
        if "--json" in words:
            json.loads(ended.printed, parse_constant=_not_json)
        return ended, ""


def _hung(number: int, frame: object) -> None:
    raise Hang(f"no end in {LONGEST} s")


def _not_json(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def shown(words: Sequence[str]) -> str:
    """Return a command in one line, with long words cut."""
    return " ".join(repr(word if len(word) < 80 else f"{word[:40]}…{len(word)}") for word in words)


def spread(groups: dict[Any, list[Any]], count: int, seed: int) -> Iterator[Any]:
    """Yield `count` cases, from each group in turn; a group that has no more is passed over."""
    generator = random.Random(seed)
    order = sorted(groups, key=repr)
    generator.shuffle(order)
    waiting = {name: generator.sample(groups[name], len(groups[name])) for name in order}
    given = 0
    while given < count and any(waiting.values()):
        for name in order:
            if waiting[name] and given < count:
                given += 1
                yield waiting[name].pop()


Case = tuple[str, Callable[[], tuple[str, str]]]
"""A description, and what tries it: returns how it ended in a word, and what is wrong or ""."""


def tried(cases: Sequence[Case]) -> tuple[Counter[str], list[str]]:
    """Try all cases; return how they ended, and what was wrong."""
    counts: Counter[str] = Counter()
    wrong = []
    for name, attempt in cases:
        how, fault = attempt()
        counts["fault" if fault else how] += 1
        if fault:
            wrong.append(f"{name}: {fault}")
    return counts, wrong
