"""From what is typed on a command line or in a YAML file to what a dataclass field's type hint asks for.

No torch, transformers or peft is imported here: only the hints of their dataclasses come in.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import types
import typing
from typing import Any

import yaml

from bayeslora.errors import BayesLoraError, close_matches, option

_TRUE = {"true", "yes", "on"}
_FALSE = {"false", "no", "off"}
_NULL = {"null", "~"}
_BARE_NAME = re.compile(r"[\w.]+")


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; text is read by the hint, other YAML values are checked against it.

    Lists may be written `a,b,c`, mappings `{a: 1}`, None `null`. Where a hint allows both a list and a string, one
    bare name becomes a list of one, so that `--target-modules query` means the module and not a regular expression.

    Raises:
        BayesLoraError: the value is of no type the hint allows.
    """
    members = _members(hint)
    if Any in members:
        return _read_yaml(name, value) if isinstance(value, str) else value
    if value is None or (isinstance(value, str) and value.lower() in _NULL):
        if type(None) in members:
            return None
        raise _wrong(name, value, members)
    if isinstance(value, str):
        return _from_text(name, value.strip(), members)
    return _from_yaml(name, value, members)


def _members(hint: Any) -> list[Any]:
    origin = typing.get_origin(hint)
    if origin is typing.Union or origin is types.UnionType:
        return [member for part in typing.get_args(hint) for member in _members(part)]
    if origin is typing.Annotated:
        return _members(typing.get_args(hint)[0])
    return [hint]


def _choices(members: list[Any]) -> list[Any] | None:
    """The values allowed by Literal and Enum members, None when there is neither."""
    found: list[Any] = []
    for member in members:
        if typing.get_origin(member) is typing.Literal:
            found += typing.get_args(member)
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            found += [item.value for item in member]
    return found or None


def _is(member: Any, kind: type) -> bool:
    return member is kind or typing.get_origin(member) is kind


def _element_hint(members: list[Any]) -> Any:
    for member in members:
        for kind in (list, tuple, set):
            if _is(member, kind):
                arguments = [a for a in typing.get_args(member) if a is not Ellipsis]
                return arguments[0] if arguments else str
    return None


def _takes_mapping(members: list[Any]) -> bool:
    return any(_is(member, dict) or dataclasses.is_dataclass(member) for member in members)


def _from_text(name: str, text: str, members: list[Any]) -> Any:
    choices = _choices(members)
    for choice in choices or ():
        if text == choice or (not isinstance(choice, str) and text.lower() == str(choice).lower()):
            return choice
    if bool in members and text.lower() in _TRUE | _FALSE:
        return text.lower() in _TRUE
    if bool in members and int not in members and text in ("0", "1"):
        return text == "1"
    if int in members and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if float in members:
        try:
            number = float(text)
        except ValueError:
            pass
        else:
            if math.isfinite(number):
                return number
    if text.startswith("{") and _takes_mapping(members):
        return _from_yaml(name, _read_yaml(name, text), members)
    element = _element_hint(members)
    if element is not None:
        if text.startswith("["):
            return _from_yaml(name, _read_yaml(name, text), members)
        if "," in text or str not in members or _BARE_NAME.fullmatch(text):
            return [coerce(name, part, element) for part in (part.strip() for part in text.split(",")) if part]
    if str in members and choices is None:
        return text
    raise _wrong(name, text, members)


def _from_yaml(name: str, value: Any, members: list[Any]) -> Any:
    if isinstance(value, bool):
        choices = _choices(members) or ()
        # YAML 1.1 reads the word `no` as false, and `no` is a value of TrainingArguments' strategies.
        if value is False and "no" in choices:
            return "no"
        if bool in members or value in choices:
            return value
    elif isinstance(value, (int, float)):
        if isinstance(value, int) and int in members:
            return value
        if float in members and math.isfinite(value):
            return float(value)
        if int in members and float(value).is_integer():
            return int(value)
        if str in members:
            return str(value)
    elif isinstance(value, (list, tuple)):
        element = _element_hint(members)
        if element is not None:
            return [coerce(name, item, element) for item in value]
    elif isinstance(value, dict):
        if _takes_mapping(members):
            return value
    raise _wrong(name, value, members)


def _read_yaml(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BayesLoraError(f"{option(name)} is {text!r}, which is not valid YAML; quote or correct it.") from error


def _wrong(name: str, value: Any, members: list[Any]) -> BayesLoraError:
    choices = _choices(members)
    wanted = [", ".join(str(choice) for choice in choices)] if choices else []
    if bool in members:
        wanted.append("true or false")
    if int in members and float not in members:
        wanted.append("a whole number")
    if float in members:
        wanted.append("a number")
    if _element_hint(members) is not None:
        wanted.append("a list a,b,c")
    if _takes_mapping(members):
        wanted.append("a mapping {key: value}")
    if str in members and not choices:
        wanted.append("a text")
    if type(None) in members:
        wanted.append("null")
    hint = close_matches(value, [str(c) for c in choices]) if choices and isinstance(value, str) else ""
    return BayesLoraError(f"{option(name)} is {value!r}{hint}; give {' or '.join(wanted)}.")
