"""Predictions for the words of sentences: tags, spans, and their uncertainty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from bayeslora.data.encode_words import ROW, TEXTS
from bayeslora.data.spans import marks_spans, spans_of
from bayeslora.data.tagged import OFFSETS
from bayeslora.errors import counted
from bayeslora.prediction import Prediction


@dataclass(frozen=True)
class TaggedWord:
    """A word with its tag; entropies are in nats.

    Attributes:
        word: the word.
        tag: name of the most probable tag.
        confidence: probability of `tag`.
        entropy: entropy of the distribution over all tags.
        expected_entropy: aleatoric part of `entropy`.
        mutual_information: epistemic part of `entropy`; 0 without samples.
        characters: start and end of the word in the input text; None if the input was a list of words.
    """

    word: str
    tag: str
    confidence: float
    entropy: float
    expected_entropy: float
    mutual_information: float
    characters: list[int] | None = None


@dataclass(frozen=True)
class Span:
    """Consecutive words that form one entity.

    Attributes:
        tag: kind of the span, such as `PER`.
        start, end: word numbers, from 0; the span does not include word `end`.
        text: words of the span, joined by spaces.
        confidence: smallest `confidence` of the words in the span.
        characters: start and end of the span in the input text; None if the input was a list of words.
    """

    tag: str
    start: int
    end: int
    text: str
    confidence: float
    characters: list[int] | None = None


@dataclass(frozen=True)
class Tagging:
    """The tags of a sentence.

    Attributes:
        words: tagged words, in the order of the sentence.
        spans: spans, in the order of the sentence; empty if the tags do not mark spans.
        probabilities: (words, C) probability of each tag, in the order of the run's `labels`.
    """

    words: list[TaggedWord]
    spans: list[Span]
    probabilities: Tensor

    @property
    def tags(self) -> list[str]:
        """Tag of each word."""
        return [word.tag for word in self.words]

    def to_dict(self) -> dict[str, Any]:
        """Return `words` and `spans` as `bayeslora predict` writes them, without `characters` that are None."""
        found = {"words": map(asdict, self.words), "spans": map(asdict, self.spans)}
        return {
            name: [{key: value for key, value in each.items() if value is not None} for each in parts]
            for name, parts in found.items()
        }


class Taggings(Sequence[Tagging]):
    """The tags of n sentences, in the order of the input: a sequence of `Tagging`.

    Args:
        prediction: prediction for the words of all sentences, one after the other.
        names: names of the tags by id.
        data: the sentences, as `encode_words` returns them.

    Attributes:
        prediction: the underlying tensors, with a row for each word.
    """

    def __init__(self, prediction: Prediction, names: Sequence[str], data: Dataset) -> None:
        self.prediction = prediction
        self._names = list(names)
        self._has_spans = marks_spans(self._names)
        self._words: list[list[str]] = []
        self._places: list[list[list[int]]] = []
        last = None
        offsets = data[OFFSETS] if OFFSETS in data.column_names else [[]] * len(data)
        for row, words, places in zip(data[ROW], data[TEXTS], offsets, strict=True):
            if row != last:  # a long sentence has several sequences
                self._words.append([])
                self._places.append([])
            last = row
            self._words[-1] += words
            self._places[-1] += places or []
        self._firsts = np.cumsum([0, *map(len, self._words)])

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        number = range(len(self))[row]
        part = slice(int(self._firsts[number]), int(self._firsts[number + 1]))
        found = self.prediction
        columns = (found.entropy, found.expected_entropy, found.mutual_information)
        p = found.probabilities[part]
        tags = [self._names[tag] for tag in found.labels[part].tolist()]
        places = self._places[number] or [None] * len(tags)
        numbers = (p.amax(dim=1), *(values[part] for values in columns))
        words = [
            TaggedWord(*each)
            for each in zip(self._words[number], tags, *(values.tolist() for values in numbers), places, strict=True)
        ]
        return Tagging(words, self._spans(words), p)

    def __repr__(self) -> str:
        return f"Taggings({counted(len(self), 'row')} of {len(self.prediction)} words)"

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield what `bayeslora predict` writes for each sentence."""
        return (row.to_dict() for row in self)

    def _spans(self, words: list[TaggedWord]) -> list[Span]:
        if not self._has_spans:
            return []
        found = []
        for tag, start, end in spans_of([word.tag for word in words]):
            inside = words[start:end]
            first, last = inside[0].characters, inside[-1].characters
            characters = [first[0], last[1]] if first and last else None
            text = " ".join(word.word for word in inside)
            found.append(Span(tag, start, end, text, min(word.confidence for word in inside), characters))
        return found
