"""The page of answers: every token with its shade and numbers, nothing fetched, and nothing of a text run as code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bayeslora.errors import BayesLoraError
from bayeslora.report import write_answers
from bayeslora.report.play import answer_html
from bayeslora.runs.answers import Answer
from bayeslora.runs.clusters import Cluster
from tests.report.test_page import read_page

HOSTILE = "<script>alert('x')</script>"


def answer(**changes: Any) -> Answer:
    fields: dict[str, Any] = {
        "prompt": "who & why?",
        "text": "the cat",
        "tokens": ["the", " cat", "</s>"],
        "entropy": [2.0, 1.0, 0.0],
        "mutual_information": [0.0, 0.5, 0.25],
        "log_probability": -3.0,
        "mixture_log_probability": -6.0,
        "draw_log_probabilities": [-3.0, -4.0],
        "draws": ["the cat", "a dog"],
        "clusters": [Cluster("the cat", 1), Cluster("a dog", 1)],
        "semantic_entropy": 0.6931,
    }
    return Answer(**{**fields, **changes})


def spans(page: str) -> list[tuple[float, float, str]]:
    """Shades by entropy and by information, and the text, of every token."""
    found = re.findall(r'<span style="--e:([\d.]+);--m:([\d.]+)"[^>]*>([^<]*)</span>', page)
    return [(float(entropy), float(information), text) for entropy, information, text in found]


def test_tokens_are_shaded_in_proportion_to_their_uncertainty(tmp_path: Path) -> None:
    page = write_answers(tmp_path / "a.html", [answer()], about="mine").read_text(encoding="utf-8")
    found = spans(page)
    assert [text for _, _, text in found] == ["the", " cat", "end"]
    # The darkest shade is the 95th percentile: 1.9 of 0, 1 and 2, and 0.475 of 0, 0.25 and 0.5.
    assert [shade for shade, _, _ in found] == pytest.approx([1.0, 1 / 1.9, 0.0], abs=1e-3)
    assert [shade for _, shade, _ in found] == pytest.approx([0.0, 1.0, 0.25 / 0.475], abs=1e-3)
    assert 'title="entropy 1.000, mutual information 0.5000 nats"' in page
    text = " ".join(read_page(tmp_path / "a.html").text)
    for shown in (
        "who & why?",
        "semantic entropy 0.693",
        "2.000 nats a token",
        "2 draws, 2 different answers",
        "mine",
    ):
        assert shown in text


def test_a_piece_of_html_shades_one_answer_by_its_draws_or_without_them_by_entropy() -> None:
    shades = r'--shade:([\d.]+)" title="[^"]*">([^<]*)<'
    with_draws = answer_html(answer(prompt=HOSTILE, tokens=["the", HOSTILE, "</s>"]))
    assert "script" not in re.sub("&lt;script&gt;|&lt;/script&gt;", "", with_draws)
    assert [float(each) for each, _ in re.findall(shades, with_draws)] == pytest.approx([0, 1, 0.526], abs=1e-3)
    assert "1 of 2: a dog" in with_draws and "Semantic entropy 0.693" in with_draws
    alone = answer_html(answer(draw_log_probabilities=[], draws=[], clusters=[], semantic_entropy=None))
    assert [float(each) for each, _ in re.findall(shades, alone)] == pytest.approx([1, 0.526, 0], abs=1e-3)
    assert re.findall(shades, alone)[-1][1] == "⏎" and "the draws" not in alone


def test_noise_is_not_shaded_like_doubt(tmp_path: Path) -> None:
    quiet = answer(entropy=[0.05, 0.0, 0.0], mutual_information=[6e-5, 2e-5, 0.0])
    for answers in ([quiet], [quiet] * 40):
        page = write_answers(tmp_path / "a.html", answers).read_text(encoding="utf-8")
        assert [(entropy, information) for entropy, information, _ in spans(page)][:3] == [
            (0.1, 0.003),
            (0, 0.001),
            (0, 0),
        ]
        assert "0.02 nats" in page and "the draws hardly disagree" in page
    loud = write_answers(tmp_path / "b.html", [quiet, answer()]).read_text(encoding="utf-8")
    assert "the draws hardly disagree" not in loud and max(each for _, each, _ in spans(loud)) == 1.0
    shown = re.findall(r"--shade:([\d.]+)", answer_html(quiet))
    assert [float(each) for each in shown] == [0.003, 0.001, 0]


def test_a_piece_of_a_character_adds_to_the_one_that_has_it(tmp_path: Path) -> None:
    parts = answer(
        tokens=["B", "", "ä", "r"], entropy=[0, 3, 1, 0], mutual_information=[0, 0, 0, 0], is_finished=False
    )
    found = spans(write_answers(tmp_path / "a.html", [parts]).read_text(encoding="utf-8"))
    assert [text for _, _, text in found] == ["B", "ä", "r"] and found[1][0] == 1.0


def test_the_page_fetches_nothing_and_runs_no_text(tmp_path: Path) -> None:
    names = {name: HOSTILE for name in ("prompt", "text", "reference")}
    hostile = answer(**names, tokens=[HOSTILE] * 3, clusters=[Cluster(HOSTILE, 2)])
    page = read_page(write_answers(tmp_path / "a.html", [hostile], title=HOSTILE, about=HOSTILE))
    assert page.references == [] and "script" not in page.tags
    assert "".join(page.text).count(HOSTILE) == 8  # title, heading, about, prompt, two tokens, reference, cluster


def test_without_draws_the_shade_is_the_entropy(tmp_path: Path) -> None:
    alone = answer(draw_log_probabilities=[], draws=[], clusters=[], semantic_entropy=None, is_finished=False)
    page = write_answers(tmp_path / "a.html", [alone]).read_text(encoding="utf-8")
    agreed = write_answers(tmp_path / "b.html", [answer(clusters=[Cluster("the cat", 2)])])
    assert "2 draws, one answer" in agreed.read_text(encoding="utf-8")
    assert "by-information" not in page and 'id="by-entropy" checked' in page
    assert "cut at the maximum of new tokens" in page and "semantic entropy" not in page
    with pytest.raises(BayesLoraError, match="0 answers were given"):
        write_answers(tmp_path / "b.html", [])
