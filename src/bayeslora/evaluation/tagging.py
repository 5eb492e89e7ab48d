"""Scores of the tags of words: those of a classifier over all words, and of the spans that the tags mark, by seqeval.

A span counts as right if its kind, its first and its last word are. Precision, recall and F1 are over all spans of all
sentences, as seqeval and the script conlleval count them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeslora.data.spans import in_iobes, marks_spans, spans_of
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import findings
from bayeslora.evaluation.metrics import classification_scores
from bayeslora.evaluation.result import Evaluation


@dataclass(frozen=True)
class TaggingEvaluation(Evaluation):
    """`Evaluation` of a model that tags words; n is the number of words.

    Attributes:
        row: (n,) sentence number of each word.
        label_scores: `precision`, `recall`, `f1` and number of `spans` of each kind of span, by its name; {} if the
            tags mark no spans.
    """

    row: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    label_scores: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of sentences."""
        return len(np.unique(self.row))

    @property
    def words(self) -> int:
        """Number of words."""
        return len(self.labels)

    @property
    def findings(self) -> dict[str, Any]:
        """Confusion matrix of the tags, as in metrics.json.

        There is no verdict: its intervals need independent rows, and the words of one sentence are not independent.
        """
        table = findings.confusion(self.predictions.argmax(axis=1), self.labels, self.predictions.shape[1])
        return {"confusion": table}


def check_span_metrics(names: Sequence[str]) -> None:
    """Raise `BayesLoraError` if these tags mark spans but seqeval, which scores them, is missing."""
    if marks_spans(names) and find_spec("seqeval") is None:
        raise BayesLoraError("seqeval is not installed, but the score span_f1 needs it: pip install seqeval")


def tagging_scores(
    probabilities: ArrayLike, labels: ArrayLike, rows: ArrayLike, names: Sequence[str]
) -> dict[str, float]:
    """Return the scores of tags for n words.

    Args:
        probabilities: (n, C) probability of each tag.
        labels: (n,) ids of the right tags.
        rows: (n,) sentence number of each word.
        names: names of the tags by id.

    Returns:
        `span_f1`, `span_precision` and `span_recall` if the tags mark spans, and the scores of
        `metrics.classification_scores` over words.
    """
    spans, _ = span_scores(labels, np.asarray(probabilities).argmax(axis=1), rows, names)
    return {**spans, **classification_scores(probabilities, labels)}


def constant_spans(labels: ArrayLike, rows: ArrayLike, names: Sequence[str]) -> dict[str, float]:
    """Return the scores of spans where every word gets the most frequent tag; {} if the tags mark no spans."""
    ids = np.asarray(labels, dtype=np.int64)
    return span_scores(ids, np.full_like(ids, np.bincount(ids).argmax()), rows, names)[0]


def span_scores(
    labels: ArrayLike, predicted: ArrayLike, rows: ArrayLike, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return `span_f1`, `span_precision` and `span_recall`, and by kind of span its scores; {} without spans.

    The arguments are those of `tagging_scores`, but `predicted` are (n,) ids; the sentences are in order.

    Raises:
        BayesLoraError: seqeval is missing.
    """
    if not marks_spans(names):
        return {}, {}
    check_span_metrics(names)
    from seqeval.metrics import classification_report

    truth, answers = (_sentences(ids, rows, names) for ids in (labels, predicted))
    if not any(map(spans_of, [*truth, *answers])):
        return dict.fromkeys(("span_f1", "span_precision", "span_recall"), 0.0), {}
    report = classification_report(truth, answers, output_dict=True, zero_division=0)
    kinds = sorted({name[2:] for name in names if name[1:2] == "-"})
    found = {kind: _scores(report[kind]) for kind in kinds if kind in report}
    whole = _scores(report["micro avg"])
    return {f"span_{name}": whole[name] for name in ("f1", "precision", "recall")}, found


def _scores(of_kind: dict[str, Any]) -> dict[str, float]:
    names = {"precision": "precision", "recall": "recall", "f1": "f1-score", "spans": "support"}
    return {name: float(of_kind[key]) for name, key in names.items()}


def _sentences(ids: ArrayLike, rows: ArrayLike, names: Sequence[str]) -> list[list[str]]:
    """Return the names of the tags of each sentence."""
    tags = [in_iobes(names[number]) for number in np.asarray(ids)]
    cuts = np.flatnonzero(np.diff(np.asarray(rows))) + 1
    return [tags[start:end] for start, end in zip([0, *cuts], [*cuts, len(tags)], strict=True)]
