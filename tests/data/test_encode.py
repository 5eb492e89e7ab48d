"""Very long texts: the tokens of the whole, without tokenizing all of it."""

from __future__ import annotations

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


def test_a_tokenizer_that_keeps_the_end_gets_the_whole(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "truncation_side", "left")
    text = "good " * 5000 + "the film"
    found = encode_texts(Dataset.from_dict({"text": [text]}), ["text"], tiny_tokenizer, LENGTH)
    assert found[0]["input_ids"] == tiny_tokenizer(text, truncation=True, max_length=LENGTH)["input_ids"]
