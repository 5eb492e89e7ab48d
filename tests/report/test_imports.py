"""The report's packages are imported by what draws, and asked for before a run starts."""

from __future__ import annotations

import subprocess
import sys

import pytest

import bayeslora.report
from bayeslora.errors import BayesLoraError
from bayeslora.report import check_installed


def test_importing_report_and_runs_does_not_import_what_draws() -> None:
    code = (
        "import sys, bayeslora.report, bayeslora.runs, bayeslora.runs.record\n"
        "print({'torch', 'matplotlib', 'jinja2', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_missing_package_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setattr(bayeslora.report, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(BayesLoraError, match="^matplotlib is not installed, but the report of a run needs it: pip"):
        check_installed()
