"""Point upstream's parametrised tests at other cases without touching their files.

`pytest.mark.parametrize` keeps the list object it was given, so a module-level list can be refilled in place before
collection. Where upstream wrote a tuple or a literal, the mark itself is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def replace_parameters(test_class: type, test: str, argument_names: str, values: Iterable[Any]) -> None:
    """Give one test of `test_class` other parameters; an unknown test or argument raises, it is never ignored."""
    function = vars(test_class)[test]
    marks = list(function.pytestmark)
    for position, mark in enumerate(marks):
        if mark.name == "parametrize" and mark.args[0] == argument_names:
            marks[position] = pytest.mark.parametrize(argument_names, list(values)).mark
            function.pytestmark = marks
            return
    raise LookupError(f"{test_class.__name__}.{test} is not parametrised over {argument_names!r} in this version")


def replace_everywhere(test_class: type, argument_names: str, values: Iterable[Any]) -> int:
    """The same for every test of the class that takes these arguments; returns how many there were."""
    values = list(values)
    changed = 0
    for name, member in list(vars(test_class).items()):
        marks = getattr(member, "pytestmark", [])
        if any(mark.name == "parametrize" and mark.args[0] == argument_names for mark in marks):
            replace_parameters(test_class, name, argument_names, values)
            changed += 1
    if not changed:
        raise LookupError(f"no test of {test_class.__name__} is parametrised over {argument_names!r} in this version")
    return changed
