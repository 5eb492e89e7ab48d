"""`bayeslora train --list-options`: every option of a method, with its type and default."""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Any

from transformers import TrainingArguments

from bayeslora.cli.arguments import ivon_field_hints, method_field_hints, training_field_hints
from bayeslora.cli.registry import method_config_class
from bayeslora.errors import option
from bayeslora.runs.plan import IvonOptions, RunOptions


def list_options(method: str) -> str:
    """One option a line, in three groups: the command's, the method's, the trainer's."""
    config_class = method_config_class(method)
    own = {f.name: f.type for f in dataclasses.fields(RunOptions)}
    groups: list[tuple[str, type | None, dict[str, Any]]] = [
        ("options of the command", RunOptions, own),
        ("options of --optim ivon", IvonOptions, ivon_field_hints()),
        (f"options of {method}", config_class, method_field_hints(config_class)),
        ("options of the trainer (transformers.TrainingArguments)", TrainingArguments, training_field_hints()),
    ]
    lines: list[str] = []
    for title, cls, hints in groups:
        if cls is None or not hints:
            continue
        defaults = {f.name: _default(f) for f in dataclasses.fields(cls)}
        lines += [f"{title}:", *(f"  {option(n):<42} {_hint(h)}{defaults[n]}" for n, h in hints.items()), ""]
    return "\n".join(lines).rstrip()


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default is dataclasses.MISSING or item.default is None:
        return ""
    value = item.default.value if isinstance(item.default, enum.Enum) else item.default
    return f" = {value!r}"


def _hint(hint: Any) -> str:
    text = hint if isinstance(hint, str) else getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)
    return re.sub(r"\b(?:typing|collections\.abc|[a-z_]+(?:\.[a-z_]+)+)\.", "", str(text)).replace("NoneType", "None")
