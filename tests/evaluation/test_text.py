"""Scores of known answers: against a plain loop over tokens and draws, and on models whose scores are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import evaluate_text
from tests.conftest import build_tiny_gpt2, build_tiny_llama, build_tiny_tokenizer
from tests.prediction.models import merged_draw, noisy

SAMPLES, SEED = 3, 5


def rows() -> Dataset:
    """Rows of several lengths; two of them have two answers."""
    generator = torch.Generator().manual_seed(0)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for length in (5, 9, 3, 7, 9):
        ids = torch.randint(4, 60, (length,), generator=generator).tolist()
        learned = [place >= length - 2 or (length > 6 and place in (2, 3)) for place in range(length)]
        columns["input_ids"].append(ids)
        columns["attention_mask"].append([1] * length)
        columns["labels"].append([token if keep else -100 for token, keep in zip(ids, learned, strict=True)])
    return Dataset.from_dict(columns)


def causal(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    base: Any = build_tiny_llama() if family == "llama" else build_tiny_gpt2(embd_pdrop=0.0)
    for parameter in base.parameters():
        parameter.data.mul_(4)
    return noisy(base, ["q_proj", "v_proj"] if family == "llama" else ["c_attn"])


@torch.no_grad()
def by_hand(models: list[nn.Module], data: Dataset) -> list[list[float]]:
    """Row, log-probability, entropy, information, confidence and correctness of each token, one at a time."""
    found = []
    for number, row in enumerate(data):
        for place, label in enumerate(row["labels"]):
            if label == -100:
                continue
            prefix = torch.tensor([row["input_ids"][:place]])
            p = torch.stack([model(input_ids=prefix).logits[0, -1].double().softmax(-1) for model in models])
            mean = p.mean(0)
            entropy = torch.special.entr(mean).sum()
            information = entropy - torch.special.entr(p).sum(-1).mean()
            best = mean.argmax()
            scores = [mean[label].log(), entropy, information, mean[best], best == label]
            found.append([float(number), *map(float, scores)])
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("samples", [0, SAMPLES])
def test_each_token_is_scored_as_by_hand(family: str, samples: int) -> None:
    model, tokenizer = causal(family), build_tiny_tokenizer(causal=True)
    found = evaluate_text(model, rows(), tokenizer, batch_size=2, samples=samples, seed=SEED)
    merged = [merged_draw(model, SEED, draw) for draw in range(samples)] or [model]
    columns = [found.row, found.log_probability, found.entropy, found.mutual_information, found.confidence]
    ours = torch.stack([torch.as_tensor(column).double() for column in [*columns, found.correct]], dim=1)
    torch.testing.assert_close(ours, torch.tensor(by_hand(merged, rows())).double(), rtol=1e-3, atol=1e-4)
    scores = found.scores
    assert scores["nll"] == pytest.approx(-found.log_probability.mean())
    assert scores["perplexity"] == pytest.approx(math.exp(scores["nll"]))
    assert found.rows == 5 and found.samples == samples
    assert set(found.histograms()) == ({"entropy", "mutual_information"} if samples else {"entropy"})


def test_batches_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = causal(), build_tiny_tokenizer(causal=True)
    whole = evaluate_text(model, rows(), tokenizer, batch_size=5, samples=2)
    monkeypatch.setattr("bayeslora.evaluation.text._MAX_NUMBERS", 1)
    alone = evaluate_text(model, rows(), tokenizer, batch_size=5, samples=2)
    assert whole.scores == pytest.approx(alone.scores, rel=1e-4)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model: Any = build_tiny_llama()
    model.lm_head.weight.data.zero_()
    found = evaluate_text(model, rows(), build_tiny_tokenizer(causal=True))
    size = model.config.vocab_size
    assert found.scores["perplexity"] == pytest.approx(size, rel=1e-4)
    assert found.entropy == pytest.approx(math.log(size), rel=1e-4)


def test_outputs_that_are_not_finite_are_told() -> None:
    model: Any = build_tiny_llama()
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(BayesLoraError, match="of 16 of 16 tokens are not finite"):
        evaluate_text(model, rows(), build_tiny_tokenizer(causal=True))
