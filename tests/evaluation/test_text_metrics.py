"""Scores of texts, as worked out by hand."""

from __future__ import annotations

import pytest

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.text_metrics import bleu, check_metrics, exact_match, rouge_l, text_scores, token_f1

TEXTS = ["The  cat!", "a dog", "", "no answer", "no answer", "red"]
RIGHT = [["cat", "dog"], ["the old dog"], ["cat"], [], ["cat"], []]


def test_exact_match_and_f1_by_hand() -> None:
    assert exact_match(TEXTS, RIGHT).tolist() == [1, 0, 0, 1, 0, 0]
    # "dog" against "old dog": precision 1, recall 1/2.
    assert token_f1(TEXTS, RIGHT) == pytest.approx([1, 2 / 3, 0, 1, 0, 0])


@pytest.mark.parametrize(
    ("text", "answer", "match", "score"),
    [
        ("The U.S.!", "us", 1, 1.0),
        ("an apple a day", "apple day", 1, 1.0),
        ("cat cat dog", "cat dog dog", 0, 2 / 3),  # each word counts as often as both have it
        ("in 1939", "1939", 0, 2 / 3),
        ("the", "", 1, 1.0),
        ("theatre", "atre", 0, 0.0),
    ],
)
def test_words_are_compared_as_squad_compares_them(text: str, answer: str, match: float, score: float) -> None:
    assert exact_match([text], [[answer]])[0] == match and token_f1([text], [[answer]])[0] == pytest.approx(score)


def test_rouge_l_is_the_best_of_the_right_answers() -> None:
    pytest.importorskip("rouge_score")
    # Of "the cat sat" and "the cat": subsequence 2, precision 2/3, recall 1.
    assert rouge_l(["the cat sat", "x"], [["the cat", "a dog"], ["y"]]) == pytest.approx([0.8, 0.0])


def test_bleu_takes_as_many_right_answers_as_each_text_has() -> None:
    pytest.importorskip("sacrebleu")
    texts = ["the cat sat on the mat", "a dog ran far too far"]
    assert bleu(texts, [["a mat", texts[0]], [texts[1]]]) == pytest.approx(1.0)
    worse = bleu(texts, [["the cat sat on a mat"], [texts[1]]])
    # Matches of 1 to 4 words: 11 of 12, 8 of 10, 6 of 8, 4 of 6; the lengths are equal.
    assert worse == pytest.approx((11 / 12 * 8 / 10 * 6 / 8 * 4 / 6) ** 0.25)


def test_the_loss_of_a_row_is_what_its_score_lacks() -> None:
    scores, losses = text_scores(("f1", "exact_match"), TEXTS, RIGHT)
    assert list(scores) == ["f1", "exact_match"] and scores["exact_match"] == pytest.approx(2 / 6)
    assert losses == pytest.approx(1 - token_f1(TEXTS, RIGHT))


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bayeslora.evaluation.text_metrics.find_spec", lambda name: None)
    check_metrics(["f1", "exact_match"])
    with pytest.raises(BayesLoraError, match="rouge-score is not installed, .* pip install rouge-score"):
        check_metrics(["rouge_l"])
