"""The sentences at the head of a report: each case says what its numbers say."""

from __future__ import annotations

from typing import Any

import pytest

from bayeslora.report.verdict import Statement, verdict
from bayeslora.runs.record import RunRecord
from tests.report.synthetic import make_metrics

CONFUSION = [[700, 40], [60, 200]]


def interval(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def level(risk: float, confidence: float, coverage: float, errors: float) -> dict[str, float]:
    return {"risk": risk, "confidence": confidence, "coverage": coverage, "errors": errors}


def said(
    gain: Any = (0.16, 0.13, 0.19), gap: Any = (0.04, 0.02, 0.06), five: Any = (0.93, 0.6, 0.031), **changes: Any
) -> list[Statement]:
    found: dict[str, Any] = {
        "gain": interval(*gain), "overconfidence": interval(*gap),
        "thresholds": [level(0.05, *five), level(0.2, 0.5, 0.9, 0.15)],
    }  # fmt: skip
    changes = {"scores": {"accuracy": 0.9}, **changes}
    metrics = make_metrics(**{"verdict": found, "rows": 1000, "confusion": CONFUSION, **changes})
    return verdict(RunRecord.from_dict({**metrics, "metric": "accuracy"}))


def test_a_useful_model_is_said_so_with_its_numbers() -> None:
    better, sure, over, means = said()
    assert (better.heading, better.tone) == ("Better than a constant answer", "good")
    assert "90.0 % of 1,000 rows are right" in better.text
    assert "“rotten”, for every row would be right for 74.0 %" in better.text
    assert "16.0 points (95 % interval 13.0 to 19.0)" in better.text
    assert (sure.heading, sure.tone) == ("Overconfident by 4.0 points", "bad")
    assert "94.0 % sure on average and right in 90.0 %" in sure.text
    assert over.heading == "Hand over 400 of 1,000 rows for at most 5 % errors"
    assert "at most 0.930" in over.text and "3.1 % are wrong here" in over.text
    assert "give the other rows to a person" in means.text and "calibrate OUT --temperature" in means.text


def test_an_interval_with_zero_is_no_gain_and_no_gap() -> None:
    better, sure, _, means = said(gain=(0.01, -0.01, 0.03), gap=(0.01, -0.01, 0.03))
    assert better.heading == "Not clearly better than a constant answer" and better.tone == "bad"
    assert sure.heading == "Its confidence fits on average" and sure.tone == "good"
    assert means.text.startswith("Do not use it yet") and "temperature" not in means.text
    assert said(gain=(-0.1, -0.2, -0.05))[0].heading == "Worse than a constant answer"


def test_underconfidence_has_a_positive_interval() -> None:
    sure = said(gap=(-0.2, -0.24, -0.16))[1]
    assert sure.heading == "Underconfident by 20.0 points"
    assert "too little (95 % interval 16.0 to 24.0)" in sure.text


@pytest.mark.parametrize(
    ("gain", "gap", "steps", "expected"),
    [
        ((0.4, 0.3, 0.5), (-0.2, -0.24, -0.16), 36, True),
        ((0.01, -0.01, 0.03), (0.01, -0.01, 0.03), 36, True),
        ((0.4, 0.3, 0.5), (-0.2, -0.24, -0.16), 300, False),
        ((0.4, 0.3, 0.5), (0.2, 0.16, 0.24), 36, False),
    ],
)
def test_few_steps_are_told_where_the_run_lacks_what_more_could_give(
    gain: Any, gap: Any, steps: int, expected: bool
) -> None:
    means = said(gain=gain, gap=gap, steps=steps)[-1].text
    assert ("36 steps of training are few: train longer." in means) is expected


@pytest.mark.parametrize(("nll", "expected"), [(3.2, True), (0.7, False)])
def test_a_run_that_has_diverged_needs_a_smaller_rate_before_more_steps(nll: float, expected: bool) -> None:
    """The NLL of a constant is 0.57 here: one that is far above it does not come of few steps."""
    scores, baseline = {"accuracy": 0.74, "nll": nll}, {"accuracy": 0.74, "nll": 0.57}
    means = said(gain=(0.0, -0.01, 0.01), gap=(0.2, 0.1, 0.3), steps=36, scores=scores, baseline=baseline)[-1].text
    assert ("Lower the learning rate first." in means) is expected
    assert ("train longer" in means) is not expected


def test_an_untrained_head_has_not_diverged() -> None:
    """It answers all of four classes alike, of which the rows have two."""
    scores, baseline = {"accuracy": 0.74, "nll": 1.4}, {"accuracy": 0.74, "nll": 0.57}
    changes = {"gain": (0.0, -0.01, 0.01), "steps": 4, "scores": scores, "baseline": baseline}
    assert "Lower the learning rate first." in said(**changes)[-1].text
    confusion = [[700, 0, 0, 40], [60, 200, 0, 0], [0] * 4, [0] * 4]
    text = said(**changes, labels=["a", "b", "c", "d"], confusion=confusion)[-1].text
    assert "Lower the learning rate first." not in text and "4 steps of training are few" in text


@pytest.mark.parametrize(
    ("five", "heading", "words"),
    [
        ((0.0, 1.0, 0.02), "No rows to hand over for at most 5 % errors", "2.0 % of the answers are wrong"),
        ((2.0, 0.0, 0.0), "All rows to hand over for at most 5 % errors", "For 20 %, hand over 100 of 1,000 rows"),
    ],
)
def test_all_and_none_are_said_in_words(five: Any, heading: str, words: str) -> None:
    over = said(five=five)[2]
    assert over.heading == heading and words in over.text


def test_a_calibrated_run_is_not_told_to_calibrate() -> None:
    assert "temperature" not in said(calibrated={"by": "temperature 1.3", "rows": 100, "source": "x"})[3].text


def test_numbers_are_told_with_their_error_and_its_width() -> None:
    found = {
        "gain": interval(1.5, 1.2, 1.8),
        "spread": {"coverage": 0.9, "half_width": 1.35, "observed": 0.903},
    }
    metrics = make_metrics(verdict=found, scores={"pearson": 0.8, "mse": 0.5}, labels=[], reliability={"bins": []})
    better, width, means = verdict(RunRecord.from_dict({**metrics, "metric": "pearson"}))
    assert "0.500; the mean number for every row has 2.000" in better.text and "75.0 % less" in better.text
    assert width.heading == "Within ± 1.350 in 90 % of the rows" and "90.3 %" in width.text
    assert "calibrate" in means.text


def test_text_is_told_by_its_tokens_and_older_files_are_not_judged() -> None:
    bins = [{"lower": 0, "upper": 1, "count": 200, "confidence": 0.7, "accuracy": 0.6}]
    metrics = make_metrics(scores={"token_accuracy": 0.6}, labels=[], reliability={"bins": bins})
    (tokens,) = verdict(RunRecord.from_dict({**metrics, "metric": "token_accuracy"}))
    wanted = ["60.0 % of 200 tokens", "70.0 % sure", "10.0 points too much"]
    assert [words for words in wanted if words not in tokens.text] == []
    assert verdict(RunRecord.from_dict({**make_metrics(), "metric": "accuracy"})) == []
