"""Spans in the tags of words: `B-PER I-PER O` marks a person of two words.

A tag is `O`, outside of all spans, or has a prefix and the kind of the span: B begins it, I continues it, and in some
schemes E (or L) ends it and S (or U) is one of a single word. Tags are read as by the script conlleval of the shared
task CoNLL-2000: what cannot continue a span begins one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

_OUTSIDE = "O"
_ALIKE = {"L": "E", "U": "S"}
_BEGINS, _ENDS = ("B", "S"), ("E", "S")


class SpanPlace(NamedTuple):
    """A span: its kind, and its words from `start` up to but not including `end`."""

    tag: str
    start: int
    end: int


def marks_spans(names: Sequence[str]) -> bool:
    """Return whether tags of these names mark spans: some begin with `B-`, `I-`, … and all others are `O`."""
    inside = [name for name in names if name != _OUTSIDE]
    return bool(inside) and all(name[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") and name[2:] for name in inside)


def in_iobes(tag: str) -> str:
    """Return a tag with E for L and S for U, as in the scheme IOBES."""
    return _ALIKE.get(tag[0], tag[0]) + tag[1:] if tag[1:2] == "-" else tag


def spans_of(tags: Sequence[str]) -> list[SpanPlace]:
    """Return the spans of a sentence, in their order."""
    found: list[SpanPlace] = []
    start, before, kind = 0, _OUTSIDE, ""
    for place, tag in enumerate([*map(in_iobes, tags), _OUTSIDE]):
        prefix, own = tag[0], tag[2:]
        continues = before not in (_OUTSIDE, *_ENDS) and prefix not in (_OUTSIDE, *_BEGINS) and own == kind
        if not continues:
            if before != _OUTSIDE:
                found.append(SpanPlace(kind, start, place))
            start = place
        before, kind = prefix, own
    return found
