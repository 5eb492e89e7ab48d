"""The check of an accelerator: its code on a CPU, and what becomes of a section that fails or comes too late."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from device_runs import VARIANTS, Report, synchronisations

from tests.benchmarks.conftest import BENCHMARKS

# Packages that a machine lent for a check may lack: importing them fails, and nothing finds them.
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(("jinja2", "datasets", "matplotlib")))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_exception_fails_its_section_and_the_next_one_runs() -> None:
    report, done = Report(budget=60), []
    report.section("first", lambda: [][1])
    report.section("second", lambda: done.append(2))
    result = report.result()
    (failed,) = result["failed"]
    facts = result["checks"][failed]["facts"]
    assert failed.startswith("first") and facts["error"].startswith("IndexError")
    assert Path(__file__).name in facts["at"][-1]
    assert done == [2] and result["seconds"].keys() == {"first", "second", "total"} and not result["ok"]


def test_sections_after_the_budget_are_skipped_and_the_report_is_not_ok() -> None:
    report, done = Report(budget=0), []
    report.section("late", lambda: done.append(1))
    assert not done and report.result()["skipped"] == ["late"] and not report.result()["ok"]


def test_facts_that_are_not_finite_are_valid_json() -> None:
    report = Report(budget=60)
    report.check("finite", True, losses=[float("nan"), 0.123456], device=torch.device("cpu"))
    text = json.dumps(report.result(), allow_nan=False)
    assert json.loads(text)["checks"]["finite"]["facts"] == {"losses": ["nan", 0.1235], "device": "cpu"}
    assert report.result()["ok"]


def test_synchronisations_are_counted_by_place_and_other_warnings_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with synchronisations() as places:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    ((place, count),) = places.items()
    assert count == 2 and Path(__file__).name in place and modes == ["warn", "default"]


@pytest.mark.slow
def test_every_section_holds_on_a_cpu_without_the_packages_that_may_be_missing(tmp_path: Path) -> None:
    script, output = Path(BENCHMARKS) / "device.py", tmp_path / "device.json"
    words = [script, "--cpu", "--tiny", "--budget", "1000", "--output", output]
    code = f"import sys; sys.argv = {list(map(str, words))}{WITHOUT}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([BENCHMARKS, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    assert found["ok"] and not found["failed"] and not found["skipped"]
    assert found["machine"]["missing"][-2:] == ["jinja2", "datasets"]
    assert found["step"].keys() == set(VARIANTS) and all(own["ms"] > 0 for own in found["step"].values())
