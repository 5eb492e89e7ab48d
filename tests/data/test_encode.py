"""Very long texts: the tokens of the whole, without tokenizing all of it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from datasets import Dataset

from bayeslora.data.encode import encode_texts

LENGTH = 16


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: Any, *others: Any, **options: Any) -> Any:
        self.characters += len(texts) if isinstance(texts, str) else sum(map(len, texts))
        return self.tokenizer(texts, *others, **options)


@pytest.mark.parametrize(
    ("text", "is_cut"),
    [
        ("the film was good " * 5000, True),
        ("the film\n" + "good" * 20_000, False),  # one word, which decides the second token
        (" " * 50_000 + "the film was good", False),  # all that counts is at the end
        ("the film was good", False),
        ("", False),
    ],
    ids=["many words", "one long word", "blanks first", "short", "empty"],
)
def test_a_long_text_has_the_tokens_of_the_whole(tiny_tokenizer: Any, text: str, is_cut: bool) -> None:
    counting = Counting(tiny_tokenizer)
    found = encode_texts(Dataset.from_dict({"text": [text]}), ["text"], counting, LENGTH)
    assert found[0]["input_ids"] == tiny_tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"]
    assert (counting.characters < len(text) / 4) == is_cut


@pytest.mark.parametrize(
    ("text", "is_cut"),
    [("good " * 5000 + "the film", True), ("good" * 20_000 + " the film", False), ("the film" + " " * 50_000, False)],
    ids=["many words", "one long word", "blanks last"],
)
def test_a_tokenizer_that_keeps_the_end_gets_the_end(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, text: str, is_cut: bool
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "truncation_side", "left")
    counting = Counting(tiny_tokenizer)
    found = encode_texts(Dataset.from_dict({"text": [text]}), ["text"], counting, LENGTH)
    assert found[0]["input_ids"] == tiny_tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"]
    assert (counting.characters < len(text) / 4) == is_cut


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_a_text_of_megabytes_without_blanks_is_bounded(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, side: str, columns: list[str]
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "truncation_side", side)
    monkeypatch.setattr(sys.modules["bayeslora.data.encode"], "MOST_CHARACTERS", 2**14)
    counting, words = Counting(tiny_tokenizer), ["the", "film"]
    text = "good" * 50_000
    rows = {"text": [text, *words], "other": ["a film", *words]}
    with pytest.warns(UserWarning, match="a text has 200,000 characters, of which 16,384 give too few tokens to fill"):
        found = encode_texts(Dataset.from_dict(rows), columns, counting, LENGTH)
    whole = tiny_tokenizer(*(rows[name] for name in columns), truncation=True, max_length=LENGTH)
    assert found["input_ids"] == whole["input_ids"]
    assert counting.characters < 4 * 2**14
