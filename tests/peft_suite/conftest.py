"""Collects only our cases of PEFT's tests, and sums the results up by row and by reason of a skip."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from typing import Any

import pytest
import torch

from .cache import ENVIRONMENT_VARIABLE, PACKAGE, cache_folder

# The suite is long and needs a download, so it runs only when asked for (run.py sets the variable).
ACTIVE = ENVIRONMENT_VARIABLE in os.environ
collect_ignore_glob = [] if ACTIVE else ["test_*.py"]

if ACTIVE:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    sys.path.insert(0, str(cache_folder()))
    pytest.register_assert_rewrite(PACKAGE)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The same draws whichever worker runs a test, and in whatever order."""
    torch.manual_seed(0)


# These ask for a gradient on every parameter in every pass, or compare the gradients of two passes. A training loop
# announces a step and the gates keep its sample; upstream's loops announce nothing, and a gate drawn as exactly 0 or 1
# has no gradient. So here each gate takes its median, and a variational layer's noise is the same in every pass.
NEED_ALL_GRADIENTS = ("test_training", "test_only_params_are_updated")


@pytest.fixture(autouse=True)
def steady_samples(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample of gates, strictly between 0 and 1, and of weights for the tests in `NEED_ALL_GRADIENTS`."""
    if any(part in request.node.name for part in NEED_ALL_GRADIENTS):
        monkeypatch.setattr("bayeslora.methods.blora.gated_quantizers._uniform", _median)
        monkeypatch.setattr("bayeslora.posterior.noise.rank_generator", _always_the_same)


# By evidence every tensor begins at full precision, and then no range has a part in a pass. Ranges train from the
# first decision on, which a training loop makes and upstream's loops do not.
@pytest.fixture(autouse=True)
def as_after_a_decision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """B-LoRA by evidence as its first decision may leave it, for the tests in `NEED_ALL_GRADIENTS`."""
    if any(part in request.node.name for part in NEED_ALL_GRADIENTS):
        from .decided import add_decided_adapter

        monkeypatch.setattr("bayeslora.methods.blora.layer.BLoraLayer.add_adapter", add_decided_adapter)


def _always_the_same(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _median(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, 0.5, dtype=torch.float32)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop upstream's own cases (LoRA, IA3, ...): they are PEFT's business."""
    if not ACTIVE:
        return
    from .cases import owner

    ours, foreign = [], []
    for item in items:
        callspec = getattr(item, "callspec", None)
        label = owner(callspec.params) if callspec else None
        if label is None:
            foreign.append(item)
        else:
            item.user_properties += [("row", label), ("suite", item.parent.name if item.parent else "")]
            ours.append(item)
    items[:] = ours
    config.hook.pytest_deselected(items=foreign)


def _reason(report: Any) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    text = text.removeprefix("Skipped: ")
    return re.sub(r"<class '[\w.]*\.(\w+)'>", r"\1", text)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """A table of rows, a table of suites, and the skips by reason."""
    outcomes = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    by_row: Counter[tuple[str, str]] = Counter()
    by_suite: Counter[tuple[str, str]] = Counter()
    reasons: Counter[str] = Counter()
    for outcome in outcomes:
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(getattr(report, "user_properties", []))
            if "row" not in properties:
                continue
            by_row[properties["row"], outcome] += 1
            by_suite[properties["suite"], outcome] += 1
            if outcome == "skipped":
                reasons[_reason(report)] += 1
    if not by_row:
        return
    write = terminalreporter.write_line
    for title, counts in (("configuration", by_row), ("suite", by_suite)):
        write("")
        write(f"| {title} | passed | failed | skipped |")
        write("|---|---|---|---|")
        for name in sorted({name for name, _ in counts}):
            failed = sum(counts[name, outcome] for outcome in ("failed", "error", "xfailed", "xpassed"))
            write(f"| {name} | {counts[name, 'passed']} | {failed} | {counts[name, 'skipped']} |")
    write("")
    write("| skipped | reason upstream gives |")
    write("|---|---|")
    for reason, count in reasons.most_common():
        write(f"| {count} | {reason} |")
