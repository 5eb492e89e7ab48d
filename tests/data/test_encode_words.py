"""Sentences as tokens: the places and labels of words, long sentences, and words that a tokenizer drops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bayeslora.data.encode_words import encode_words, word_collator, word_labels, word_order, word_rows
from bayeslora.errors import BayesLoraError
from tests.conftest import VOCABULARY

WORDS = [["the", "dog-cat", "ran"], ["a", "film"]]


def split(words: list[list[str]] = WORDS) -> Dataset:
    return Dataset.from_dict({"tokens": words, "label": [list(range(len(row))) for row in words]})


def test_a_word_is_labelled_at_its_first_token(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = encode_words(split(), "tokens", tiny_tokenizer)
    assert [VOCABULARY[token] for token in first["input_ids"]] == ["[CLS]", "the", "dog", "-", "cat", "ran", "[SEP]"]
    assert first["labels"] == [-100, 0, 1, -100, -100, 2, -100] and first["starts"] == [1, 2, 5]
    assert (second["row"], second["words"], second["labels"]) == (1, ["a", "film"], [-100, 0, 1, -100])


def test_no_word_of_a_long_sentence_is_lost(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    words = [["the", "dog-cat-ran"] * 9, ["a-a-a-a-a-a-a-a-a-a", "film"], ["the"]]
    data = encode_words(split(words), "tokens", tiny_tokenizer, max_length=8)
    assert max(map(len, data["input_ids"])) == 8 and len(data) > 5
    assert [word for row in data["words"] for word in row] == [word for row in words for word in row]
    assert word_rows(data).tolist() == [0] * 18 + [1] * 2 + [2]
    assert word_labels(data).tolist() == [*range(18), 0, 1, 0]
    for row in data:
        shown = [VOCABULARY[row["input_ids"][place]] for place in row["starts"]]
        assert shown == [word.split("-")[0] for word in row["words"]], "places are those of the words' first tokens"


def test_a_word_that_the_tokenizer_drops_is_unknown_to_it() -> None:
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("\u200b", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[UNK]")
    data = encode_words(split([["a", "\u200b", "b"]]), "tokens", tokenizer)
    assert (data[0]["input_ids"], data[0]["words"]) == ([1, 0, 2], ["a", "\u200b", "b"])


def test_the_order_of_batches_is_undone(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    words = [["the"] * count for count in (3, 1, 4, 1, 5, 2)]
    data = encode_words(split(words), "tokens", tiny_tokenizer)
    order = np.asarray([4, 2, 0, 5, 1, 3])
    collate = word_collator(tiny_tokenizer)
    seen: list[tuple[int, int]] = []
    for start in range(0, 6, 4):
        rows = order[start : start + 4]
        batch = collate([data[int(row)] for row in rows])
        assert batch["starts"].shape == (len(rows), max(len(words[row]) for row in rows))
        seen += [(int(row), place) for row in rows for place in range(batch["starts"].shape[1])]
    found = [seen[place] for place in word_order(data, order, 4)]
    assert found == [(row, place) for row in range(6) for place in range(len(words[row]))]


def test_a_tokenizer_of_bytes_reads_a_blank_before_each_word(tmp_path: Any) -> None:
    from bayeslora.runs.base import load_tokenizer

    core = Tokenizer(
        models.BPE(
            {"a": 0, "b": 1, "\u0120": 2, "\u0120a": 3, "\u0120b": 4, "<pad>": 5}, [("\u0120", "a"), ("\u0120", "b")]
        )
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "pad_token": "<pad>", "model_max_length": 16}', encoding="utf-8"
    )
    tokenizer = load_tokenizer(str(tmp_path), "bytes", of_words=True)
    data = encode_words(split([["a", "b"]]), "tokens", tokenizer)
    assert data[0]["input_ids"] == [3, 4]
    with pytest.raises(BayesLoraError, match="slow tokenizer"):
        encode_words(split(), "tokens", object())
