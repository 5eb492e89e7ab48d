"""Say in words what the numbers of a run mean for the person who will use it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bayeslora.errors import counted
from bayeslora.report.text import count, number, percent
from bayeslora.runs.record import Interval, RunRecord, ThresholdRecord

MAIN_RISK = 0.05
"""The error rate among answers that the report decides for."""
ENOUGH_STEPS = 300
"""Training steps from which on more of them are hardly what a poor run lacks."""
FAR_ABOVE = 1.5
"""Multiple of a constant's NLL from which on a run has more likely diverged than stopped early."""
_FEW_ROWS = 200
_USABLE = "Use its numbers where errors of this width are acceptable; `bayeslora calibrate OUT` keeps intervals."
_NOT_YET = "Do not use it yet: check the labels, train longer, or give it more rows."
_ALL, _NONE = 0.0, 2.0  # thresholds that every confidence is above, and that none is above
Tone = Literal["good", "bad", "plain"]


@dataclass(frozen=True)
class Statement:
    """A heading of a few words, the sentences behind it, and whether it is good or bad news."""

    heading: str
    text: str
    tone: Tone = "plain"


def verdict(run: RunRecord) -> list[Statement]:
    """Return the statements of a run, the most important first; [] if it lacks the numbers, as of an older version."""
    gain = run.verdict.gain
    if gain is None:
        return _of_tokens(run)
    if run.verdict.overconfidence is None:
        use = _USABLE if gain.low > 0 else _NOT_YET
        return [_gain_in_error(run, gain), *_spread(run), Statement("What this means", use)]
    found = [_gain_in_accuracy(run, gain), _confidence(run, run.verdict.overconfidence)]
    chosen = threshold(run)
    return [*found, *([] if chosen is None else [_hand_over(run, chosen)]), _meaning(run, chosen)]


def is_undertrained(run: RunRecord) -> bool:
    """Return whether few steps may be why a run is no better than a constant, or right more often than it says."""
    gain, gap = run.verdict.gain, run.verdict.overconfidence
    bad = (gain is not None and gain.low <= 0) or (gap is not None and gap.high < 0)
    return bad and run.steps is not None and run.steps < ENOUGH_STEPS and not has_diverged(run)


def has_diverged(run: RunRecord) -> bool:
    """Return whether a run is no better than a constant and its NLL far above: more steps will not mend that.

    An untrained head answers every class alike, which is not far above, however few of its classes the rows have.
    """
    gain, constant = run.verdict.gain, run.baseline.get("nll", math.inf)
    constant = max(constant, math.log(len(run.labels) or 1))
    return gain is not None and gain.low <= 0 and run.scores.get("nll", 0.0) > FAR_ABOVE * constant


def threshold(run: RunRecord, risk: float = MAIN_RISK) -> ThresholdRecord | None:
    """Return the threshold of a run for a level of risk; None without one."""
    return next((found for found in run.verdict.thresholds if found.risk == risk), None)


def handed_over(run: RunRecord, chosen: ThresholdRecord) -> str:
    """Return how many rows are handed to a person, as `612 of 1,066`; as a share if the number of rows is unknown."""
    if run.rows is None:
        return percent(1 - chosen.coverage)
    return f"{count((1 - chosen.coverage) * run.rows)} of {count(run.rows)}"


def most_frequent(run: RunRecord) -> str:
    """Return the label with the most rows; "" if it is unknown."""
    classes = run.classes
    return max(classes, key=lambda found: found.rows).label if classes else ""


def points(share: float) -> str:
    """Format a difference of shares as percentage points."""
    return f"{100 * share:.1f}"


def _interval(interval: Interval) -> str:
    return f"95 % interval {points(interval.low)} to {points(interval.high)}"


def _gain_in_accuracy(run: RunRecord, gain: Interval) -> Statement:
    accuracy = run.scores["accuracy"]
    label = most_frequent(run)
    constant = f"the most frequent label, “{label}”," if label else "the most frequent label"
    rows = "the rows" if run.rows is None else counted(run.rows, "row")
    text = (
        f"{percent(accuracy)} of {rows} are right; {constant} for every row would be right for "
        f"{percent(accuracy - gain.mean)}. The difference is {points(gain.mean)} points ({_interval(gain)})."
    )
    if gain.low > 0:
        return Statement("Better than a constant answer", text, "good")
    if gain.high < 0:
        return Statement("Worse than a constant answer", text, "bad")
    return Statement("Not clearly better than a constant answer", text + " The interval includes 0.", "bad")


def _confidence(run: RunRecord, gap: Interval) -> Statement:
    accuracy = run.scores["accuracy"]
    text = f"It is {percent(accuracy + gap.mean)} sure on average and right in {percent(accuracy)} of the rows"
    if gap.has_zero:
        text += f"; so many rows cannot tell these apart ({_interval(gap)} points)."
        return Statement("Its confidence fits on average", text, "good")
    text += f": {points(abs(gap.mean))} points "
    if gap.mean > 0:
        text += f"too much ({_interval(gap)}). Its probabilities claim more than they keep."
        return Statement(f"Overconfident by {points(gap.mean)} points", text, "bad")
    turned = Interval(-gap.mean, -gap.high, -gap.low)
    text += f"too little ({_interval(turned)}). It is right more often than it says."
    return Statement(f"Underconfident by {points(-gap.mean)} points", text, "bad")


def _hand_over(run: RunRecord, chosen: ThresholdRecord) -> Statement:
    level = f"{100 * chosen.risk:g} %"
    if chosen.confidence == _ALL:
        text = f"{percent(chosen.errors)} of the answers are wrong; of new ones at most {level} with 95 % probability."
        return Statement(f"No rows to hand over for at most {level} errors", text, "good")
    if chosen.confidence == _NONE:
        text = f"These rows support no threshold that keeps errors among its answers below {level}."
        other = next((found for found in run.verdict.thresholds if found.coverage), None)
        if other is not None:
            text += f" For {100 * other.risk:g} %, hand over {handed_over(run, other)} rows."
        return Statement(f"All rows to hand over for at most {level} errors", text, "bad")
    text = (
        f"A person decides where its confidence is at most {number(chosen.confidence)}. Of the other rows "
        f"{percent(chosen.errors)} are wrong here; among new rows from the same source at most {level}, with 95 % "
        "probability."
    )
    return Statement(f"Hand over {handed_over(run, chosen)} rows for at most {level} errors", text)


def _meaning(run: RunRecord, chosen: ThresholdRecord | None) -> Statement:
    gain, gap = run.verdict.gain, run.verdict.overconfidence
    assert gain is not None and gap is not None
    said = []
    if has_diverged(run):
        said.append("Do not use it: its NLL is far above a constant answer's. Lower the learning rate first.")
    elif gain.low <= 0:
        said.append(_NOT_YET)
    elif chosen is None or chosen.confidence == _NONE:
        said.append("Use its answers as suggestions that a person checks.")
    elif chosen.confidence == _ALL:
        said.append("Its answers can be used without a check where so few errors are acceptable.")
    else:
        said.append("Use the answers it is sure of, and give the other rows to a person.")
    if not gap.has_zero and not run.calibrated:
        said.append("`bayeslora calibrate OUT --temperature`, on rows it has not seen, mends its confidence.")
    if is_undertrained(run):
        said.append(f"{counted(run.steps or 0, 'step')} of training are few: train longer.")
    if run.rows is not None and run.rows < _FEW_ROWS:
        said.append(f"{counted(run.rows, 'row')} of data: with more, the intervals and the share to hand over shrink.")
    return Statement("What this means", " ".join(said))


def _gain_in_error(run: RunRecord, gain: Interval) -> Statement:
    error = run.scores["mse"]
    constant = error + gain.mean
    text = (
        f"Its mean squared error is {number(error)}; the mean number for every row has {number(constant)}. The "
        f"difference is {number(gain.mean)} (95 % interval {number(gain.low)} to {number(gain.high)})"
    )
    if gain.low > 0:
        return Statement("Better than a constant answer", f"{text}: {percent(gain.mean / constant)} less.", "good")
    return Statement(f"{'Worse' if gain.high < 0 else 'Not clearly better'} than a constant answer", f"{text}.", "bad")


def _spread(run: RunRecord) -> list[Statement]:
    spread = run.verdict.spread
    if spread is None:
        return []
    share = f"{100 * spread.coverage:g} %"
    text = f"An interval of this width around each prediction holds at least {share} of new rows from the same source."
    if spread.observed is not None:
        text += f" Measured, with one half of these rows setting the width for the other: {percent(spread.observed)}."
    return [Statement(f"Within ± {number(spread.half_width)} in {share} of the rows", text)]


def _of_tokens(run: RunRecord) -> list[Statement]:
    """Return how often a run tags a word rightly, or a language model predicts the next token, and how sure it is."""
    if run.words is not None:
        return _of_words(run)
    accuracy = run.scores.get("token_accuracy")
    tokens = sum(found.count for found in run.reliability.bins)
    if accuracy is None or not tokens:
        return []
    text = (
        f"It predicts {percent(accuracy)} of {count(tokens)} tokens of the known answers, each from those before it, "
        f"and is {_sureness(run, accuracy)}. An answer can be right in other words."
    )
    return [Statement("Token by token", text)]


def _of_words(run: RunRecord) -> list[Statement]:
    """Return how often a run tags a word rightly, and how sure it is.

    There are no intervals, which need rows that are independent of each other.
    """
    accuracy, constant = run.scores["accuracy"], run.baseline.get("accuracy")
    text = (
        f"It tags {percent(accuracy)} of {count(run.words)} words rightly; “{most_frequent(run)}” for every word "
        f"would be right for {percent(constant)}. It is {_sureness(run, accuracy)}."
    )
    if "span_f1" in run.scores:
        text += f" Of the spans it finds {percent(run.scores['span_recall'])} whole, and of those that it claims "
        text += f"{percent(run.scores['span_precision'])} are right."
    return [Statement("Word by word", text)]


def _sureness(run: RunRecord, accuracy: float) -> str:
    """Return the mean confidence, and how far it is from the accuracy."""
    filled = run.reliability.filled
    sure = sum(found.count * found.confidence for found in filled) / max(1, sum(found.count for found in filled))
    too = "too much" if sure > accuracy else "too little"
    return f"{percent(sure)} sure on average: {points(abs(sure - accuracy))} points {too}"
