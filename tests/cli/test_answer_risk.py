"""Answers that are left to a person: from labelled rows to `generate --risk`, by the commands and in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bayeslora
from bayeslora.cli.main import main
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.text_metrics import token_f1
from bayeslora.runs.answer_risk import RISK_FILE, AnswerCalibration
from tests.cli.conftest import write_jsonl
from tests.runs.text_runs import pairs, trained

Refused = Callable[..., str]
ROWS = [*pairs(40), *({"prompt": "who how ?", "completion": " the hat"} for _ in range(40))]
"""The first half is what the run has learned by heart; to the rest it has another answer."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_causal_folder: Path) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "out", tiny_causal_folder, pairs(40), "melora", steps=60)


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory, tiny_causal_folder: Path) -> Path:
    """A run that has learned the answers by heart; its draws are of tokens."""
    return trained(tmp_path_factory.mktemp("runs") / "sure", tiny_causal_folder, pairs(40), "full", steps=60)


def generated(folder: Path, source: Path, target: Path, *options: str) -> list[dict[str, Any]]:
    assert main(["generate", str(folder), "--input", str(source), "--output", str(target), *options]) == 0
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def test_answers_below_the_threshold_keep_the_risk(
    sure: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    options = ["--eval-file", str(rows), "--samples", "2", "--seed", "3", "--max-new-tokens", "6"]
    options += ["--token-temperature", "1"]
    assert main(["calibrate", str(sure), *options, "--loss", "exact_match"]) == 0
    printed = capsys.readouterr().out
    assert f"{sure / RISK_FILE}: 80 rows of {rows}, 2 samples" in printed and "mean of 1 - exact_match" in printed
    found = json.loads((sure / RISK_FILE).read_text(encoding="utf-8"))
    assert (found["rows"], found["measure"], found["loss"], found["sampling"]["seed"]) == (
        80,
        "probability",
        "exact_match",
        3,
    )
    answers = generated(sure, rows, tmp_path / "a.jsonl", "--risk", "0.2", "--html", str(tmp_path / "a.html"))
    given = [answer for answer in answers if not answer["ask_a_human"]]
    assert 0 < len(given) < 80 and f"{80 - len(given)} left to a person" in capsys.readouterr().out
    wrong = [answer["text"] != answer["reference"].strip() for answer in given]
    assert sum(wrong) / len(wrong) < 0.2
    limit = AnswerCalibration.load(sure).control.threshold(0.2).uncertainty
    for answer in answers:
        assert len(answer["draws"]) == 2, "made as the calibration's"
        assert answer["ask_a_human"] == (-answer["mixture_log_probability"] >= limit)
    assert (tmp_path / "a.html").read_text(encoding="utf-8").count("ask a person") == 80 - len(given)


def test_a_calibration_in_python_has_the_losses_of_its_answers(run: Path) -> None:
    loaded = bayeslora.load(run)
    options: dict[str, Any] = {"samples": 2, "max_new_tokens": 6}
    calibration = loaded.calibrate_answers(ROWS[35:45], measure="mutual_information", save=False, **options)
    answers = loaded.generate(ROWS[35:45], **options)
    f1 = token_f1([answer.text for answer in answers], [[row["completion"].strip()] for row in ROWS[35:45]])
    assert sorted(calibration.control.losses) == pytest.approx(sorted(1 - f1))
    means = [sum(answer.mutual_information) / len(answer.tokens) for answer in answers]
    assert list(calibration.control.uncertainty) == pytest.approx(sorted(means))
    assert calibration.control.delta == 0.05 and calibration.loss == "f1"


def test_an_encoder_groups_the_answers(run: Path, tiny_bert_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "who how ?"}, {"prompt": "who ran ?"}])
    options = ["--samples", "6", "--temperature", "30", "--max-new-tokens", "3"]
    apart = generated(run, source, tmp_path / "a.jsonl", *options)
    encoder = ["--cluster-with", str(tiny_bert_folder), "--similarity"]
    near = generated(run, source, tmp_path / "b.jsonl", *options, *encoder, "0.0001")
    far = generated(run, source, tmp_path / "c.jsonl", *options, *encoder, "1")
    assert [answer["clusters"] for answer in far] == [answer["clusters"] for answer in apart]
    assert max(len(answer["clusters"]) for answer in apart) > 1
    for some, all_ in zip(near, apart, strict=True):
        assert some["draws"] == all_["draws"] and len(some["clusters"]) <= len(all_["clusters"])
        assert sum(cluster["count"] for cluster in some["clusters"]) == 6
        assert some["semantic_entropy"] <= all_["semantic_entropy"]
    assert near != apart


def test_what_does_not_fit_is_refused(run: Path, tmp_path: Path, refused: Refused) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS[:4])
    bayeslora.load(run).calibrate_answers(rows, samples=2)
    ask = ["generate", run, "--prompt", "who ran ?"]
    assert "samples is 3, but" in refused(*ask, "--risk", 0.1, "--samples", 3)
    assert "--risk is 2, but must be between 0 and 1" in refused(*ask, "--risk", 2)
    assert "--delta is given, but needs --risk" in refused(*ask, "--delta", 0.1)
    assert "--similarity is given, but needs --cluster-with" in refused(*ask, "--similarity", 0.5)
    assert "--cluster-with is given, but needs --samples" in refused(*ask, "--cluster-with", "x")
    assert "--similarity is 2" in refused(*ask, "--samples", 2, "--cluster-with", "x", "--similarity", 2)
    calibrate = ["calibrate", run, "--eval-file", rows]
    assert "--measure is semantic_entropy, but it needs draws" in refused(*calibrate, "--measure", "semantic_entropy")
    assert "--score is given, but the run generates text" in refused(*calibrate, "--score", "lac")
    assert "the run was trained on them" in refused("calibrate", run, "--eval-file", run.parent / "out.jsonl")
    content = (run / RISK_FILE).read_text(encoding="utf-8")
    (run / RISK_FILE).write_text(json.dumps({**json.loads(content), "fingerprint": "another"}), encoding="utf-8")
    assert "was made for the model another" in refused(*ask, "--risk", 0.1)
    for damage in (
        content[:-30],
        content.replace('"probability"', '"none"'),
        content.replace('"seed"', '"sed"'),
        "[]",
    ):
        (run / RISK_FILE).write_text(damage, encoding="utf-8")
        with pytest.raises(BayesLoraError, match=f"{RISK_FILE} is damaged"):
            AnswerCalibration.load(run)
    (run / RISK_FILE).write_text(json.dumps({**json.loads(content), "version": 99}), encoding="utf-8")
    with pytest.raises(BayesLoraError, match=f"{RISK_FILE} is of a newer version"):
        AnswerCalibration.load(run)
    (run / RISK_FILE).unlink()
    assert f"lacks {RISK_FILE}, but a risk needs it" in refused(*ask, "--risk", 0.1)
