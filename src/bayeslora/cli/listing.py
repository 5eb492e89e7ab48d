"""`bayeslora train --list-options`: list every option of a method with its type and default."""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Any

from bayeslora.cli.arguments import (
    command_defaults,
    ivon_field_hints,
    method_field_hints,
    shared_defaults,
    training_field_hints,
)
from bayeslora.cli.registry import method_config_class
from bayeslora.errors import option
from bayeslora.runs.plan import IvonOptions, RunOptions


def list_options(method: str) -> str:
    """Return one line per option, grouped by command, IVON, method and Trainer."""
    from transformers import TrainingArguments

    own = {f.name: f.type for f in dataclasses.fields(RunOptions)}
    groups: list[tuple[str, type | None, dict[str, Any]]] = [
        ("options of the command", RunOptions, own),
        ("options of --optim ivon", IvonOptions, ivon_field_hints()),
        (f"options of {method}", method_config_class(method), method_field_hints(method)),
        ("options of the trainer (transformers.TrainingArguments)", TrainingArguments, training_field_hints()),
    ]
    shared = shared_defaults(method) | command_defaults(method)
    lines: list[str] = []
    for title, cls, hints in groups:
        if cls is None or not hints:
            continue
        defaults = {f.name: shared.get(f.name, f.default) for f in dataclasses.fields(cls)}
        lines += [f"{title}:", *(f"  {option(n):<42} {_hint(h)}{_default(defaults[n])}" for n, h in hints.items()), ""]
    return "\n".join(lines).rstrip()


def _default(value: Any) -> str:
    if value is dataclasses.MISSING or value is None:
        return ""
    return f" = {value.value if isinstance(value, enum.Enum) else value!r}"


def _hint(hint: Any) -> str:
    text = hint if isinstance(hint, str) else getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)
    return re.sub(r"\b(?:typing|collections\.abc|[a-z_]+(?:\.[a-z_]+)+)\.", "", str(text)).replace("NoneType", "None")
