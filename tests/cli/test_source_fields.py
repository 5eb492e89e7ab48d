"""What the source says of a configuration's fields is what the imported class says."""

from __future__ import annotations

from typing import Any

import pytest

from bayeslora.cli.arguments import (
    _METHOD_FIELDS_SET_HERE,
    _TRAINING_FIELDS_SET_HERE,
    method_field_hints,
    training_field_hints,
)
from bayeslora.cli.registry import method_names
from bayeslora.cli.source_fields import OPEN, method_source_hints, training_source_hints


def agree(by_source: dict[str, Any], expected: dict[str, Any]) -> float:
    """Check names and every hint that is not open; returns the share of those."""
    assert by_source.keys() == expected.keys()
    told = {name: hint for name, hint in by_source.items() if hint is not OPEN}
    assert told == {name: expected[name] for name in told}
    return len(told) / len(expected) if expected else 1.0


@pytest.mark.parametrize("method", method_names())
def test_fields_of_methods(method: str) -> None:
    by_source = method_source_hints(method)
    assert by_source is not None
    settable = {name: hint for name, hint in by_source.items() if name not in _METHOD_FIELDS_SET_HERE}
    assert agree(settable, method_field_hints(method)) > 0.7


def test_fields_of_training_arguments() -> None:
    by_source = training_source_hints()
    assert by_source is not None
    settable = {name: hint for name, hint in by_source.items() if name not in _TRAINING_FIELDS_SET_HERE}
    assert agree(settable, training_field_hints()) > 0.9


def test_a_method_from_elsewhere_is_not_known_by_its_source() -> None:
    assert method_source_hints("somebody's") is None
