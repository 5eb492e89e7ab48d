"""Tokenize sentences word by word, so that each word has a token to be tagged at.

A word is tagged at its first token; the others have the label -100, which the loss ignores. A sentence that is too
long goes on in further sequences, so that no word is left without a tag.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from bayeslora.data.chat import LABELS
from bayeslora.data.completions import IGNORED
from bayeslora.data.encode import Collate, allowed_length, pad_id
from bayeslora.data.tagged import OFFSETS
from bayeslora.data.tasks import LABEL
from bayeslora.errors import BayesLoraError, one_line
from bayeslora.vocabulary import STARTS

ROW = "row"
"""Column of the number of the sentence that a sequence is from."""
TEXTS = "words"
"""Column of the words of a sequence."""
_AT_ONCE = 1000
_STAND_IN = "?"


def encode_words(split: Dataset, column: str, tokenizer: Any, max_length: int | None = None) -> Dataset:
    """Tokenize sentences into the tokenizer's outputs with `starts`, `row` and `words`, in order, without padding.

    If the split has tags, `labels` holds a word's tag id at its first token and -100 elsewhere. A column `offsets` is
    kept. A word that the tokenizer drops, such as an invisible character, becomes the unknown token.

    Args:
        split: sentences; the words are in `column`, the ids of their tags in `label`.
        column: name of the column with the words.
        tokenizer: the model's tokenizer, which must be a fast one.
        max_length: maximum length of a sequence in tokens; by default 128, or the model's maximum if that is less.

    Raises:
        BayesLoraError: the tokenizer is slow, or `max_length` leaves no room or exceeds the model's maximum.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise BayesLoraError(
            f"{type(tokenizer).__name__} is a slow tokenizer, but words are told from tokens by a fast one: "
            "use a model with tokenizer.json"
        )
    length = allowed_length(tokenizer, max_length)
    found: dict[str, list[Any]] = {}
    for start in range(0, len(split), _AT_ONCE):
        rows = split[start : start + _AT_ONCE]
        for number, sequence in _sequences(rows[column], tokenizer, length):
            words, places = sequence.pop("numbers"), sequence[STARTS]
            sequence |= {ROW: start + number, TEXTS: [rows[column][number][word] for word in words]}
            if LABEL in rows:
                labels = [IGNORED] * len(sequence["input_ids"])
                for place, word in zip(places, words, strict=True):
                    labels[place] = rows[LABEL][number][word]
                sequence[LABELS] = labels
            if OFFSETS in rows:
                sequence[OFFSETS] = [rows[OFFSETS][number][word] for word in words] if rows[OFFSETS][number] else []
            for name, value in sequence.items():
                found.setdefault(name, []).append(value)
    return Dataset.from_dict(found)


def has_words(dataset: Dataset) -> bool:
    """Return whether rows are sequences of words from `encode_words`."""
    return STARTS in dataset.column_names


def word_rows(dataset: Dataset) -> NDArray[np.int64]:
    """Return the sentence number (n,) of each of n words."""
    return np.repeat(np.asarray(dataset[ROW], dtype=np.int64), [len(places) for places in dataset[STARTS]])


def word_labels(dataset: Dataset) -> NDArray[np.int64]:
    """Return (n,) the id of the tag of each word."""
    pairs = zip(dataset[LABELS], dataset[STARTS], strict=True)
    return np.asarray([labels[place] for labels, places in pairs for place in places], dtype=np.int64)


def word_collator(tokenizer: Any) -> Collate:
    """Return a collator that pads rows on the right, and `starts` (B, W) with 0."""
    fill = {"input_ids": pad_id(tokenizer), STARTS: 0}

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name == STARTS or name in tokenizer.model_input_names]
        batch = {}
        for name in names:
            width = max(len(row[name]) for row in rows)
            batch[name] = torch.tensor([row[name] + [fill.get(name, 0)] * (width - len(row[name])) for row in rows])
        return batch

    return collate


def word_order(dataset: Dataset, order: NDArray[np.int64], batch_size: int) -> NDArray[np.int64]:
    """Return the places, among all that padded batches have for words, of the words in the order of the data set.

    The batches have the sequences in this order; each sequence has as many places as the one with most words needs.
    """
    counts = np.asarray([len(places) for places in dataset[STARTS]])
    firsts = np.zeros(len(order), dtype=np.int64)
    taken = 0
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        width = int(counts[rows].max())
        firsts[rows] = taken + width * np.arange(len(rows))
        taken += width * len(rows)
    return np.concatenate([first + np.arange(count) for first, count in zip(firsts, counts, strict=True)])


def _sequences(sentences: list[list[str]], tokenizer: Any, length: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield for each sequence the number of its sentence, its tokens, and the places and numbers of its words."""
    found, missing = _split(sentences, tokenizer, length)
    if missing:
        stand_in = tokenizer.unk_token or _STAND_IN
        shown = [
            [stand_in if (row, word) in missing else text for word, text in enumerate(words)]
            for row, words in enumerate(sentences)
        ]
        found, missing = _split(shown, tokenizer, length)
    if missing:
        row, word = min(missing)
        raise BayesLoraError(
            f"the tokenizer makes no token of {sentences[row][word]!r}, but a word needs one to be tagged at: drop it"
        )
    yield from found


def _split(
    sentences: list[list[str]], tokenizer: Any, length: int
) -> tuple[list[tuple[int, dict[str, Any]]], set[tuple[int, int]]]:
    """Return the sequences, and the words (row, number) that none of them has a token of."""
    try:
        encoded = tokenizer(
            sentences, is_split_into_words=True, truncation=True, max_length=length, return_overflowing_tokens=True
        )
    except (AssertionError, ValueError, TypeError) as error:
        raise BayesLoraError(
            f"the tokenizer does not take words ({one_line(error)}), but needs to: load it with add_prefix_space=True"
        ) from error
    names = [name for name in encoded if name in tokenizer.model_input_names]
    last = [-1] * len(sentences)
    missing = {(row, word) for row, words in enumerate(sentences) for word in range(len(words))}
    found = []
    for number, row in enumerate(encoded["overflow_to_sample_mapping"]):
        starts, numbers = [], []
        for place, word in enumerate(encoded.word_ids(number)):
            if word is not None and word > last[row]:  # not a further token of a word
                last[row] = word
                missing.discard((row, word))
                starts.append(place)
                numbers.append(word)
        if starts:
            sequence = {name: encoded[name][number] for name in names}
            found.append((row, {**sequence, STARTS: starts, "numbers": numbers}))
    return found, missing
