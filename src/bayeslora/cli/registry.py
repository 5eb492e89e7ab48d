"""Methods that `--method` accepts: the library's and the baselines they are compared with."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from bayeslora.errors import BayesLoraError, close_matches
from bayeslora.vocabulary import METHOD_ENTRY_POINTS

if TYPE_CHECKING:
    from peft import PeftConfig

# The names alone, so that a misspelt one is reported without importing torch. `full` trains every weight.
_METHODS = ("blora", "melora", "blob", "bayes_adalora", "dylora")
_BASELINES = ("lora", "full")


def method_names() -> list[str]:
    """Return all names that `--method` accepts, including those that other packages register or offer."""
    registry = sys.modules.get("bayeslora.methods.registry")
    known = _METHODS if registry is None else registry.METHODS
    offered = (entry.name for entry in entry_points(group=METHOD_ENTRY_POINTS))
    return [*dict.fromkeys([*known, *offered]), *_BASELINES]


def check_method(name: str) -> None:
    """Raise BayesLoraError for an unknown method."""
    names = method_names()
    if name not in names:
        raise BayesLoraError(f"unknown --method {name!r}{close_matches(name, names)}: choose from {', '.join(names)}")


def method_config_class(name: str) -> type[PeftConfig] | None:
    """Return the PEFT config class of a method; None for full fine-tuning."""
    check_method(name)
    if name == "full":
        return None
    from peft import LoraConfig

    from bayeslora.methods.registry import find_method

    return LoraConfig if name == "lora" else find_method(name)
