"""Write answers of a language model as an HTML page whose tokens are shaded by their uncertainty."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bayeslora.errors import BayesLoraError
from bayeslora.report.page import environment, write_files

if TYPE_CHECKING:
    from bayeslora.runs.answers import Answer

_DARKEST = 0.95
"""Quantile of a measure, over all tokens, with the darkest shade: a few extreme tokens must not hide the rest."""
LEAST_ENTROPY = 0.5
"""Least entropy in nats with the darkest shade: of a word at 80% and another at 20%."""
LEAST_INFORMATION = 0.02
"""Least mutual information in nats with the darkest shade: of two words at 60 and 40%, which half the draws swap."""


@dataclass(frozen=True)
class ShadedToken:
    """A token as it is shown: its text, its measures in nats, and its shades between 0 and 1."""

    text: str
    entropy: float
    mutual_information: float
    by_entropy: float
    by_information: float
    ends: bool = False


def write_answers(path: str | Path, answers: Sequence[Answer], title: str = "Answers", about: str = "") -> Path:
    """Write a self-contained HTML page of answers, in their order, and return its path.

    Tokens are shaded by mutual information, or after a click by entropy. Groups of the draws' answers follow below.

    Args:
        path: HTML file to write; replaced if it exists.
        answers: answers from `Run.generate`.
        title: heading of the page.
        about: line under the heading, such as the run and the number of samples.

    Raises:
        BayesLoraError: there are no answers, or the file cannot be written.
    """
    if not answers:
        raise BayesLoraError("0 answers were given, but a page needs at least 1: generate some")
    tops = (
        _top([value for answer in answers for value in answer.entropy], LEAST_ENTROPY),
        _top([value for answer in answers for value in answer.mutual_information], LEAST_INFORMATION),
    )
    shown = [
        {
            "answer": answer,
            "tokens": _shaded(answer, *tops),
            "information": max(answer.mutual_information, default=0.0),
            "nats_a_token": -answer.mixture_log_probability / max(1, len(answer.tokens)),
        }
        for answer in answers
    ]
    html = environment().get_template("answers.html.j2").render(
        title=title, about=about, shown=shown, top_entropy=tops[0], top_information=tops[1],
        least_entropy=LEAST_ENTROPY, least_information=LEAST_INFORMATION,
        is_sure=max(value for answer in answers for value in (0.0, *answer.mutual_information)) < LEAST_INFORMATION,
        has_draws=any(answer.draw_log_probabilities for answer in answers),
    )  # fmt: skip
    target = Path(path)
    return write_files(target.parent, {target.name: html.encode()})[0]


def shade(answer: Answer) -> list[ShadedToken]:
    """Return the tokens of one answer, shaded by its own largest measures."""
    return _shaded(answer, _top(answer.entropy, LEAST_ENTROPY), _top(answer.mutual_information, LEAST_INFORMATION))


def _top(values: Sequence[float], least: float) -> float:
    """Return the value of the darkest shade, which is not below `least`: noise must not look like doubt."""
    if len(values) < 2:
        return max(least, *values)
    return max(least, statistics.quantiles(values, n=100, method="inclusive")[round(100 * _DARKEST) - 1])


def _shaded(answer: Answer, top_entropy: float, top_information: float) -> list[ShadedToken]:
    """Return the tokens to show; one inside a character adds to the next, which shows the larger measures."""
    found = []
    entropy = information = 0.0
    last = len(answer.tokens) - 1
    for place, text in enumerate(answer.tokens):
        entropy = max(entropy, answer.entropy[place])
        information = max(information, answer.mutual_information[place])
        if text or place == last:
            shades = min(1.0, entropy / top_entropy), min(1.0, information / top_information)
            found.append(ShadedToken(text, entropy, information, *shades, ends=answer.is_finished and place == last))
            entropy = information = 0.0
    return found
