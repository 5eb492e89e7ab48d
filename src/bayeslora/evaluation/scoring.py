"""Run a model over a split of a task, and score it."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from scipy.special import expit

from bayeslora.data.encode import collated
from bayeslora.data.tasks import LABEL, Task
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import findings
from bayeslora.evaluation.metrics import (
    baseline_scores,
    classification_scores,
    regression_scores,
    reliability_bins,
    softmax,
)
from bayeslora.evaluation.multi_label import (
    MultiLabelEvaluation,
    baseline_of_labels,
    label_scores,
    multi_label_scores,
)
from bayeslora.evaluation.multiple_choice import (
    LetterLogits,
    choice_scoring,
    is_multiple_choice,
    row_lengths,
)
from bayeslora.evaluation.prefix_sharing import rows_that_begin_alike
from bayeslora.evaluation.uncertainty import histograms, risk_coverage_curve, uncertainties
from bayeslora.prediction import (
    Logits,
    Predictable,
    Prediction,
    as_predictor,
    check_one_label,
    check_samples,
    features_and_logits,
    predict,
    sampled_logits,
)


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a split, with the predictions and labels behind them, in the split's order.

    Attributes:
        scores: scores by name, the task's headline first.
        predictions: (n, C) class probabilities, averaged over samples; (n,) values for regression.
        labels: (n,) class ids or values.
        reliability: confidence bins as in metrics.json; empty for regression.
        seconds: wall time of the forward passes.
        entropy: (n,) of the predictions, in nats; 0 for regression.
        mutual_information: (n,) the part of the entropy that the samples disagree about, in nats; 0 without samples.
        samples: number of draws from the posterior for each prediction; 0 is the posterior mean.
        baseline: scores of the best constant prediction for these labels, `metrics.baseline_scores`.
    """

    scores: dict[str, float]
    predictions: NDArray[np.float64]
    labels: NDArray[Any]
    reliability: list[dict[str, Any]]
    seconds: float
    entropy: NDArray[np.float64]
    mutual_information: NDArray[np.float64]
    samples: int = 0
    baseline: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.labels)

    @property
    def expected_entropy(self) -> NDArray[np.float64]:
        """Mean entropy (n,) of the single samples' predictions: the part that known weights would leave."""
        return self.entropy - self.mutual_information

    @property
    def uncertainties(self) -> dict[str, NDArray[np.float64]]:
        """Measures of uncertainty, (n,) each, larger = less sure (`uncertainty.uncertainties`); {} for regression."""
        if self.predictions.ndim == 1:
            return {}
        return uncertainties(self.predictions, self.entropy, self.mutual_information)

    @property
    def risk_coverage(self) -> dict[str, list[float]]:
        """Error rate by share of examples answered, the most confident first, as in metrics.json."""
        if self.predictions.ndim == 1:
            return {}
        return risk_coverage_curve(self.uncertainties["max_probability"], ~self._correct)

    @property
    def findings(self) -> dict[str, Any]:
        """Confusion matrix and verdict, as in metrics.json."""
        of = findings.of_numbers if self.predictions.ndim == 1 else findings.of_classes
        return of(self.predictions, self.labels)

    def histograms(self, outside: Prediction | None = None) -> dict[str, dict[str, Any]]:
        """Count entropy and mutual information of `correct`, `wrong` and `ood` predictions, as in metrics.json.

        Args:
            outside: predictions for out-of-distribution inputs by the same model with the same samples.
        """
        if self.predictions.ndim == 1:
            return {}
        groups = {
            name: {measure: values[rows] for measure, values in self.uncertainties.items()}
            for name, rows in (("correct", self._correct), ("wrong", ~self._correct))
        }
        if outside is not None:
            groups["ood"] = uncertainties_of(outside)
        return histograms(groups, self.predictions.shape[1])

    @property
    def _correct(self) -> NDArray[np.bool_]:
        return np.asarray(self.predictions.argmax(axis=1) == self.labels)


def evaluate(
    model: Predictable,
    dataset: Dataset,
    task: Task,
    tokenizer: Any,
    batch_size: int = 64,
    samples: int = 0,
    seed: int = 0,
    antithetic: bool = False,
) -> Evaluation | MultiLabelEvaluation:
    """Score a model on one encoded split with labels.

    Args:
        model: a model, which keeps its mode and device; or a predictor around one, as for `predict`.
        dataset: a split as `encode` returns it.
        task: decides the scores.
        tokenizer: pads the batches.
        batch_size: examples per forward pass; every example is used, and the scores do not depend on it.
        samples: draws from the posterior to average probabilities over; 0 uses the posterior mean.
        seed: seed of the draws; the same seed gives the same scores.
        antithetic: pair draws of opposite noise.

    Returns:
        The `Evaluation`. Its scores are for classification the task's metrics, `accuracy`, `nll`, `ece`,
        `adaptive_ece`, `classwise_ece`, `brier` and `aurc`; for regression `pearson`, `spearman` and `mse`; with
        several labels a row it is a `MultiLabelEvaluation`.

    Raises:
        BayesLoraError: `dataset` lacks labels or rows, the model's kind or number of classes is not that of the task,
            outputs are not finite, or samples are wanted but the model lacks a posterior.
    """
    if LABEL not in dataset.column_names:
        raise BayesLoraError(
            f"the split has the columns {', '.join(dataset.column_names)}, but scoring needs labels: use "
            "predict_dataset to predict without scores"
        )
    labels = np.asarray(dataset[LABEL])
    if task.kind not in ("multi_label", "multiple_choice"):
        check_one_label(as_predictor(model).model)
    start = time.perf_counter()
    prediction = predict_dataset(model, dataset, tokenizer, batch_size, samples, seed, antithetic)
    seconds = time.perf_counter() - start
    return _scored(task, prediction, labels, seconds, samples)


def predict_dataset(
    model: Predictable,
    dataset: Dataset,
    tokenizer: Any,
    batch_size: int = 64,
    samples: int = 0,
    seed: int = 0,
    antithetic: bool = False,
    *,
    per_sample: bool = False,
) -> Prediction:
    """Return `predict` of an encoded split, in its order; batches are padded and hold examples of similar length.

    Prompts that begin alike (few-shot ones) share a batch, and a model without samples reads their beginning once.

    Raises:
        BayesLoraError: `dataset` lacks rows, `batch_size` is below 1, the tokenizer cannot pad, or
            samples are wanted but the model lacks a posterior.
    """
    batches, order, logits = _batched(dataset, tokenizer, batch_size, samples)
    prediction = predict(model, batches, samples, seed, per_sample=per_sample, antithetic=antithetic, logits=logits)
    back = torch.from_numpy(np.argsort(order, kind="stable"))
    fields = {name: value for name, value in vars(prediction).items() if value is not None}
    # The first dimension of the fields of single samples is the sample.
    return dataclasses.replace(
        prediction,
        **{name: value[:, back] if name.startswith("sample_") else value[back] for name, value in fields.items()},
    )


def dataset_logits(
    model: Predictable, dataset: Dataset, tokenizer: Any, batch_size: int = 64, samples: int = 0, seed: int = 0
) -> torch.Tensor:
    """Return the (S, n, C) logits of an encoded split, in its order, for a calibration's `fit_logits`.

    Raises:
        BayesLoraError: as `predict_dataset`.
    """
    batches, order, logits = _batched(dataset, tokenizer, batch_size, samples)
    predictor = as_predictor(model)
    check_samples(predictor, samples)
    found = sampled_logits(predictor, batches, samples, seed, logits=logits)
    return found[:, torch.from_numpy(np.argsort(order, kind="stable"))]


def _batched(
    dataset: Dataset, tokenizer: Any, batch_size: int, samples: int
) -> tuple[Iterator[dict[str, Any]], NDArray[np.int64], Logits | None]:
    """Return batches for `predict`, the order of their rows, and its argument `logits`."""
    _check_rows(dataset, batch_size)
    scoring = choice_scoring(dataset, tokenizer) if is_multiple_choice(dataset) else None
    logits: Logits | None = scoring.logits if scoring else None
    alike: list[list[int]] = [list(range(len(dataset)))]
    if isinstance(logits, LetterLogits) and samples == 0:
        logits = dataclasses.replace(logits, share_prefix=True)
        alike = rows_that_begin_alike(dataset["input_ids"])
    # Longest first, so that a lack of memory shows at once. Stable, so that equal lengths keep their order.
    lengths = -np.asarray(row_lengths(dataset))
    groups = [np.asarray(rows)[np.argsort(lengths[rows], kind="stable")] for rows in alike if rows]
    groups.sort(key=lambda rows: lengths[rows[0]])
    collate = scoring.collate if scoring else None
    batches = itertools.chain.from_iterable(collated(dataset, rows, tokenizer, batch_size, collate) for rows in groups)
    return batches, np.concatenate(groups), logits


def dataset_features(
    model: Predictable, dataset: Dataset, tokenizer: Any, batch_size: int = 64
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the (n, d) features and (n, C) logits of an encoded split, in its order; see `features_and_logits`.

    Raises:
        BayesLoraError: `dataset` lacks rows, `batch_size` is below 1, or the model is not a sequence classifier.
    """
    _check_rows(dataset, batch_size)
    order = np.argsort(-np.asarray(row_lengths(dataset)), kind="stable")
    features, logits = features_and_logits(model, collated(dataset, order, tokenizer, batch_size, None))
    back = np.argsort(order, kind="stable")
    return features.numpy()[back], logits.numpy()[back]


def uncertainties_of(prediction: Prediction) -> dict[str, NDArray[np.float64]]:
    """Return a classifier's measures of uncertainty; see `uncertainty.uncertainties`."""
    return uncertainties(
        prediction.probabilities.numpy(), prediction.entropy.numpy(), prediction.mutual_information.numpy()
    )


def compute_metrics_for(task: Task) -> Callable[[Any], dict[str, float]]:
    """Return a function for `Trainer(compute_metrics=...)` that gives the task's scores."""

    def compute_metrics(evaluated: Any) -> dict[str, float]:
        logits = evaluated.predictions
        # Some models return hidden states after the logits.
        logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, dtype=np.float64)
        if task.kind == "regression":
            return regression_scores(logits.reshape(-1), evaluated.label_ids)
        if task.kind == "multi_label":
            return multi_label_scores(expit(logits), evaluated.label_ids)
        return classification_scores(softmax(logits), evaluated.label_ids, task.metrics)

    return compute_metrics


def _check_rows(dataset: Dataset, batch_size: int) -> None:
    if batch_size < 1:
        raise BayesLoraError(f"batch_size is {batch_size}, but must be at least 1: give a larger one")
    if not len(dataset):
        raise BayesLoraError("the split has 0 rows, but at least 1 is needed: check the data behind it")


def _scored(
    task: Task, prediction: Prediction, labels: NDArray[Any], seconds: float, samples: int
) -> Evaluation | MultiLabelEvaluation:
    outputs, expected = prediction.logits.shape[1], 1 if task.kind == "regression" else len(task.labels)
    if outputs != expected:
        raise BayesLoraError(
            f"the model has {outputs} outputs, but the task {task.name!r} needs {expected}: "
            f"load the model with num_labels={expected}"
        )
    # Not the logits, since an absent class has minus infinity.
    predicted = prediction.labels[:, None].double() if task.kind == "regression" else prediction.probabilities
    broken = int((~torch.isfinite(predicted)).any(dim=1).sum())
    if broken:
        raise BayesLoraError(
            f"the model's outputs are not finite for {broken} of {len(predicted)} examples, but must be: "
            "train with a smaller learning rate or in float32"
        )
    found: dict[str, Any] = {
        "labels": labels,
        "seconds": seconds,
        "entropy": prediction.entropy.numpy(),
        "mutual_information": prediction.mutual_information.numpy(),
        "samples": samples,
    }
    if task.kind == "multi_label":
        p = predicted.numpy()
        by_label = label_scores(p, labels, task.labels)
        found["baseline"] = baseline_of_labels(labels)
        return MultiLabelEvaluation(multi_label_scores(p, labels), p, label_scores=by_label, **found)
    found |= {
        "baseline": baseline_scores(labels, 0 if task.kind == "regression" else len(task.labels), task.metrics),
    }
    if task.kind == "regression":
        values = predicted[:, 0].numpy()
        return Evaluation(regression_scores(values, labels), values, reliability=[], **found)
    probabilities = predicted.numpy()
    scores = classification_scores(probabilities, labels, task.metrics)
    return Evaluation(scores, probabilities, reliability=reliability_bins(probabilities, labels), **found)
