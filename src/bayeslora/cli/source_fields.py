"""Read the fields of a configuration class from its source, so that a wrong option is told without importing torch.

The classes live in modules that take seconds to import. Their fields and type hints are plain text in the source. A
hint that this text alone does not explain is left open; the class itself decides about it later.
"""

from __future__ import annotations

import ast
import builtins
import typing
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OPEN = object()
"""Stands for a hint that the source does not explain by itself."""

_CLASSES = {
    "blora": ("bayeslora.methods.blora.config", "BLoraConfig"),
    "melora": ("bayeslora.methods.melora.config", "MeLoraConfig"),
    "blob": ("bayeslora.methods.blob", "BlobConfig"),
    "bayes_adalora": ("bayeslora.methods.adalora.config", "AdaLoraConfig"),
    "dylora": ("bayeslora.methods.dylora", "DyLoraConfig"),
    "lora": ("peft.tuners.lora.config", "LoraConfig"),
}
_TRAINING = ("transformers.training_args", "TrainingArguments")
_NAMES = {**vars(builtins), **{name: getattr(typing, name) for name in ("Any", "Literal", "Optional", "Union")}}


def method_source_hints(method: str) -> dict[str, Any] | None:
    """Map the fields of a method's configuration to their type hints, or to OPEN.

    None for a method of another package, and where a class is not where it is expected.
    """
    if method == "full":
        return {}
    return _hints(*_CLASSES[method]) if method in _CLASSES else None


def training_source_hints() -> dict[str, Any] | None:
    """Map the fields of `transformers.TrainingArguments` to their type hints, or to OPEN; None as above."""
    return _hints(*_TRAINING)


def _hints(module: str, name: str) -> dict[str, Any] | None:
    try:
        return {field: _evaluated(text) for field, text in _fields(module, name).items()}
    except (ImportError, OSError, SyntaxError):
        return None


def _fields(module: str, name: str) -> dict[str, str]:
    """Return the annotations of the fields that the class and its bases declare, as text."""
    tree = _tree(module)
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if found is None:
        return _fields(_imported_from(tree, module, name), name)
    fields: dict[str, str] = {}
    for base in found.bases:
        fields |= _fields(module, ast.unparse(base))
    for node in found.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        text = ast.unparse(node.annotation)
        if text.startswith("ClassVar") or _is_left_out(node.value):
            fields.pop(node.target.id, None)
        else:
            fields[node.target.id] = text
    return fields


def _is_left_out(value: ast.expr | None) -> bool:
    """Return whether a field says `init=False`, so that nobody can give it."""
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return any(word.arg == "init" and ast.unparse(word.value) == "False" for word in keywords)


def _imported_from(tree: ast.Module, module: str, name: str) -> str:
    """Return the module that `name` is imported from."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or name not in (each.asname or each.name for each in node.names):
            continue
        package = module if _path(module).name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(node.level - 1):
            package = package.rpartition(".")[0]
        return ".".join(part for part in (package if node.level else "", node.module or "") if part)
    raise ImportError(f"{name} is not in {module}")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


@cache
def _path(module: str) -> Path:
    """Return the file of a module, without importing the packages around it."""
    package, *parts = module.split(".")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(package)
    place = Path(spec.origin).parent.joinpath(*parts)
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _evaluated(annotation: str) -> Any:
    try:
        return eval(annotation, dict(_NAMES))  # noqa: S307 - the text of an installed package
    except (NameError, TypeError):
        return OPEN
