"""The notebooks: without outputs, and their cells run from the first to the last."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples" / "notebooks").glob("*.ipynb"))
SHELL = """
import os, subprocess, sys
def _sh(line):
    words = line.split()
    assert words[0] == "bayeslora"
    subprocess.run([sys.executable, "-m", *words], check=True)
"""


def cells(notebook: Path) -> list[str]:
    """The code cells, with lines of the shell as calls; IPython puts names in braces in, as an f-string does."""
    content = json.loads(notebook.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    return [re.sub(r"^!(.*)$", lambda line: f"_sh(f{line[1]!r})", source, flags=re.MULTILINE) for source in sources]


def test_there_is_one_for_each_journey() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["chat", "comparison", "tickets"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_code_without_outputs(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4 and len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    for source in cells(notebook):
        compile(source, notebook.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_from_the_first_to_the_last(notebook: Path, tmp_path: Path, tiny_causal_folder: Path) -> None:
    """In an empty folder, with the packaged encoder; a tiny language model, since the packaged one takes minutes."""
    code = "\n".join([SHELL, *cells(notebook)]).replace('MODEL = "smollm2"', f"MODEL = {str(tiny_causal_folder)!r}")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = {"tickets": "Better than a constant answer", "comparison": "melora", "chat": "answers.html"}
    assert wanted[notebook.stem].lower() in done.stdout.lower()
