"""Spans in tags, against seqeval on random sequences."""

from __future__ import annotations

import random

import pytest

from bayeslora.data.spans import in_iobes, marks_spans, spans_of


def test_spans_are_those_of_the_usual_examples() -> None:
    assert spans_of(["B-PER", "I-PER", "O", "B-LOC"]) == [("PER", 0, 2), ("LOC", 3, 4)]
    assert spans_of(["I-PER", "I-LOC", "I-LOC"]) == [("PER", 0, 1), ("LOC", 1, 3)]
    assert spans_of(["B-a-b", "L-a-b", "U-a-b"]) == [("a-b", 0, 2), ("a-b", 2, 3)]
    assert spans_of(["O", "O"]) == spans_of([]) == []


def test_spans_are_those_of_seqeval() -> None:
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    names = ["O", *(f"{prefix}-{kind}" for prefix in "BIESLU" for kind in ("X", "Y"))]
    generator = random.Random(0)
    for _ in range(2000):
        tags = [generator.choice(names) for _ in range(generator.randint(1, 9))]
        known = [(kind, start, last + 1) for kind, start, last in get_entities([in_iobes(tag) for tag in tags])]
        assert spans_of(tags) == known, tags


@pytest.mark.parametrize(
    ("names", "marks"),
    [
        (["B-X", "I-X", "O"], True),
        (["I-X", "O"], True),
        (["O"], False),
        (["NOUN", "VERB"], False),
        (["B-X", "O", "NOUN"], False),
        (["B-", "O"], False),
        (["0", "1"], False),
    ],
)
def test_tags_of_parts_of_speech_mark_no_spans(names: list[str], marks: bool) -> None:
    assert marks_spans(names) is marks
