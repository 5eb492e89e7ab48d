"""Prompts and completions: what the loss counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq

from bayeslora.data import prompt_masked
from bayeslora.errors import BayesLoraError
from tests.conftest import build_tiny_llama, build_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tiny_tokenizer(causal=True)


def test_only_the_completion_and_its_end_are_labelled(tokenizer: Any) -> None:
    row = prompt_masked("who sat on the mat?", " the cat", tokenizer)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == [*"who sat on the mat ? the cat".split(), "[SEP]"]
    assert row["labels"] == [-100] * 6 + row["input_ids"][6:]
    assert row["attention_mask"] == [1] * 9


def test_what_the_tokenizer_puts_first_stays_first_and_is_not_learned(tiny_tokenizer: Any) -> None:
    row = prompt_masked("good " * 30, "bad", tiny_tokenizer, max_length=6)
    assert tiny_tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", *["good"] * 4, "bad"]
    assert row["labels"][:5] == [-100] * 5 and row["labels"][5] != -100
    exact = prompt_masked("good " * 30, "bad", tiny_tokenizer, max_length=2)
    assert tiny_tokenizer.convert_ids_to_tokens(exact["input_ids"]) == ["[CLS]", "bad"]


def test_a_completion_is_neither_cut_nor_empty(tokenizer: Any) -> None:
    with pytest.raises(BayesLoraError, match="needs 3 tokens, but max_length is 2"):
        prompt_masked("who", "the cat", tokenizer, max_length=2)
    with pytest.raises(BayesLoraError, match="the completion is empty"):
        prompt_masked("who", "", tokenizer)


def test_the_models_loss_is_the_mean_over_the_completions_tokens(tokenizer: Any) -> None:
    model = build_tiny_llama()
    rows = [prompt_masked("who sat?", " the cat", tokenizer), prompt_masked("", " no", tokenizer)]
    batch = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)(rows)
    loss = model(**batch).loss
    terms = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        terms += [
            -logits[place - 1, token] for place, token in enumerate(row["labels"]) if token != -100 and place > 0
        ]
    torch.testing.assert_close(loss, torch.stack(terms).mean(), atol=1e-5, rtol=0)
