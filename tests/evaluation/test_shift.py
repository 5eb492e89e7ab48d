"""Shifted texts: the share that was asked for, the same in every process, never empty; labels stay."""

from __future__ import annotations

import pytest
from datasets import Dataset
from scipy.stats import binom

from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import shifted
from bayeslora.evaluation.shift import SEVERITIES
from bayeslora.vocabulary import SHIFTS

SENTENCE = "The quick brown fox, which jumps over a lazy dog, is warm; clever (and funny)!"
ODD = ["", " ", "a", "?!", "...", "I", "x y", "é", "漢字 かな", "12 34", "don't", "a\nb\tc", "ß", "İi ıI", "O'Neill's"]


def rows(texts: list[str], **columns: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(len(texts))], **columns})


def one(text: str, suite: str, severity: float, seed: int = 0) -> str:
    return str(shifted(rows([text]), ["text"], suite, severity, seed)["text"][0])


def many(text: str, suite: str, severity: float, count: int) -> list[str]:
    """The text shifted as each of the first rows of a data set."""
    return list(shifted(rows([text] * count), ["text"], suite, severity)["text"])


def distance(one: str, other: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours that turn one text into the other."""
    table = {(i, 0): i for i in range(len(one) + 1)} | {(0, j): j for j in range(len(other) + 1)}
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            replaced = table[i - 1, j - 1] + (one[i - 1] != other[j - 1])
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, replaced)
            if i > 1 and j > 1 and one[i - 1] == other[j - 2] and one[i - 2] == other[j - 1]:
                table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
    return table[len(one), len(other)]


def test_every_suite_has_three_rising_levels() -> None:
    assert tuple(SEVERITIES) == SHIFTS
    for levels in SEVERITIES.values():
        assert len(levels) == 3 and 0 < levels[0] < levels[1] < levels[2] <= 1


@pytest.mark.parametrize("severity", SEVERITIES["typos"])
def test_the_share_of_edited_letters_is_what_was_asked_for(severity: float) -> None:
    # Each word has different letters, so that hardly two edits make a shorter way from one text to the other.
    texts = ["the quick brown fox jumps over my lazy dog"] * 150
    letters = sum(character.isalpha() for text in texts for character in text)
    found = shifted(rows(texts), ["text"], "typos", severity)["text"]
    edits = sum(distance(text, other) for text, other in zip(texts, found, strict=True))
    low, high = binom(letters, severity).interval(0.999)
    # Neighbouring edits can be one: a letter lost beside one that is doubled.
    assert low - 0.03 * letters * severity <= edits <= high


def test_all_four_kinds_of_typo_happen() -> None:
    found = many("abcdefgh", "typos", 0.1, 200)
    assert {len(text) for text in found} >= {7, 8, 9}
    same_length = [text for text in found if len(text) == 8]
    swapped = [text for text in same_length if sorted(text) == list("abcdefgh") and text != "abcdefgh"]
    replaced = [text for text in same_length if sorted(text) != list("abcdefgh")]
    assert swapped and replaced


def test_a_key_is_replaced_by_one_beside_it_in_the_same_case() -> None:
    seen = set(many("g", "typos", 1.0, 80))
    assert seen == {"gg", *"fhtyvb"}
    assert set(many("G", "typos", 1.0, 80)) == {"GG", *"FHTYVB"}


@pytest.mark.parametrize("suite", SHIFTS)
def test_severity_zero_changes_nothing(suite: str) -> None:
    texts = [SENTENCE, *ODD]
    assert shifted(rows(texts), ["text"], suite, 0.0)["text"][:] == texts


@pytest.mark.parametrize("suite", SHIFTS)
def test_no_text_becomes_empty_and_labels_and_other_columns_stay(suite: str) -> None:
    data = rows([SENTENCE, *ODD] * 5, film=["a"] * 80)
    for severity in (*SEVERITIES[suite], 1.0):
        for seed in range(5):
            found = shifted(data, ["text"], suite, severity, seed)
            for text, other in zip(data["text"], found["text"], strict=True):
                assert bool(other.strip()) == bool(text.strip()), (text, other)
            assert found["label"][:] == data["label"][:] and found["film"][:] == data["film"][:]
            assert found.features == data.features


def test_the_texts_are_the_same_in_every_process() -> None:
    """As they were in the one that wrote this test."""
    assert (
        one(SENTENCE, "typos", 0.1)
        == "The quick grown foz, wwhihc jumps over a lazu dog, us warm; clever (and fjnny)!"
    )
    assert (
        one(SENTENCE, "casing", 0.25, 3)
        == "THE QUICK BROWN fox, which jumps over a lazy DOG, is warm; clever (and funny)!"
    )
    assert (
        one(SENTENCE, "punctuation", 0.5)
        == "The quick brown fox which jumps over a lazy dog, is warm; clever (and funny)"
    )


@pytest.mark.parametrize("suite", ["typos", "casing", "punctuation"])
def test_another_seed_gives_other_texts(suite: str) -> None:
    assert one(SENTENCE, suite, 0.5) == one(SENTENCE, suite, 0.5) != one(SENTENCE, suite, 0.5, 1)


def test_a_row_is_shifted_alike_in_any_data_set_but_unlike_other_rows() -> None:
    found = many(SENTENCE, "typos", 0.1, 9)
    assert found[:3] == many(SENTENCE, "typos", 0.1, 3) and len(set(found)) == 9


def test_a_higher_level_changes_what_a_lower_one_does_and_more() -> None:
    for found in zip(*(many(SENTENCE, "casing", level, 30) for level in SEVERITIES["casing"]), strict=True):
        capitals = [{i for i, word in enumerate(text.split()) if word.isupper()} for text in found]
        assert capitals[0] <= capitals[1] <= capitals[2] == set(range(len(SENTENCE.split())))
    for found in zip(*(many(SENTENCE, "punctuation", s, 30) for s in SEVERITIES["punctuation"]), strict=True):
        assert len(SENTENCE) >= len(found[0]) >= len(found[1]) >= len(found[2]) == len(SENTENCE) - 6
    low, high = (sum(distance(SENTENCE, text) for text in many(SENTENCE, "typos", s, 20)) for s in (0.02, 0.1))
    assert high > 3 * low > 0


def test_truncation_keeps_the_first_words_and_at_least_one() -> None:
    assert one("a b c d e f g h", "truncation", 0.25) == "a b c d e f"
    assert one("a b  c\nd", "truncation", 0.5) == "a b"
    assert one("a b c d e", "truncation", 0.5) == "a b c"
    assert one(" a b ", "truncation", 1.0) == " a"


def test_punctuation_goes_and_letters_stay() -> None:
    assert one("Well, (yes) — no; 3% more!", "punctuation", 1.0) == "Well yes  no 3 more"
    assert one("?!", "punctuation", 1.0) == "?!"


def test_one_column_of_a_pair_or_both() -> None:
    data = rows([SENTENCE] * 4, other=[SENTENCE] * 4)
    both = shifted(data, ["text", "other"], "typos", 0.1)
    single = shifted(data, ["other"], "typos", 0.1)
    assert single["text"][:] == data["text"][:] and single["other"][:] == both["other"][:]
    assert all(one != two for one, two in zip(both["text"], both["other"], strict=True))


def test_wrong_suites_columns_and_severities() -> None:
    with pytest.raises(BayesLoraError, match="did you mean typos"):
        shifted(rows(["a"]), ["text"], "typo", 0.1)
    with pytest.raises(BayesLoraError, match="lack column 'texts'"):
        shifted(rows(["a"]), ["texts"], "typos", 0.1)
    with pytest.raises(BayesLoraError, match="the severity is 5"):
        shifted(rows(["a"]), ["text"], "typos", 5)
