"""New output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bayeslora.errors import BayesLoraError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into, renamed to `path` on success and removed on failure.

    Raises:
        BayesLoraError: `path` exists.
    """
    if path.exists():
        raise BayesLoraError(f"output folder {path} exists; name a new one or delete it.")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
