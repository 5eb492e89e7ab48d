"""Encoding and scoring a model on a split."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer

import bayeslora
from bayeslora.data import Task, encode, packaged_model
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import compute_metrics_for, evaluate, metrics, predict_dataset, uncertainties_of
from bayeslora.evaluation.scoring import metric_names
from bayeslora.prediction import as_predictor
from tests.conftest import build_tiny_bert, build_tiny_gpt2, build_tiny_tokenizer

TEXTS = ["good film", "", "a very very dull story with no ending", "bad", "the cat sat on the mat", "fine", "no joke"]
LABELS = [1, 0, 0, 0, 1, 1, 0]


def make_task(texts: list[str] = TEXTS, labels: list[Any] = LABELS, kind: Any = "classification") -> Task:
    split = Dataset.from_dict({"text": texts, "label": labels})
    splits = {"train": split, "validation": split, "ood": split.remove_columns("label").add_column("x", texts)}
    metric, names = ("accuracy", ["bad", "good"]) if kind == "classification" else ("pearson", [])
    return Task("made", kind, ("text",), "label", names, metric, splits)


def test_encoding_cuts_keeps_labels_and_drops_everything_else(tiny_tokenizer: Any) -> None:
    encoded = encode(make_task(), tiny_tokenizer, 6)
    assert set(encoded) == {"train", "validation", "ood"}
    assert set(encoded["train"].column_names) == {"label", "input_ids", "attention_mask"}
    assert "label" not in encoded["ood"].column_names and "x" not in encoded["ood"].column_names
    assert [len(ids) for ids in encoded["train"]["input_ids"]] == [4, 2, 6, 3, 6, 3, 4]
    assert encoded["train"]["label"][:] == LABELS
    assert not encoded["train"].cache_files


def test_pairs_are_encoded_together_and_the_longer_is_cut() -> None:
    tokenizer = AutoTokenizer.from_pretrained(packaged_model("minilm"))
    split = Dataset.from_dict({"a": ["good good good good good"], "b": ["bad film"], "label": [0]})
    task = Task("pair", "classification", ("a", "b"), "label", ["n", "y"], "accuracy", {"train": split})
    ids = encode(task, tokenizer, 8)["train"][0]
    words = tokenizer.convert_ids_to_tokens(ids["input_ids"])
    assert words == ["[CLS]", "good", "good", "good", "[SEP]", "bad", "film", "[SEP]"]
    assert ids["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    model = build_tiny_bert(vocab_size=len(tokenizer))
    assert len(predict_dataset(model, encode(task, tokenizer)["train"], tokenizer)) == 1


def test_the_default_length_is_the_models_but_at_most_128() -> None:
    tiny_tokenizer = build_tiny_tokenizer()
    tiny_tokenizer.model_max_length = 64
    task = make_task(["good " * 300, "bad"], [0, 1])
    assert len(encode(task, tiny_tokenizer)["train"][0]["input_ids"]) == 64
    assert len(encode(task, build_tiny_tokenizer(causal=True))["train"][0]["input_ids"]) == 128
    for length in (2, 65):
        with pytest.raises(
            BayesLoraError, match=rf"max_length is {length}, but must be 3 to 64 for this model and task"
        ):
            encode(task, tiny_tokenizer, length)


def test_scores_do_not_depend_on_the_batch_size_and_keep_the_order(tiny_bert: Any, tiny_tokenizer: Any) -> None:
    task = make_task()
    data = encode(task, tiny_tokenizer)["validation"]
    alone = []
    for row in data:
        ids, mask = (torch.tensor([row[name]]) for name in ("input_ids", "attention_mask"))
        alone.append(tiny_bert(input_ids=ids, attention_mask=mask).logits[0].detach().double())
    expected = torch.stack(alone).softmax(-1).numpy()
    for batch_size in (1, 3, 64):
        result = evaluate(tiny_bert, data, task, tiny_tokenizer, batch_size)
        np.testing.assert_allclose(result.predictions, expected, atol=1e-6)
        assert result.predictions.dtype == np.float64
        assert result.labels.tolist() == LABELS
        assert result.scores == metrics.classification_scores(result.predictions, LABELS)
        assert sum(b["count"] for b in result.reliability) == len(TEXTS) and len(result.reliability) == 15
        assert result.seconds > 0


def test_evaluation_turns_dropout_off_and_restores_each_module(tiny_tokenizer: Any) -> None:
    model = build_tiny_bert(hidden_dropout_prob=0.5).train()
    model.classifier.eval()
    task = make_task()
    data = encode(task, tiny_tokenizer)["validation"]
    first, second = (evaluate(model, data, task, tiny_tokenizer) for _ in range(2))
    assert np.array_equal(first.predictions, second.predictions)
    assert model.training and model.bert.training and not model.classifier.training


def test_a_regression_is_scored_by_its_values(tiny_tokenizer: Any) -> None:
    task = make_task(labels=[0.5, 1.0, 2.5, 0.0, 5.0, 1.5, 3.0], kind="regression")
    model = build_tiny_bert(num_labels=1)
    result = evaluate(model, encode(task, tiny_tokenizer)["validation"], task, tiny_tokenizer)
    assert result.predictions.shape == (7,) and result.reliability == []
    assert result.scores == metrics.regression_scores(result.predictions, result.labels)


def test_a_split_without_labels_is_predicted_and_not_scored(tiny_bert: Any, tiny_tokenizer: Any) -> None:
    task = make_task()
    encoded = encode(task, tiny_tokenizer)
    prediction = predict_dataset(tiny_bert, encoded["ood"], tiny_tokenizer, 2)
    same = evaluate(tiny_bert, encoded["validation"], task, tiny_tokenizer, 2)
    assert np.array_equal(prediction.probabilities.numpy(), same.predictions)
    with pytest.raises(
        BayesLoraError, match="the split has the columns .*, but scoring needs labels: use predict_dataset"
    ):
        evaluate(tiny_bert, encoded["ood"], task, tiny_tokenizer)


def test_a_model_that_does_not_fit_the_task_is_refused(tiny_tokenizer: Any) -> None:
    task = make_task()
    data = encode(task, tiny_tokenizer)["validation"]
    with pytest.raises(BayesLoraError, match="the model has 3 outputs, but the task 'made' needs 2: .*num_labels=2"):
        evaluate(build_tiny_bert(num_labels=3), data, task, tiny_tokenizer)
    broken = build_tiny_bert()
    with torch.no_grad():
        broken.classifier.bias.fill_(float("nan"))
    with pytest.raises(BayesLoraError, match="not finite for 7 of 7 examples"):
        evaluate(broken, data, task, tiny_tokenizer)
    with pytest.raises(BayesLoraError, match="load a sequence classifier"):
        evaluate(build_tiny_gpt2(), data, task, tiny_tokenizer)
    with pytest.raises(BayesLoraError, match="the split has 0 rows"):
        evaluate(build_tiny_bert(), data.select([]), task, tiny_tokenizer)
    with pytest.raises(BayesLoraError, match="batch_size is 0"):
        evaluate(build_tiny_bert(), data, task, tiny_tokenizer, 0)


def melora(num_labels: int = 2, **settings: Any) -> nn.Module:
    """Me-LoRA with noise large enough to be seen, on a tiny BERT with a large head."""
    config = bayeslora.MeLoraConfig(
        r=4, target_modules=["query", "value"], initial_std=1.0, init_weights=False, task_type="SEQ_CLS", **settings
    )
    base = build_tiny_bert(num_labels=num_labels)
    with torch.no_grad():
        base.classifier.weight.mul_(30)
    return get_peft_model(base, config).eval()


def test_samples_are_replayed_by_their_seed_for_every_batch_size_and_order(tiny_tokenizer: Any) -> None:
    model, task = melora(), make_task()
    data = encode(task, tiny_tokenizer)["validation"]
    found = evaluate(model, data, task, tiny_tokenizer, 3, samples=5, seed=7)
    same = evaluate(model, data, task, tiny_tokenizer, 64, samples=5, seed=7)
    np.testing.assert_allclose(found.predictions, same.predictions, atol=1e-6)
    np.testing.assert_allclose(found.mutual_information, same.mutual_information, atol=1e-6)
    alone = evaluate(model, data.select([4]), task, tiny_tokenizer, samples=5, seed=7)
    np.testing.assert_allclose(found.predictions[4], alone.predictions[0], atol=1e-6)
    assert found.samples == 5 and found.scores == metrics.classification_scores(found.predictions, LABELS)
    other = evaluate(model, data, task, tiny_tokenizer, samples=5, seed=8)
    assert np.abs(other.predictions - found.predictions).max() > 1e-3
    pairs = evaluate(model, data, task, tiny_tokenizer, samples=4, seed=7, antithetic=True)
    assert np.abs(pairs.predictions - evaluate(model, data, task, tiny_tokenizer, samples=4, seed=7).predictions).any()


def test_entropies_are_those_of_the_samples(tiny_tokenizer: Any) -> None:
    model, task = melora(), make_task()
    data = encode(task, tiny_tokenizer)["validation"]
    found = evaluate(model, data, task, tiny_tokenizer, samples=4)
    for row, sequence in enumerate(data["input_ids"]):
        inputs = {"input_ids": torch.tensor([sequence])}
        each = bayeslora.predict(model, inputs, samples=4, per_sample=True).sample_probabilities[:, 0].numpy()
        np.testing.assert_allclose(found.predictions[row], each.mean(axis=0), atol=1e-6)
        expected = -(each * np.log(each)).sum(axis=1).mean()
        assert found.expected_entropy[row] == pytest.approx(expected, abs=1e-5)
        entropy = -(found.predictions[row] * np.log(found.predictions[row])).sum()
        assert found.entropy[row] == pytest.approx(entropy)
    assert (found.mutual_information > 1e-6).all()
    assert list(found.uncertainties) == ["max_probability", "entropy", "mutual_information"]


def test_without_samples_the_mean_is_scored_and_nothing_disagrees(tiny_tokenizer: Any) -> None:
    model, task = melora(), make_task()
    data = encode(task, tiny_tokenizer)["validation"]
    found = evaluate(model, data, task, tiny_tokenizer)
    with bayeslora.posterior_mean(model):
        mean = predict_dataset(model, data, tiny_tokenizer).probabilities.numpy()
    np.testing.assert_array_equal(found.predictions, mean)
    assert not found.mutual_information.any() and (found.expected_entropy == found.entropy).all()
    assert list(found.uncertainties) == ["max_probability", "entropy"]


def test_a_predictor_takes_the_place_of_a_model(tiny_tokenizer: Any) -> None:
    model, task = melora(), make_task()
    data = encode(task, tiny_tokenizer)["validation"]
    through = evaluate(as_predictor(model), data, task, tiny_tokenizer, samples=3)
    assert through.scores == evaluate(model, data, task, tiny_tokenizer, samples=3).scores


def test_samples_of_a_deterministic_model_are_refused(tiny_bert: Any, tiny_tokenizer: Any) -> None:
    task = make_task()
    data = encode(task, tiny_tokenizer)["validation"]
    with pytest.raises(BayesLoraError, match="deterministic and lacks a posterior"):
        evaluate(tiny_bert, data, task, tiny_tokenizer, samples=2)


def test_a_sampled_regression_is_scored_by_its_mean_value(tiny_tokenizer: Any) -> None:
    task = make_task(labels=[0.5, 1.0, 2.5, 0.0, 5.0, 1.5, 3.0], kind="regression")
    model = melora(num_labels=1)
    data = encode(task, tiny_tokenizer)["validation"]
    found = evaluate(model, data, task, tiny_tokenizer, samples=3)
    inputs = {"input_ids": torch.tensor([data["input_ids"][2]])}
    each = bayeslora.predict(model, inputs, samples=3, per_sample=True).sample_values
    assert found.predictions[2] == pytest.approx(float(each.mean()), abs=1e-5)
    assert found.uncertainties == found.risk_coverage == found.histograms() == {}


def test_histograms_hold_every_example_once_and_foreign_ones_apart(tiny_tokenizer: Any) -> None:
    model, task = melora(), make_task()
    encoded = encode(task, tiny_tokenizer)
    found = evaluate(model, encoded["validation"], task, tiny_tokenizer, samples=3)
    outside = predict_dataset(model, encoded["ood"].select([1, 2, 3]), tiny_tokenizer, samples=3)
    counts = found.histograms(outside)
    for measure in ("entropy", "mutual_information"):
        assert sum(counts[measure]["correct"]) == round(found.scores["accuracy"] * len(LABELS))
        assert sum(counts[measure]["correct"]) + sum(counts[measure]["wrong"]) == len(LABELS)
        assert sum(counts[measure]["ood"]) == 3
    assert list(uncertainties_of(outside)) == list(found.uncertainties)
    assert found.risk_coverage["risk"][-1] == pytest.approx(1 - found.scores["accuracy"])
    assert np.mean(found.risk_coverage["risk"]) == pytest.approx(found.scores["aurc"], abs=0.08)


def test_empty_texts_work_with_a_tokenizer_that_adds_nothing() -> None:
    tokenizer = build_tiny_tokenizer(causal=True)
    task = make_task(["", ""], [0, 1])
    data = encode(task, tokenizer)["train"]
    assert [len(ids) for ids in data["input_ids"]] == [1, 1]
    result = evaluate(build_tiny_bert(), data, task, tokenizer)
    assert np.isfinite(result.predictions).all()
    tokenizer.pad_token = None
    with pytest.raises(BayesLoraError, match="lacks a padding token, .* set tokenizer.pad_token"):
        evaluate(build_tiny_bert(), data, task, tokenizer)


def test_half_precision_outputs_become_exact_float64_probabilities(tiny_bert: nn.Module, tiny_tokenizer: Any) -> None:
    task = make_task()
    data = encode(task, tiny_tokenizer)["validation"]
    result = evaluate(tiny_bert.to(torch.bfloat16), data, task, tiny_tokenizer)
    np.testing.assert_allclose(result.predictions.sum(axis=1), 1.0, atol=1e-15)


def test_the_trainers_metrics_are_the_runners(tiny_bert: Any, tiny_tokenizer: Any) -> None:
    task = dataclasses.replace(make_task(), extra_metrics=("f1",))
    data = encode(task, tiny_tokenizer)["validation"]
    result = evaluate(tiny_bert, data, task, tiny_tokenizer)
    logits = predict_dataset(tiny_bert, data, tiny_tokenizer).logits.numpy()
    compute = compute_metrics_for(task)
    for predictions in (logits, (logits, "hidden states")):
        assert compute(SimpleNamespace(predictions=predictions, label_ids=np.array(LABELS))) == pytest.approx(
            result.scores
        )
    regression = compute_metrics_for(make_task(labels=[0.0] * 7, kind="regression"))
    evaluated = SimpleNamespace(predictions=np.array([[1.0], [2.0], [4.0]]), label_ids=np.array([1.0, 2.0, 3.0]))
    scores = regression(evaluated)
    assert scores["mse"] == pytest.approx(1 / 3) and scores["spearman"] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["classification", "regression", "multi_label", "token_classification"])
def test_the_names_of_scores_are_known_before_an_evaluation(kind: str) -> None:
    labels = [] if kind == "regression" else ["O", "B-x", "I-x"]
    task = dataclasses.replace(make_task(kind=kind), labels=labels)
    names = metric_names(task)
    assert ("pearson" if kind == "regression" else "nll") in names and len(names) == len(set(names)) > 2
