"""Atomic output, JSON without NaN or infinity, and YAML as people mean it."""

from __future__ import annotations

import codecs
import csv
import functools
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayeslora.errors import BayesLoraError
from bayeslora.vocabulary import WORDS

_FIRST_ROW = 2**20
"""Maximum of bytes that `first_columns` reads."""
_CONLL_LINES = 1000
"""Lines by which a CoNLL file is told from others."""
DOCUMENT_START = "-DOCSTART-"
"""First word of the lines of a CoNLL file that are between documents."""
_MARKS = (
    *((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
_EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
"""Numbers that YAML 1.1, which wants a point before the exponent, takes for texts."""
_TAG = re.compile(r"O|[BI]-[^\W\d_].*")
"""A tag by which a CoNLL file is told from others."""
SEPARATOR_LINE = re.compile(r"\Asep=(.)\r?\n")
"""First line of a CSV file by which Excel says the delimiter."""


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden path in the same folder to write to; on success it replaces the file `path`.

    A link stays, and the file that it names is replaced. A device or a pipe is written to directly.

    Raises:
        BayesLoraError: the file cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise BayesLoraError(f"{path} is a folder, but must be a file: give another name")
    is_special = path.exists() and not path.is_file()
    target = path if is_special else path.resolve()
    partial = target if is_special else _partial(target)
    try:
        mode = None if is_special else _mode_of_new_file(partial)
        yield partial
        if mode is not None:
            os.chmod(partial, mode)
            os.replace(partial, target)
    except OSError as error:
        raise BayesLoraError(f"{path} cannot be written ({error.strerror}): choose a writable folder") from error
    finally:
        if not is_special:
            partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a hidden sibling folder to write into; it is renamed to `path` on success and removed on failure.

    Raises:
        BayesLoraError: `path` exists, or cannot be made.
    """
    path = Path(path)
    check_new(path)
    check_writable(path)
    partial = _partial(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        open_to_others(partial)
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_to_others(folder: Path) -> None:
    """Let whoever may read the folder read its files: safetensors makes files that only their owner can read."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.chmod(path, path.stat().st_mode | (folder.stat().st_mode & 0o444))


def check_readable(path: Path) -> None:
    """Raise BayesLoraError if the file `path` is there but may not be read."""
    if path.is_file() and not os.access(path, os.R_OK):
        raise BayesLoraError(f"{path} cannot be read (Permission denied): `chmod a+r` it as its owner")


def check_writable(path: Path) -> None:
    """Raise BayesLoraError if `path` cannot be made in its folder, or in the nearest one that is there."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BayesLoraError(
            f"{path} cannot be written, since {folder} is not writable: choose a writable folder, or `chmod u+w` that"
        )


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


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return a digest of the content of a file, 16 characters."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def finite(content: Any) -> Any:
    """Return a copy of `content` with None for every number that is not finite; JSON does not allow NaN."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content


def parse_yaml(text: str) -> Any:
    """Parse YAML without tags; `1e-5` is a number, as in JSON and YAML 1.2.

    Raises:
        yaml.YAMLError: the text is not YAML, repeats a key in one mapping, or is nested too deeply.
    """
    import yaml

    try:
        return yaml.load(text, _yaml_classes()[0])  # noqa: S506 - a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def dump_yaml(content: Any) -> str:
    """Return YAML that `parse_yaml` reads as the same content."""
    import yaml

    return str(yaml.dump(content, Dumper=_yaml_classes()[1], sort_keys=False, allow_unicode=True))


@functools.cache
def _yaml_classes() -> tuple[Any, Any]:
    """Make the loader and the dumper; yaml is imported only where it is needed."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise yaml.constructor.ConstructorError(None, None, f"repeats {key.value!r}", key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    class Dumper(yaml.SafeDumper): ...

    for each in (Loader, Dumper):
        each.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
    return Loader, Dumper


def first_columns(path: str | os.PathLike[str]) -> list[str]:
    """Return the column names of the first row of a data file; an empty list if they cannot be told quickly.

    Reading the file in full reports what is wrong with it.
    """
    path = Path(path)
    extension = path.suffix.lower()
    try:
        if extension == ".parquet":
            import pyarrow.parquet  # type: ignore[import-untyped]  # slow to load

            return list(pyarrow.parquet.read_schema(path).names)
        with path.open("rb") as stream:
            content = stream.read(_FIRST_ROW)
        text = content.decode(encoding_of(content) or "utf-8", errors="replace")
        if extension not in (".json", ".jsonl"):
            if (conll := conll_columns(text, extension)) or extension not in (".csv", ".tsv"):
                return conll
            header = [SEPARATOR_LINE.sub("", text).partition("\n")[0]]
            names = max((next(csv.reader(header, delimiter=each), []) for each in ",;\t|"), key=len)
            return [name.strip() for name in names]
        row, _ = json.JSONDecoder().raw_decode(text.lstrip().removeprefix("[").lstrip())
    except (OSError, ValueError, RecursionError, csv.Error):  # pyarrow's errors are among these
        return []
    return list(row) if isinstance(row, dict) else []


def conll_columns(start: str, extension: str) -> list[str]:
    """Return the columns of a CoNLL file from its beginning: `tokens`, `column_2`, …, `tags`; [] for other texts.

    Such a file has a word on each line, with one tag or several between blanks, and empty lines between sentences. It
    needs an empty line or a tag such as `O` or `B-PER`, and both if it is called `.csv` or `.tsv`; there an empty line
    at the end does not count after a first line without such a tag, the header of a table.
    """
    lines = [line.strip() for line in start.split("\n", _CONLL_LINES)[:_CONLL_LINES]]
    if len(start.encode()) >= _FIRST_ROW:
        lines.pop()  # it may be cut
    words = [conll_fields(line) for line in lines if line and not line.startswith(DOCUMENT_START)]
    widths = {len(fields) for fields in words}
    are_tags = [_TAG.fullmatch(fields[-1]) is not None for fields in words]
    is_table = extension in (".csv", ".tsv")
    has_header = is_table and not any(are_tags[:1])
    has_gap = "" in ("\n".join(lines).rstrip().split("\n") if has_header else lines[:-1])
    is_one = has_gap and any(are_tags) if is_table else has_gap or any(are_tags)
    if len(widths) != 1 or widths == {1} or not is_one:
        return []
    return [WORDS, *(f"column_{number}" for number in range(2, widths.pop())), "tags"]


def conll_fields(line: str) -> list[str]:
    """Return the fields of a line of a CoNLL file: between tabs, or without any between blanks."""
    return line.split("\t") if "\t" in line else line.split(" ") if "  " not in line else line.split()


def encoding_of(content: bytes) -> str:
    """Return the encoding that a byte-order mark names, or UTF-16 by the zero bytes of the first letters, or ""."""
    found = next((name for mark, name in _MARKS if content.startswith(mark)), "")
    zeros = [position for position, byte in enumerate(content[:4]) if byte == 0]
    return found or ("utf-16-le" if zeros == [1, 3] else "utf-16-be" if zeros == [0, 2] else "")


def _mode_of_new_file(path: Path) -> int:
    """Return the mode that this process gives to new files: it can only be asked for by making one."""
    path.touch()
    mode = path.stat().st_mode
    path.unlink()
    return stat.S_IMODE(mode)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
