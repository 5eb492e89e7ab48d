"""What a trained model is measured by: scores, parameters, bit operations, widths; and the check of its saved copy."""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from bayeslora.cost import count_parameters, relative_bops
from bayeslora.data import Task
from bayeslora.evaluation import Evaluation, evaluate, predict_dataset
from bayeslora.methods import describe
from bayeslora.prediction import Predictable

EVALUATION, TEST = "validation", "test"
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
) -> dict[str, Any]:
    """The measured part of `metrics.json`; `scores` belong to the evaluation split.

    They are those of `predictor`, where there is one around the model.
    """
    scored_model = predictor or model
    evaluation = evaluate(scored_model, data[EVALUATION], task, tokenizer, batch_size, samples)
    found = {"metric": task.metric, **scored(evaluation), **described(model), "labels": list(task.labels)}
    if TEST in data:
        found["scores_test"] = evaluate(scored_model, data[TEST], task, tokenizer, batch_size, samples).scores
    return found


def rows_to_score(data: dict[str, Any]) -> int:
    """How many rows `measure` runs the model over."""
    return sum(len(data[name]) for name in (EVALUATION, TEST) if name in data)


def scored(evaluation: Evaluation) -> dict[str, Any]:
    """What `metrics.json` says of a model's predictions on a split."""
    return {
        "scores": evaluation.scores,
        "samples": evaluation.samples,
        "reliability": {"bins": evaluation.reliability},
        "risk_coverage": evaluation.risk_coverage,
        "uncertainty": evaluation.histograms(),
    }


def described(model: nn.Module) -> dict[str, Any]:
    """What `metrics.json` says of the model itself, and of what ran it."""
    layers = describe(model)
    return {
        "parameters": count_parameters(model),
        "relative_bops": relative_bops(model, layers),
        "layers": [layer.to_dict() for layer in layers],
        "versions": versions(),
        "peak_memory_bytes": peak_memory(),
    }


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("bayeslora", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "source tree"
    return found


def peak_memory() -> int:
    """The most memory held so far: on the GPU where there is one, of the process otherwise."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # Linux counts in kibibytes, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def verify_reload(
    model: nn.Module, dataset: Any, tokenizer: PreTrainedTokenizerBase, load: Callable[[], nn.Module], dtype: str
) -> None:
    """Compare the trained model with the one its files give back, on the first rows of a data set.

    Raises:
        RuntimeError: their outputs differ; the files do not hold what was trained.
    """
    rows = dataset.select(range(min(_PROBE_ROWS, len(dataset))))
    logits = [predict_dataset(m, rows, tokenizer).logits for m in (model, load())]
    # A choice that an item does not have is at minus infinity in both, and their difference would be no number.
    trained, saved = (values.masked_fill(torch.isneginf(values), 0.0) for values in logits)
    difference = float((trained - saved).abs().max() / trained.abs().max().clamp(min=1.0))
    if not difference <= _RELOAD_TOLERANCE[dtype]:
        raise RuntimeError(
            f"the saved run does not give the trained model's outputs back (relative difference {difference:.2e}, "
            f"at most {_RELOAD_TOLERANCE[dtype]:.0e} is allowed); please report it together with config.yaml."
        )


def save_json(path: Path, content: Any) -> None:
    """Write JSON that every parser reads: a number that is not finite becomes null."""
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def finite(content: Any) -> Any:
    """`content` with None for every number that is not finite, which JSON cannot hold."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content
