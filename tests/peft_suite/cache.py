"""Where PEFT's tests and the small models for them are kept between runs, and how the tests get there.

PEFT's wheel ships no tests, its source distribution does. They are downloaded once per PEFT version, unpacked as an
importable package and never become part of this repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ENVIRONMENT_VARIABLE = "BAYESLORA_PEFT_TESTS"
PACKAGE = "peft_upstream"

# Upstream reads meaning into a model id, which here is a path: these words make it skip, or change, a test.
TELLING_WORDS = ("llama", "gpt2", "gptj", "gptbigcode", "gemma", "deberta", "bart")


def cache_folder() -> Path:
    """The folder for the installed PEFT version; `BAYESLORA_PEFT_TESTS` overrides the place."""
    override = os.environ.get(ENVIRONMENT_VARIABLE)
    if override:
        return Path(override)
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "bayeslora" / "peft-tests" / version("peft")


def check_path(folder: Path) -> None:
    """Refuse a cache path that upstream would read as the name of an architecture."""
    found = [word for word in TELLING_WORDS if word in str(folder).lower()]
    if found:
        raise SystemExit(
            f"the cache path {folder} contains {found[0]!r}, which PEFT's tests take for a model name; "
            f"set {ENVIRONMENT_VARIABLE} to a folder without it"
        )


def fetch(folder: Path) -> Path:
    """Put the tests of the installed PEFT into `folder` as a package; does nothing when they are there."""
    package = folder / PACKAGE
    if package.is_dir():
        return package
    release = f"peft=={version('peft')}"
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        outcome = subprocess.run([*command, release, "--dest", str(scratch)], capture_output=True, text=True)
        archives = list(scratch.glob("peft-*.tar.gz"))
        if outcome.returncode != 0 or not archives:
            raise SystemExit(f"could not download the source of {release}: {outcome.stderr.strip()[-500:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(scratch, filter="data")
        tests = next(scratch.glob("peft-*/tests"))
        (tests / "__init__.py").touch()
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(tests, package)
    return package
