"""Read and write JSON files with dataclasses as their schema: reading checks types and ranges.

`from_json` understands dataclasses, `list`, `dict` with text keys, `X | None`, `str`, `int` and `float`, each also as
`Annotated[X, Limit(...)]`; `bool`, and `Literal`. Unknown keys are ignored, so that older versions read newer files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


class Mismatch(ValueError):
    """An invalid value in a record: `key` is its place, `wanted` what that accepts."""

    def __init__(self, key: str, value: object, wanted: str) -> None:
        shown = "missing" if value is None else repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        super().__init__(f"{key!r} is {shown}, but must be {wanted}")
        self.key, self.value, self.wanted = key, value, wanted


@dataclass(frozen=True)
class Limit:
    """Minimum and maximum of a number or of the length of a text, and their description in an error."""

    wanted: str
    low: float
    high: float = math.inf


def from_json(kind: Any, value: Any) -> Any:
    """Convert `value`, a result of `json.loads`, to an instance of `kind`.

    A field with a default takes it if the file has null or NaN; null is left out of a dictionary.

    Raises:
        Mismatch: a value is invalid; names its place from the outermost key on.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _instance(kind, value)
    if origin is Annotated:
        return _limited(arguments[0], arguments[1], value)
    if origin in (UnionType, Union):
        return None if value is None else from_json(arguments[0], value)
    if origin is Literal and value in arguments:
        return value
    if origin is list:
        if not isinstance(value, list):
            raise Mismatch("", value, "a list")
        return [_at(f"[{position}]", arguments[0], item) for position, item in enumerate(value)]
    if origin is dict:
        items = _object(value).items()
        return {name: _at(name, arguments[1], item) for name, item in items if item is not None}
    if kind in (str, bool) and isinstance(value, kind):
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number or kind is int and is_number and math.isfinite(value) and value == int(value):
        return kind(value)
    raise Mismatch("", value, f"one of {', '.join(arguments)}" if origin is Literal else _NAMES[kind])


def to_json(record: Any) -> Any:
    """Convert `record` for `json.dumps`; optional fields are left out if they are None or empty."""
    if dataclasses.is_dataclass(record):
        values = [(field, to_json(getattr(record, field.name))) for field in stored_fields(record)]
        return {field.name: value for field, value in values if _required(field) or value not in (None, "", [], {})}
    if isinstance(record, dict):
        return {name: to_json(value) for name, value in record.items()}
    if isinstance(record, list):
        return [to_json(value) for value in record]
    return record


def stored_fields(record: Any) -> list[dataclasses.Field[Any]]:
    """Return the fields in the file: all without the metadata `stored=False`."""
    return [f for f in dataclasses.fields(record) if f.metadata.get("stored", True)]


_type_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


def _instance(kind: type, value: Any) -> Any:
    given = {}
    found = _object(value)
    for field in stored_fields(kind):
        item = found.get(field.name)
        if _required(field) or not (item is None or item != item):
            given[field.name] = _at(field.name, _type_hints(kind)[field.name], item)
    return kind(**given)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _limited(kind: Any, limit: Limit, value: Any) -> Any:
    try:
        found = from_json(kind, value)
    except Mismatch:
        raise Mismatch("", value, limit.wanted) from None
    size = len(found) if isinstance(found, str) else found
    if not limit.low <= size <= limit.high:
        raise Mismatch("", value, limit.wanted)
    return found


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Mismatch("", value, "an object")
    return value


def _at(place: str, kind: Any, value: Any) -> Any:
    """Convert `value`, found at `place` in its parent; prepend `place` to the key of a `Mismatch`."""
    try:
        return from_json(kind, value)
    except Mismatch as error:
        dot = "" if error.key[:1] in ("", "[") else "."
        raise Mismatch(f"{place}{dot}{error.key}", error.value, error.wanted) from None
