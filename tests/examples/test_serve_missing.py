"""The server says which package it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError('none', name='uvicorn')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "serve.py"), "run"], env=environment, capture_output=True, text=True
    )
    said = "serve: uvicorn is not installed, but needed: run `pip install bayeslora[serve]`\n"
    assert (done.returncode, done.stderr) == (2, said)
