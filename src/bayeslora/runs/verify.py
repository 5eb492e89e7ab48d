r"""`verify`: how far an export's answers are from its run's, on labelled rows.

Of a regression, whose error is that of a Gaussian with variance one, the divergence of two values is
$(a - b)^2 / 2$ nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from bayeslora.data import Task
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import evaluate
from bayeslora.export.agreement import Agreement, compare
from bayeslora.export.formats import output_of
from bayeslora.export.record import EXACT, ExportRecord
from bayeslora.methods.layer import device_of, evaluation_mode
from bayeslora.runs.base import quiet_loading, ready
from bayeslora.runs.exports import format_of, load_for_others
from bayeslora.runs.info import RUN_FILE, RunInfo
from bayeslora.runs.rows import encode_for
from bayeslora.runs.run import Run, load
from bayeslora.vocabulary import FORMATS_FOR_OTHERS

_SMALLEST = 1e-12  # a probability that float32 logits may round to zero


@dataclass(frozen=True)
class Verified:
    """The agreement of an export with its run.

    Attributes:
        format: of the export.
        rows: number of rows that were compared.
        answers: number of answers: the rows, or the tokens of a run that generates text.
        changed: share of other answers; None for regression.
        divergence: mean Kullback-Leibler divergence of the export from the run, in nats.
        max_divergence: the largest of an answer.
        metric: name of the score.
        score_before: of the run.
        score_after: of the export.
        tolerance: largest divergence with which the export agrees.
        max_changed: largest share of other answers with which it agrees; None for any.
    """

    format: str
    rows: int
    answers: int
    changed: float | None
    divergence: float
    max_divergence: float
    metric: str
    score_before: float
    score_after: float
    tolerance: float
    max_changed: float | None = None

    @property
    def agrees(self) -> bool:
        """Return whether divergence and changes are within the tolerance."""
        few = self.max_changed is None or self.changed is None or self.changed <= self.max_changed
        return few and self.divergence <= self.tolerance


def verify(
    folder: Path,
    run: Run,
    task: Task,
    split: str,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    max_divergence: float | None = None,
    max_changed: float | None = None,
) -> Verified:
    """Compare an export with its run at the mean of the weights, on a split of a task.

    Args:
        folder: the export.
        run: that it was written from.
        task, split: the rows.
        limit: number of rows, the first ones; None (default) for all.
        batch_size: rows at once, by default 64.
        max_divergence: tolerance in nats; by default the one in the export's `export.json`, or 1e-4 without the file.
        max_changed: share of changed answers to allow; None (default) for any.

    Raises:
        BayesLoraError: a folder that is not an export, or one of another run.
    """
    for name, value in (("max_divergence", max_divergence), ("max_changed", max_changed)):
        if value is not None and not value >= 0:
            raise BayesLoraError(f"{name} is {value:g}, but must be at least 0: give a larger one")
    form, model = load_export(folder, run)
    record = ExportRecord.load(folder)
    recorded = EXACT if record is None else record.tolerance
    tolerance = recorded if max_divergence is None else max_divergence
    rows = task.splits[split]
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    encoded = encode_for(rows, task, run.tokenizer, run.info)
    if run.kind == "generation":
        found = _of_tokens(run, model, encoded)
    else:
        found = _of_answers(run, model, encoded, task, batch_size)
    return Verified(format=form, rows=len(encoded), tolerance=tolerance, max_changed=max_changed, **found)


@quiet_loading()
def load_export(folder: Path, run: Run) -> tuple[str, nn.Module]:
    """Return the format of an export and its model, in evaluation mode.

    Raises:
        BayesLoraError: a folder that is not an export, or one that another run was written to.
    """
    form = format_of(folder)
    device = device_of(run.model)
    if form in FORMATS_FOR_OTHERS:
        return form, ready(load_for_others(form, folder, run.info, run.tokenizer), device)
    if (folder / RUN_FILE).is_file():
        own = RunInfo.load(folder)
        if (own.task, own.labels) != (run.info.task, run.info.labels):
            trained = own.task if own.task != run.info.task else f"{own.task} with labels {', '.join(own.labels)}"
            given = run.info.task if own.task != run.info.task else f"it with {', '.join(run.info.labels)}"
            raise BayesLoraError(
                f"{folder} was exported from a run on {trained}, but {run.folder} is one on {given}: give the run of "
                "the export"
            )
    spread = getattr(run.model, "hf_device_map", None) if form != "integer" else None
    place: dict[str, Any] = {"device": device} if spread is None else {"device_map": spread}
    return form, load(folder, run.info.model, tokenizer=run.tokenizer, **place).model


def _of_answers(run: Run, model: nn.Module, encoded: Dataset, task: Task, size: int) -> dict[str, Any]:
    """Return the agreement on rows with labels."""
    before, after = (evaluate(each, encoded, task, run.tokenizer, size) for each in (run.model, model))
    expected, found = before.predictions, after.predictions
    if expected.ndim == 1:
        divergences, changed = (expected - found) ** 2 / 2, None
    else:
        several = task.kind == "multi_label"
        answers = [each > 0.5 if several else each.argmax(1)[:, None] for each in (expected, found)]
        if several:  # a yes or no for each label, independent of the others
            expected, found = (np.concatenate([each, 1 - each], axis=1) for each in (expected, found))
        logs = [np.log(np.clip(each, _SMALLEST, None)) for each in (expected, found)]
        divergences = np.clip((expected * (logs[0] - logs[1])).sum(1), 0, None)
        changed = float((answers[0] != answers[1]).any(axis=1).mean())
    return {
        "answers": len(expected),
        "changed": changed,
        "divergence": float(divergences.mean()),
        "max_divergence": float(divergences.max()),
        "metric": task.metric,
        "score_before": before.scores[task.metric],
        "score_after": after.scores[task.metric],
    }


def _of_tokens(run: Run, model: nn.Module, encoded: Dataset) -> dict[str, Any]:
    """Return the agreement on the next tokens of texts; the score is the negative log-likelihood of a token."""
    device = device_of(run.model)

    def outputs(each: nn.Module) -> Any:
        return lambda row: cast(Tensor, output_of(each, {name: ids.to(device) for name, ids in row.items()}))

    batches = ({"input_ids": torch.tensor([ids])} for ids in encoded["input_ids"])
    with evaluation_mode(run.model):
        agreement: Agreement = compare(outputs(run.model), outputs(model), batches)
    found = agreement.summary()
    return {
        "answers": agreement.positions,
        **{name: found[name] for name in ("changed", "divergence", "max_divergence")},
        "metric": "nll",
        "score_before": found.get("loss_before", float("nan")),
        "score_after": found.get("loss_after", float("nan")),
    }
