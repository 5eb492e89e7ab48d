"""Measure scores, parameters, bit operations and widths of a trained model, and check its saved copy."""

from __future__ import annotations

import platform
import resource
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from bayeslora.cost import count_parameters, relative_bops
from bayeslora.data import Task
from bayeslora.data.chat import LABELS
from bayeslora.data.encode_words import has_words
from bayeslora.data.known import MISMATCHED
from bayeslora.data.tasks import LABEL
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import (
    Evaluation,
    FeatureSpace,
    MultiLabelEvaluation,
    TaggingEvaluation,
    dataset_features,
    evaluate,
    evaluate_text,
    predict_dataset,
    uncertainties_of,
)
from bayeslora.evaluation.uncertainty import detection
from bayeslora.methods import describe
from bayeslora.prediction import Predictable, Prediction
from bayeslora.runs.answers import Sampling
from bayeslora.runs.examples import Examples, choose_examples
from bayeslora.runs.info import RunInfo
from bayeslora.runs.rows import EVALUATION, TEST, OutsideRows, encode_for, training_rows
from bayeslora.runs.run import Run
from bayeslora.runs.text_scores import scored_text

_PROBE_ROWS = 16
_RELOAD_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}


def measure(
    model: nn.Module,
    data: dict[str, Any],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    samples: int = 0,
    predictor: Predictable | None = None,
    examples: int = 0,
) -> tuple[dict[str, Any], Examples]:
    """Return the measured part of `metrics.json`, and `examples` rows of each kind to look at.

    `scores` are those of `predictor`, by default of `model`, on the evaluation split; those of MNLI
    include the accuracy on its mismatched split.
    """
    scored_model = predictor or model
    evaluation = evaluate(scored_model, data[EVALUATION], task, tokenizer, batch_size, samples)
    chosen = choose_examples(evaluation, task.splits[EVALUATION], task, examples)
    if MISMATCHED in data:
        other = evaluate(scored_model, data[MISMATCHED], task, tokenizer, batch_size, samples).scores[task.metric]
        evaluation = replace(evaluation, scores={**evaluation.scores, f"{task.metric}_mismatched": other})
    found = {"metric": task.metric, **scored(evaluation), **described(model)}
    found["labels"] = list(task.labels)
    if TEST in data:
        found["scores_test"] = evaluate(scored_model, data[TEST], task, tokenizer, batch_size, samples).scores
    return found, chosen


def answered(info: RunInfo) -> dict[str, Any]:
    """Return the part of `metrics.json` about how a language model answers multiple choice; {} for other models."""
    if info.scoring is None:
        return {}
    return {"scoring": info.scoring, **({"normalization": info.normalization} if info.scoring == "cloze" else {})}


def measure_text(
    model: nn.Module,
    predictor: Predictable,
    data: dict[str, Any],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    samples: int = 0,
) -> dict[str, Any]:
    """Return `measure` of a run that generates text, with the number of draws in `samples`."""
    splits = [name for name in (EVALUATION, TEST) if name in data]
    found = {
        name: scored_text(predictor, task, task.splits[name], data[name], tokenizer, batch_size, Sampling(samples))
        for name in splits
    }
    tests = {"scores_test": found[TEST]["scores"]} if TEST in found else {}
    own = {name: value for name, value in found[EVALUATION].items() if name not in ("rows", "seconds")}
    return {"metric": task.metric, **own, **described(model), **tests}


def rows_to_score(data: dict[str, Any]) -> int:
    """Return the number of rows that `measure` predicts."""
    return sum(len(data[name]) for name in (EVALUATION, MISMATCHED, TEST) if name in data)


def scored(evaluation: Evaluation | MultiLabelEvaluation) -> dict[str, Any]:
    """Return the part of `metrics.json` about the predictions on a split."""
    return {
        "rows": evaluation.rows,
        **({"words": evaluation.words} if isinstance(evaluation, TaggingEvaluation) else {}),
        "scores": evaluation.scores,
        "samples": evaluation.samples,
        "reliability": {"bins": evaluation.reliability},
        "risk_coverage": evaluation.risk_coverage,
        "uncertainty": evaluation.histograms(),
        "baseline": evaluation.baseline,
        **({} if not hasattr(evaluation, "label_scores") else {"label_scores": evaluation.label_scores}),
        **(evaluation.findings if isinstance(evaluation, Evaluation) else {}),
    }


def fitted_space(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, info: RunInfo, batch_size: int = 64
) -> FeatureSpace:
    """Return the features of `FITTED_ROWS` of the run's training rows, for scores by features.

    Raises:
        BayesLoraError: the training rows cannot be found, or the model is not a sequence classifier.
    """
    task, rows = training_rows(info)
    data = encode_for(rows, task, tokenizer, info)
    return FeatureSpace(dataset_features(model, data, tokenizer, batch_size)[0], data[LABEL])


Features = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Features (n, d) and logits (n, C) of a split, as `dataset_features` returns them."""


def foreign_scores(
    loaded: Run,
    predictor: Predictable,
    task: Task,
    split: str,
    evaluation: Evaluation,
    outside: OutsideRows,
    size: int,
    seed: int,
) -> dict[str, Any]:
    """Return the `uncertainty` and `ood` blocks of `metrics.json`: rows from outside against the scored ones."""
    tokenizer = loaded.tokenizer
    foreign = encode_for(outside.rows, outside.task, tokenizer, loaded.info)
    prediction = predict_dataset(predictor, foreign, tokenizer, size, evaluation.samples, seed)
    features = None
    if loaded.info.head == "sequence":
        inside = encode_for(task.splits[split], task, tokenizer, loaded.info)
        try:
            space = fitted_space(loaded.model, tokenizer, loaded.info, size)
            of_inside, of_outside = (
                dataset_features(loaded.model, rows, tokenizer, size) for rows in (inside, foreign)
            )
            features = space, of_inside, of_outside
        except BayesLoraError as error:
            warnings.warn(f"scores by features are left out, because {error}", stacklevel=2)
    return {
        "uncertainty": evaluation.histograms(prediction),
        "ood": detected(outside, evaluation, prediction, features),
    }


def detected(
    outside: OutsideRows,
    evaluation: Evaluation,
    prediction: Prediction,
    features: tuple[FeatureSpace, Features, Features] | None = None,
) -> dict[str, Any]:
    """Return the `ood` block of `metrics.json`: AUROC, AUPR and FPR95 by measure of uncertainty and by source.

    The evaluation is of the in-distribution rows. For scores by features, `features` has those of the training rows,
    and of the in- and out-of-distribution rows.
    """
    inside, found = evaluation.uncertainties, uncertainties_of(prediction)
    if features is not None:
        space, of_inside, of_outside = features
        inside, found = inside | space.scores(*of_inside), found | space.scores(*of_outside)
    block: dict[str, Any] = {"name": outside.name, "rows": len(outside.rows), "rows_in": len(evaluation.labels)}
    block["scores"] = detection(inside, found)
    if features is not None:
        block["rows_fitted"] = len(features[0].labels)
    sources = np.asarray(outside.sources)
    kinds = list(dict.fromkeys(outside.sources))
    if len(kinds) > 1:
        block["by_source"] = {
            kind: {
                "rows": int((sources == kind).sum()),
                "scores": detection(inside, {name: values[sources == kind] for name, values in found.items()}),
            }
            for kind in kinds
        }
    return block


def described(model: nn.Module) -> dict[str, Any]:
    """Return the part of `metrics.json` about the model and the software."""
    layers = describe(model)
    widths = {layer.name: asdict(layer.posterior_to_prior) for layer in layers if layer.posterior_to_prior}
    return {
        **({"posterior": widths} if widths else {}),
        "parameters": count_parameters(model),
        "relative_bops": relative_bops(model, layers),
        "layers": [layer.to_dict() for layer in layers],
        "versions": versions(),
        "peak_memory_bytes": peak_memory(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("bayeslora", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source tree"
    return found


def peak_memory() -> int:
    """Return the peak memory so far in bytes, of the GPU if one is available, otherwise of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # Linux counts in kibibytes, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def verify_reload(
    model: nn.Module, dataset: Any, tokenizer: PreTrainedTokenizerBase, load: Callable[[], nn.Module], dtype: str
) -> None:
    """Compare the trained model with the one loaded from its files, on the first rows of a data set.

    Raises:
        RuntimeError: their outputs differ.
    """
    rows = dataset.select(range(min(_PROBE_ROWS, len(dataset))))
    outputs = [_outputs(each, rows, tokenizer) for each in (model, load())]
    # The logit of a choice that an item lacks is minus infinity in both, and their difference would be NaN.
    trained, saved = (values.masked_fill(torch.isneginf(values), 0.0) for values in outputs)
    difference = float((trained - saved).abs().max() / trained.abs().max().clamp(min=1.0))
    if not difference <= _RELOAD_TOLERANCE[dtype]:
        raise RuntimeError(
            f"the saved run differs from the trained model by {difference:.2e} (relative), "
            f"but may differ by at most {_RELOAD_TOLERANCE[dtype]:.0e}: please report this with config.yaml"
        )


def _outputs(model: nn.Module, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Return the class logits of rows, or the log-probabilities of the tokens of their answers."""
    if LABELS in rows.column_names and not has_words(rows):
        return torch.from_numpy(evaluate_text(model, rows, tokenizer).log_probability)
    return predict_dataset(model, rows, tokenizer).logits
