"""Run a model over a split of a task, and score it."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from scipy.special import expit
from transformers import EvalPrediction

from bayeslora.data.chat import LABELS
from bayeslora.data.completions import IGNORED
from bayeslora.data.encode import collated
from bayeslora.data.encode_words import has_words, word_collator, word_labels, word_order, word_rows
from bayeslora.data.tasks import LABEL, Task
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.metrics import (
    baseline_scores,
    classification_scores,
    regression_scores,
    reliability_bins,
    softmax,
)
from bayeslora.evaluation.multi_label import MultiLabelEvaluation, baseline_of_labels, label_scores, multi_label_scores
from bayeslora.evaluation.multiple_choice import LetterLogits, choice_scoring, is_multiple_choice, row_lengths
from bayeslora.evaluation.prefix_sharing import rows_that_begin_alike
from bayeslora.evaluation.result import Evaluation
from bayeslora.evaluation.tagging import TaggingEvaluation, constant_spans, span_scores, tagging_scores
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
    word_logits,
)


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
        dataset: an encoded split, as `encode` returns it.
        task: task whose metrics are computed.
        tokenizer: tokenizer that pads the batches.
        batch_size: examples per forward pass; every example is used, and the scores do not depend on it.
        samples: number of draws from the posterior to average probabilities over; 0 uses the posterior mean.
        seed: seed of the draws; the same seed gives the same scores.
        antithetic: pair draws with opposite noise.

    Returns:
        An `Evaluation`, or for a multi-label task a `MultiLabelEvaluation`, or for tagging a `TaggingEvaluation`.
        For classification, its scores are the task's metrics, `accuracy`, `nll`, `ece`, `adaptive_ece`,
        `classwise_ece`, `brier` and `aurc`; for regression `pearson`, `spearman` and `mse`.

    Raises:
        BayesLoraError: `dataset` lacks labels or rows, the model's kind or number of classes differs from the task's,
            outputs are not finite, or `samples` > 0 for a model without a posterior.
    """
    if (LABELS if has_words(dataset) else LABEL) not in dataset.column_names:
        raise BayesLoraError(
            f"the split has the columns {', '.join(dataset.column_names)}, but scoring needs labels: use "
            "predict_dataset to predict without scores"
        )
    labels = word_labels(dataset) if has_words(dataset) else np.asarray(dataset[LABEL])
    if task.kind not in ("multi_label", "multiple_choice"):
        check_one_label(as_predictor(model).model)
    start = time.perf_counter()
    prediction = predict_dataset(model, dataset, tokenizer, batch_size, samples, seed, antithetic)
    seconds = time.perf_counter() - start
    rows = word_rows(dataset) if has_words(dataset) else None
    return _scored(task, prediction, labels, seconds, samples, rows)


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
    """Predict an encoded split with `predict`, in its order; batches are padded and hold examples of similar length.

    For sentences from `encode_words`, the examples are the words. Prompts with the same beginning (few-shot prompts)
    share a batch, and a model without samples reads their beginning once.

    Raises:
        BayesLoraError: `dataset` lacks rows, `batch_size` is below 1, the tokenizer cannot pad, or `samples` > 0 for a
            model without a posterior.
    """
    batches, places, logits = _batched(dataset, tokenizer, batch_size, samples)
    prediction = predict(model, batches, samples, seed, per_sample=per_sample, antithetic=antithetic, logits=logits)
    back = torch.from_numpy(places)
    fields = {name: value for name, value in vars(prediction).items() if value is not None}
    # The first dimension of the fields of single samples is the sample.
    return dataclasses.replace(
        prediction,
        **{name: value[:, back] if name.startswith("sample_") else value[back] for name, value in fields.items()},
    )


def dataset_logits(
    model: Predictable, dataset: Dataset, tokenizer: Any, batch_size: int = 64, samples: int = 0, seed: int = 0
) -> torch.Tensor:
    """Return the logits (S, n, C) of an encoded split, in its order, for the method `fit_logits` of a calibration.

    Raises:
        BayesLoraError: in the cases of `predict_dataset`.
    """
    batches, places, logits = _batched(dataset, tokenizer, batch_size, samples)
    predictor = as_predictor(model)
    check_samples(predictor, samples)
    found = sampled_logits(predictor, batches, samples, seed, logits=logits)
    return found[:, torch.from_numpy(places)]


def _batched(
    dataset: Dataset, tokenizer: Any, batch_size: int, samples: int
) -> tuple[Iterator[dict[str, Any]], NDArray[np.int64], Logits | None]:
    """Return batches for `predict`, the places of the examples in its result, and its argument `logits`."""
    _check_rows(dataset, batch_size)
    if has_words(dataset):
        order = np.argsort(-np.asarray(row_lengths(dataset)), kind="stable")
        words = collated(dataset, order, tokenizer, batch_size, word_collator(tokenizer))
        return words, word_order(dataset, order, batch_size), word_logits
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
    return batches, np.argsort(np.concatenate(groups), kind="stable"), logits


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
        if task.kind == "token_classification":
            places = np.asarray(evaluated.label_ids) != IGNORED
            rows, labels = np.nonzero(places)[0], evaluated.label_ids[places]
            return tagging_scores(softmax(logits[places]), labels, rows, task.labels)
        return classification_scores(softmax(logits), evaluated.label_ids, task.metrics)

    return compute_metrics


def metric_names(task: Task) -> list[str]:
    """Return the names of the scores that `compute_metrics_for` gives, from a made-up evaluation."""
    count = max(2, len(task.labels))
    logits: NDArray[Any] = np.eye(count)
    labels: NDArray[Any] = np.arange(count)
    if task.kind == "regression":
        logits, labels = np.arange(3.0), np.arange(3.0)
    elif task.kind == "multi_label":
        logits, labels = 2 * logits - 1, logits
    elif task.kind == "token_classification":
        logits, labels = logits[None], labels[None]
    return list(compute_metrics_for(task)(EvalPrediction(logits, labels)))


def _check_rows(dataset: Dataset, batch_size: int) -> None:
    if batch_size < 1:
        raise BayesLoraError(f"batch_size is {batch_size}, but must be at least 1: give a larger one")
    if not len(dataset):
        raise BayesLoraError("the split has 0 rows, but at least 1 is needed: check the data behind it")


def _scored(
    task: Task, prediction: Prediction, labels: NDArray[Any], seconds: float, samples: int,
    rows: NDArray[np.int64] | None = None,
) -> Evaluation | MultiLabelEvaluation:  # fmt: skip
    outputs, expected = prediction.logits.shape[1], 1 if task.kind == "regression" else len(task.labels)
    if outputs != expected:
        raise BayesLoraError(
            f"the model has {outputs} outputs, but the task {task.name!r} needs {expected}: "
            f"load the model with num_labels={expected}"
        )
    found: dict[str, Any] = {
        "labels": labels,
        "seconds": seconds,
        "entropy": prediction.entropy.numpy(),
        "mutual_information": prediction.mutual_information.numpy(),
        "samples": samples,
    }
    if task.kind == "multi_label":
        p = prediction.probabilities.numpy()
        by_label = label_scores(p, labels, task.labels)
        found["baseline"] = baseline_of_labels(labels)
        return MultiLabelEvaluation(multi_label_scores(p, labels), p, label_scores=by_label, **found)
    metrics = task.metrics if rows is None else ("accuracy",)
    found["baseline"] = baseline_scores(labels, 0 if task.kind == "regression" else len(task.labels), metrics)
    if task.kind == "regression":
        values = prediction.labels.double().numpy()
        return Evaluation(regression_scores(values, labels), values, reliability=[], **found)
    probabilities = prediction.probabilities.numpy()
    bins = reliability_bins(probabilities, labels)
    if rows is not None:
        found["baseline"] = {**constant_spans(labels, rows, task.labels), **found["baseline"]}
        by_span = span_scores(labels, probabilities.argmax(axis=1), rows, task.labels)[1]
        scores = tagging_scores(probabilities, labels, rows, task.labels)
        return TaggingEvaluation(scores, probabilities, reliability=bins, row=rows, label_scores=by_span, **found)
    scores = classification_scores(probabilities, labels, task.metrics)
    return Evaluation(scores, probabilities, reliability=bins, **found)
