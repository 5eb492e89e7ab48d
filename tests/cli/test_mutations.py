"""A run folder in which something was changed: the same scores with status 0, or one line with status 2."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayeslora.cli.main import main

WRONG: list[Any] = [
    *(None, True, -1, 0, 4.5, 10**9, 2**40, 1e308, "", "x", "nan", "(([a-z.]+)+)+!"),
    *([], [[[]]], ["x"], [1], {}, {"a": 1}, {"query": 10**8}),
]
WHOLE = [b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 20_000, b'{"a":' * 20_000]
NOT_READ = ("config.yaml", "README.md", "report.html", "history.json", "metrics.json")

Mutation = Callable[[Path], object]


def _mutations(run: Path, generator: random.Random) -> dict[str, Mutation]:
    """Return changes of a folder by their descriptions."""
    found: dict[str, Mutation] = {}
    for file in sorted(path.name for path in run.iterdir() if path.suffix != ".png" and path.name not in NOT_READ):
        size = (run / file).stat().st_size
        for length in (0, size // 3, size - 1):
            found[f"{file} cut to {length}"] = lambda folder, f=file, n=length: _rewritten(folder / f, lambda b: b[:n])
        found[f"{file} missing"] = lambda folder, f=file: (folder / f).unlink()
        for place in (generator.randrange(size) for _ in range(10)):
            found[f"{file} flipped at {place}"] = lambda folder, f=file, p=place: _rewritten(
                folder / f, lambda b: b[:p] + bytes([b[p] ^ 4]) + b[p + 1 :]
            )
        if not file.endswith(".json"):
            continue
        content = json.loads((run / file).read_text(encoding="utf-8"))
        changed = {f"{name} deleted": {k: v for k, v in content.items() if k != name} for name in content}
        for name in content:
            changed |= {f"{name} = {value!r}": {**content, name: value} for value in WRONG if value != content[name]}
        for what, value in changed.items():
            text = json.dumps(value).encode()
            found[f"{file}: {what}"] = lambda folder, f=file, t=text: (folder / f).write_bytes(t)
        for whole in WHOLE:
            found[f"{file} is {whole[:8]!r}"] = lambda folder, f=file, t=whole: (folder / f).write_bytes(t)
    return found


def _rewritten(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _outcomes(
    run: Path, tmp_path: Path, count: int, seed: int, capfd: pytest.CaptureFixture[str]
) -> tuple[Counter[str], list[str]]:
    """Evaluate `count` changed copies of the folder; returns how they ended, and what was wrong."""

    def evaluated(folder: Path) -> tuple[int, Any, str]:
        capfd.readouterr()
        status = main(["evaluate", str(folder), "--json"])
        printed = capfd.readouterr()
        return status, json.loads(printed.out)["scores"] if status == 0 else None, printed.err

    expected = evaluated(run)[1]
    generator = random.Random(seed)
    mutations = _mutations(run, generator)
    counts: Counter[str] = Counter()
    wrong = []
    for name in generator.sample(sorted(mutations), count):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        mutations[name](copy)
        try:
            status, scores, error = evaluated(copy)
        except Exception as unexpected:
            wrong.append(f"{name}: {type(unexpected).__name__}: {unexpected}")
            continue
        counts["refused" if status else "same"] += 1
        if (status, scores) != (0, expected) and (status != 2 or len(error.splitlines()) != 1):
            wrong.append(f"{name}: {status} {scores} {error}")
    return counts, wrong


def test_a_changed_run_folder_is_refused_or_scores_the_same(
    runs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    counts, wrong = _outcomes(runs["lora"], tmp_path, 40, 0, capfd)
    assert not wrong
    assert counts.total() == 40 and counts["refused"] > 10, counts


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "blora", "full", "melora"])
def test_many_changes_of_a_run_folder(
    runs: dict[str, Path], tmp_path: Path, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    counts, wrong = _outcomes(runs[method], tmp_path, 500, 1, capfd)
    with capfd.disabled():
        print(f"{method}: {dict(counts)}, {len(wrong)} wrong")
    assert not wrong
