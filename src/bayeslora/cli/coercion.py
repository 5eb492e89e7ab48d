"""Convert values from a command line or a YAML file to the type hint of a dataclass field.

This module imports neither torch, transformers nor peft; it only sees the type hints of their dataclasses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from bayeslora.errors import BayesLoraError, close_matches, option
from bayeslora.files import parse_yaml

_BOOLEANS = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)
_BARE_NAME = re.compile(r"[\w.]+")


def coerce(name: str, value: Any, hint: Any) -> Any:
    """Convert `value` to the type `hint`: text is parsed, other YAML values are checked.

    Lists may be written `a,b,c`, mappings `{a: 1}`, None `null`. If a hint allows both a list and a string, a bare
    name becomes a list of one, so that `--target-modules query` means the module and not a regular expression.

    Raises:
        BayesLoraError: the hint does not allow the value.
    """
    members = _members(hint)
    if isinstance(value, str):
        value = value.strip()
        if _is_yaml(value, members):
            return coerce(name, _read_yaml(name, value), hint)
    if value is None or (isinstance(value, str) and value.lower() in ("null", "~")):
        if type(None) in members or Any in members:
            return None
        raise _wrong(name, value, members)
    for read in (_choice, _boolean, _whole_number, _number, _sequence, _other):
        for found in read(name, value, members):
            return found
    raise _wrong(name, value, members)


def _members(hint: Any) -> list[Any]:
    origin = typing.get_origin(hint)
    if origin is typing.Union or origin is types.UnionType:
        return [member for part in typing.get_args(hint) for member in _members(part)]
    if origin is typing.Annotated:
        return _members(typing.get_args(hint)[0])
    return [hint]


def _is_yaml(text: str, members: list[Any]) -> bool:
    if Any in members:
        return True
    return (text.startswith("{") and _takes_mapping(members)) or (text.startswith("[") and bool(_elements(members)))


def _read_yaml(name: str, text: str) -> Any:
    import yaml

    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise BayesLoraError(f"{option(name)} is {text!r}, but must be valid YAML: quote or correct it") from error


# Each reader yields the converted value, or nothing if it does not apply.


def _choice(name: str, value: Any, members: list[Any]) -> Iterator[Any]:
    for choice in _choices(members):
        # YAML 1.1 reads `no` as false, and TrainingArguments' strategies accept `no`.
        if value == choice or _written(value) == _written(choice) or (value is False and choice == "no"):
            yield choice


def _written(choice: Any) -> str:
    return str(choice).lower().replace("-", "_")


def _boolean(name: str, value: Any, members: list[Any]) -> Iterator[bool]:
    if bool in members:
        if isinstance(value, bool):
            yield value
        elif isinstance(value, str) and value.lower() in _BOOLEANS:
            yield _BOOLEANS[value.lower()]
        elif value in ("0", "1") and int not in members:
            yield value == "1"


def _whole_number(name: str, value: Any, members: list[Any]) -> Iterator[int]:
    if int not in members or isinstance(value, bool):
        return
    if isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value)):
        yield int(value)
    elif isinstance(value, float) and value.is_integer() and float not in members:
        yield int(value)


def _number(name: str, value: Any, members: list[Any]) -> Iterator[float]:
    if float not in members or isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return
    number = math.nan
    with contextlib.suppress(ValueError):
        number = float(value)
    if math.isfinite(number):
        yield number


def _sequence(name: str, value: Any, members: list[Any]) -> Iterator[list[Any]]:
    for element in _elements(members)[:1]:
        if isinstance(value, str) and ("," in value or str not in members or _BARE_NAME.fullmatch(value)):
            value = [part for part in value.split(",") if part.strip()]
        if isinstance(value, (list, tuple)):  # among texts, null is one too
            yield [item.strip() if type(item) is element is str else coerce(name, item, element) for item in value]


def _other(name: str, value: Any, members: list[Any]) -> Iterator[Any]:
    is_text = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if Any in members or (isinstance(value, dict) and _takes_mapping(members)):
        yield value
    elif str in members and not _choices(members) and is_text:
        yield str(value)


def _choices(members: list[Any]) -> list[Any]:
    """Return the values that Literal and Enum members allow."""
    found: list[Any] = []
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            found += typing.get_args(member)
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            found += [item.value for item in member]
    return found


def _elements(members: list[Any]) -> list[Any]:
    """Return the element hints of the sequences among the members."""
    sequences = [member for member in members if (typing.get_origin(member) or member) in (list, tuple, set)]
    return [next((a for a in typing.get_args(member) if a is not Ellipsis), str) for member in sequences]


def _takes_mapping(members: list[Any]) -> bool:
    return any((typing.get_origin(member) or member) is dict or dataclasses.is_dataclass(member) for member in members)


def _wrong(name: str, value: Any, members: list[Any]) -> BayesLoraError:
    choices = [str(choice) for choice in _choices(members)]
    wanted = {
        f"one of {', '.join(choices)}": choices,
        "true or false": bool in members,
        "a whole number": int in members and float not in members,
        "a number": float in members,
        "a list a,b,c": _elements(members),
        "a mapping {key: value}": _takes_mapping(members),
        "a text": str in members and not choices,
        "null": type(None) in members,
    }
    near = close_matches(value, choices) if isinstance(value, str) else ""
    if _takes_mapping(members) and (pairs := re.findall(r"([\w.]+)\s*[=:]\s*([\w.]+)", str(value))):
        near = f", write '{{{', '.join(f'{key}: {item}' for key, item in pairs)}}}'"
    if isinstance(value, bool) and wanted["a text"]:
        near = f", quote a word such as {'yes' if value else 'no'}, which YAML takes for {str(value).lower()}"
    listed = " or ".join(text for text, takes in wanted.items() if takes)
    return BayesLoraError(f"{option(name)} is {value!r}, but must be {listed}{near.replace(', ', ': ', 1)}")
