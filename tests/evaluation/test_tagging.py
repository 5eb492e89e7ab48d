"""Scores of the tags of words: known answers, and predictions that do not depend on how sentences are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import BertForTokenClassification, LlamaForTokenClassification

import bayeslora
from bayeslora.data.encode_words import encode_words
from bayeslora.data.tasks import Task
from bayeslora.evaluation import TaggingEvaluation, compute_metrics_for, evaluate, predict_dataset, tagging_scores
from bayeslora.evaluation.tagging import constant_spans, span_scores
from bayeslora.prediction import word_logits
from tests.conftest import build_tiny_bert, build_tiny_llama, build_tiny_tokenizer

NAMES = ["B-LOC", "B-PER", "I-PER", "O"]
WORDS = [["the", "dog-cat", "ran"], ["a"], ["film", "was", "very-good", "red", "no"], ["cat"] * 9]
TAGS = [[0, 1, 3], [3], [1, 2, 3, 0, 3], [3] * 9]


def task() -> Task:
    split = Dataset.from_dict({"tokens": WORDS, "label": TAGS})
    return Task("t", "token_classification", ("tokens",), "label", NAMES, "span_f1", {"validation": split})


def test_a_span_counts_if_its_kind_and_both_ends_are_right() -> None:
    pytest.importorskip("seqeval")
    right = [1, 2, 3, 0, 1, 2, 3, 3]  # PER(0, 2), LOC(3, 4) | PER(0, 2)
    said = [1, 2, 3, 0, 1, 3, 3, 0]  # PER(0, 2), LOC(3, 4) | PER(0, 1), LOC(3, 4)
    rows = [0, 0, 0, 0, 1, 1, 1, 1]
    scores, by_kind = span_scores(right, said, rows, NAMES)
    assert scores == pytest.approx({"span_f1": 4 / 7, "span_precision": 2 / 4, "span_recall": 2 / 3})
    assert by_kind["PER"] == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5, "spans": 2})
    assert by_kind["LOC"] == pytest.approx({"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "spans": 1})
    # A span does not go on in the next sentence.
    assert span_scores([1, 2], [1, 2], [0, 1], NAMES)[1]["PER"]["spans"] == 2
    assert constant_spans(right, rows, NAMES)["span_f1"] == 0
    assert span_scores([3, 3], [3, 3], [0, 0], NAMES) == (
        {"span_f1": 0.0, "span_precision": 0.0, "span_recall": 0.0},
        {},
    )


def test_tags_without_spans_have_the_scores_of_classes() -> None:
    scores = tagging_scores(np.eye(2)[[0, 1, 1]], [0, 1, 0], [0, 0, 1], ["NOUN", "VERB"])
    assert next(iter(scores)) == "accuracy" and scores["accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_words_are_predicted_alike_in_every_batch(kind: str) -> None:
    decodes = kind == "decoder"
    config = (build_tiny_llama() if decodes else build_tiny_bert()).config
    config.num_labels = 4
    base = (LlamaForTokenClassification if decodes else BertForTokenClassification)(config)
    targets = ["q_proj", "v_proj"] if decodes else ["query", "value"]
    options = {"target_modules": targets, "task_type": "TOKEN_CLS", "init_weights": False}
    model = get_peft_model(base, bayeslora.MeLoraConfig(**options)).eval()
    tokenizer = build_tiny_tokenizer(causal=decodes)
    data = encode_words(task().eval_split, "tokens", tokenizer, max_length=8)  # some sentences have two sequences
    assert len(data) > len(WORDS)
    for samples in (0, 3):
        whole = predict_dataset(model, data, tokenizer, 8, samples, seed=1)
        assert len(whole) == sum(map(len, WORDS))
        single = predict_dataset(model, data, tokenizer, 1, samples, seed=1)
        assert torch.allclose(whole.probabilities, single.probabilities, atol=1e-6)
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0, row["starts"]] for row in data]
    expected = torch.cat(rows).double().softmax(dim=-1)
    mean = predict_dataset(model, data, tokenizer, 3)
    assert torch.allclose(mean.probabilities, expected, atol=1e-5)
    if decodes:
        return
    found = evaluate(model, data, task(), tokenizer)
    assert isinstance(found, TaggingEvaluation) and (found.rows, found.words) == (4, 18)
    assert found.row.tolist() == [number for number, words in enumerate(WORDS) for _ in words]
    assert (
        found.labels.tolist() == [tag for tags in TAGS for tag in tags] and np.sum(found.findings["confusion"]) == 18
    )


def test_the_trainer_gets_the_scores_of_the_labelled_tokens() -> None:
    labels = np.array([[-100, 1, 2, -100], [-100, 3, -100, -100]])
    logits = np.zeros((2, 4, 4))
    logits[0, 1, 1] = logits[0, 2, 2] = logits[1, 1, 0] = 5.0
    given = type("Evaluated", (), {"predictions": logits, "label_ids": labels})
    scores = compute_metrics_for(task())(given)
    assert scores["accuracy"] == pytest.approx(2 / 3)
    assert scores["span_precision"] == pytest.approx(1 / 2) and scores["span_recall"] == 1


def test_what_is_no_token_classifier_is_told() -> None:
    batch = {"input_ids": torch.tensor([[2, 5, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(bayeslora.BayesLoraError, match="but starts are needed"):
        bayeslora.predict(build_tiny_bert(), batch, logits=word_logits)
    batch["starts"] = torch.tensor([[1]])
    with pytest.raises(bayeslora.BayesLoraError, match="load a token classifier"):
        bayeslora.predict(build_tiny_bert(), batch, logits=word_logits)
