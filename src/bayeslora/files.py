"""Atomic output, and JSON without NaN or infinity."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayeslora.errors import BayesLoraError


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden path in the same folder to write to; on success it replaces the file `path`.

    Raises:
        BayesLoraError: the file cannot be written.
    """
    path = Path(path)
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise BayesLoraError(f"{path} cannot be written ({error.strerror}): choose a writable folder") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden sibling folder to write into; it is renamed to `path` on success and removed on failure.

    Raises:
        BayesLoraError: `path` exists.
    """
    path = Path(path)
    check_new(path)
    partial = _partial(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(path: Path) -> None:
    """Raise BayesLoraError if the output folder `path` exists."""
    if path.exists():
        raise BayesLoraError(f"the output folder {path} exists, but must be new: choose another or delete it")


def save_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as JSON: null for numbers that are not finite, each innermost list or object on one line."""
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    # Within a text JSON has no line break, so only white space between values is changed.
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda innermost: re.sub(r"\n\s*", " ", innermost[0]), text)
    Path(path).write_text(text + "\n", encoding="utf-8")


def finite(content: Any) -> Any:
    """Return a copy of `content` with None for every number that is not finite; JSON does not allow NaN."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
