"""Files from elsewhere: what a format is called when something is wrong with a file, and JSON read without trust."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from bayeslora.errors import BayesLoraError

_LARGEST_SIZE = 1 << 31


@dataclass(frozen=True)
class Format:
    """A format of files that are not trusted.

    Attributes:
        name: what such a file is called, as in `the packed adapter is damaged`.
        export: the `format` of `export` that writes it.
        version: the newest one that is read.
    """

    name: str
    export: str
    version: int

    def damaged(self, reason: str) -> NoReturn:
        """Raise the error of a file that cannot be used because of `reason`."""
        raise BayesLoraError(f"the {self.name} is damaged ({reason}): export it again or restore it from a copy")

    def read_object(self, text: str | bytes, what: str) -> dict[str, Any]:
        """The JSON object in `text`, without repeated keys and NaN, or `BayesLoraError` for all that can go wrong."""
        try:
            content = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            self.damaged(f"{what} is no valid JSON")
        if not isinstance(content, dict):
            self.damaged(f"{what} is no JSON object")
        return content

    def check_version(self, content: dict[str, Any]) -> None:
        """Raise `BayesLoraError` unless `content` has this version."""
        version = content.get("version")
        if type(version) is int and version > self.version:
            raise BayesLoraError(
                f"the {self.name} has format version {version}, this library reads {self.version}: update bayeslora"
            )
        if type(version) is not int or version != self.version:
            self.damaged(f"its version is {version!r:.40}, not {self.version}")


PACKED = Format("packed adapter", "packed", 1)
INTEGER = Format("integer model", "integer", 1)


def is_size(value: Any) -> bool:
    """Whether `value` is a whole number from 0 that a dimension can have."""
    return type(value) is int and 0 <= value < _LARGEST_SIZE


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
