"""Checks of an `adapter_config.json` from elsewhere before PEFT allocates what it says and matches its patterns."""

from __future__ import annotations

import re
import re._parser as parser  # type: ignore[import-not-found]  # the module of re that parses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bayeslora.errors import BayesLoraError

_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")
_REPEATS = (parser.MAX_REPEAT, parser.MIN_REPEAT)
_MANY = 32
"""Times from which a repetition inside another one counts as unbounded."""
_MOST_REPEATS = 4


def check_config(folder: Path, config: Mapping[str, Any], weights: Path) -> None:
    """Raise BayesLoraError for ranks that the weights do not have, and for patterns that could match for hours.

    `config` is the content of the adapter's `adapter_config.json`, and `weights` its safetensors file.
    """
    with safe_open(weights, framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]
        # A packed file is one flat tensor of bytes, with an index that is checked by itself.
        largest = max((max(shape, default=0) for shape in shapes), default=0)
    ranks = config.get("rank_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(config.get("alpha_pattern") or {}, dict):
        raise _wrong(folder, "a pattern of ranks or alphas that is no mapping")
    for name, rank in [("r", config.get("r")), *ranks.items()]:
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
            raise _wrong(folder, f"the rank {str(rank)[:40]} for {name[:60]!r}")
        if rank is not None and name != "r" and rank > largest:
            raise _wrong(folder, f"the rank {rank} for {name[:60]!r}, where no weight has more than {largest} rows")
    for pattern in _patterns(config):
        if _is_slow(pattern):
            raise _wrong(folder, f"the pattern {pattern[:60]!r}, which could take hours to match")


def _wrong(folder: Path, what: str) -> BayesLoraError:
    return BayesLoraError(
        f"{folder / 'adapter_config.json'} has {what}, but must be as the adapter was saved: restore it from a copy"
    )


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    for name in _PATTERNS:
        if isinstance(config.get(name), str):
            yield config[name]
    for name in ("rank_pattern", "alpha_pattern"):
        yield from config.get(name) or {}


def _is_slow(pattern: str) -> bool:
    """Return whether a regular expression repeats a repetition or a choice, or has many repetitions in a row."""
    try:
        parsed = parser.parse(pattern)
    except (re.error, RecursionError, OverflowError):
        return False  # PEFT refuses it
    return _repeats(parsed, inside=False) > _MOST_REPEATS


def _repeats(items: Iterable[Any], inside: bool) -> float:
    """Return the number of unbounded repetitions; infinity for one inside another, or a choice inside one."""
    total = 0.0
    for operation, argument in items:
        if operation in _REPEATS:
            _, most, body = argument
            many = most >= _MANY
            if many and inside:
                return float("inf")
            total += many + _repeats(body, inside or many)
        elif operation is parser.BRANCH:
            total += float("inf") if inside else max(_repeats(branch, inside) for branch in argument[1])
        elif operation is parser.SUBPATTERN:
            total += _repeats(argument[-1], inside)
        elif operation in (parser.ASSERT, parser.ASSERT_NOT):
            total += _repeats(argument[1], inside)
    return total
