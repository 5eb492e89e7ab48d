"""Models with several labels a row: sigmoids with each label's entropies, and a refusal where classes must exclude."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import bayeslora
from bayeslora.errors import BayesLoraError

SHAPE = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SAMPLES = 3


def classifier(problem: str = "multi_label_classification", num_labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=num_labels, problem_type=problem))
    config = bayeslora.MeLoraConfig(target_modules=["query"], task_type="SEQ_CLS", init_weights=False, prior_std=1.0)
    return get_peft_model(base, config).eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, 60, (4, 6), generator=torch.Generator().manual_seed(0))}


def bernoulli_entropy(p: np.ndarray) -> np.ndarray:
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


def test_each_label_has_its_own_probability_and_entropies(batch: dict[str, Tensor]) -> None:
    model = classifier()
    mean = bayeslora.predict(model, batch)
    with torch.no_grad():
        logits = model(**batch).logits.double()
    torch.testing.assert_close(mean.probabilities, logits.sigmoid(), rtol=0, atol=1e-7)
    torch.testing.assert_close(mean.logits, logits, rtol=0, atol=1e-7)
    assert mean.labels.tolist() == (logits > 0).long().tolist()
    assert mean.mutual_information.abs().max() < 1e-12

    drawn = bayeslora.predict(model, batch, samples=SAMPLES, per_sample=True)
    assert drawn.sample_probabilities is not None
    each = drawn.sample_probabilities.numpy()
    assert each.std(axis=0).min() > 0
    p, expected = each.mean(axis=0), bernoulli_entropy(each).mean(axis=0)
    np.testing.assert_allclose(drawn.probabilities, p, atol=1e-12)
    np.testing.assert_allclose(drawn.logits, np.log(p / (1 - p)), atol=1e-9)
    np.testing.assert_allclose(drawn.entropy, bernoulli_entropy(p), atol=1e-12)
    np.testing.assert_allclose(drawn.expected_entropy, expected, atol=1e-12)
    np.testing.assert_allclose(drawn.mutual_information, bernoulli_entropy(p) - expected, atol=1e-12)
    assert drawn.mutual_information.min() > 0


def test_an_ensemble_averages_sigmoids(batch: dict[str, Tensor]) -> None:
    models = [classifier(), classifier()]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1.5)
        expected = torch.stack([model(**batch).logits.double().sigmoid() for model in models]).mean(0)
    found = bayeslora.predict(bayeslora.DeepEnsemble(models), batch).probabilities
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_one_label_and_sure_ones_stay_finite() -> None:
    model = classifier(num_labels=1)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias.fill_(800.0)
    found = bayeslora.predict(model, {"input_ids": torch.full((2, 4), 7)})
    assert found.labels.tolist() == [[1], [1]] and found.probabilities.tolist() == [[1.0], [1.0]]
    assert found.entropy.tolist() == [[0.0], [0.0]]


LABELLED = {"labels": torch.tensor([0, 1, 2, 0])}
REFUSED: dict[str, Callable[[nn.Module, dict[str, Any]], object]] = {
    "temperature": lambda model, batch: bayeslora.TemperatureScaling(model),
    "vector": lambda model, batch: bayeslora.VectorScaling(model),
    "isotonic": lambda model, batch: bayeslora.IsotonicCalibration(model),
    "laplace": lambda model, batch: bayeslora.LaplacePredictor(model).fit({**batch, **LABELLED}),
    "sets": lambda model, batch: bayeslora.ConformalSets().fit(bayeslora.predict(model, batch), LABELLED["labels"]),
    "risk": lambda model, batch: bayeslora.RiskControl().fit(bayeslora.predict(model, batch), LABELLED["labels"]),
    "select": lambda model, batch: bayeslora.select_rows(bayeslora.predict(model, batch), 1, "entropy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_classes_that_exclude_each_other_refuses(name: str, batch: dict[str, Tensor]) -> None:
    with pytest.raises(BayesLoraError, match="several labels a row"):
        REFUSED[name](classifier(), batch)


def test_a_data_set_gets_a_probability_for_each_label(tiny_tokenizer: Any) -> None:
    from bayeslora.evaluation import predict_dataset

    columns = {"input_ids": [[5, 6], [7, 8]], "attention_mask": [[1, 1], [1, 1]]}
    model = classifier().eval()
    found = predict_dataset(model, Dataset.from_dict(columns), tiny_tokenizer).probabilities
    logits = model(**{name: torch.tensor(rows) for name, rows in columns.items()}).logits
    torch.testing.assert_close(found.float(), torch.sigmoid(logits).detach(), rtol=1e-4, atol=1e-6)


def test_a_saved_model_is_not_loaded_as_one_of_classes(tmp_path: Path) -> None:
    base = BertForSequenceClassification(BertConfig(**SHAPE, num_labels=3, problem_type="multi_label_classification"))
    base.save_pretrained(tmp_path)
    with pytest.raises(BayesLoraError, match="problem_type 'multi_label_classification' with 3 outputs"):
        bayeslora.load(tmp_path)


def test_several_numbers_a_row_are_no_classes(batch: dict[str, Tensor]) -> None:
    with pytest.raises(BayesLoraError, match="predicts 3 numbers a row"):
        bayeslora.predict(classifier("regression"), batch)
