"""Rows to label next: by mutual information, without duplicates, and the plain scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.posthoc import select_rows
from bayeslora.posthoc.acquisition import NOISE
from bayeslora.prediction import Prediction
from bayeslora.prediction.predict import summarize


def of(probabilities: Any) -> Prediction:
    """The prediction of samples with these probabilities (S, n, C)."""
    return summarize(torch.as_tensor(np.asarray(probabilities)).log())


def two_classes(of_first: Any) -> Prediction:
    first = np.asarray(of_first)
    return of(np.stack([first, 1 - first], axis=-1))


def random_prediction(rows: int, samples: int = 8, classes: int = 3) -> Prediction:
    generator = torch.Generator().manual_seed(0)
    return summarize(2 * torch.randn(samples, rows, classes, generator=generator, dtype=torch.float64))


def test_the_first_row_is_that_of_the_largest_mutual_information() -> None:
    prediction = random_prediction(50)
    assert select_rows(prediction, 1) == [int(prediction.mutual_information.argmax())]


def test_near_duplicates_are_not_both_chosen_first() -> None:
    """Four draws: rows 0, 1 and 4 split them alike, rows 2 and 3 otherwise and less clearly."""
    prediction = two_classes(
        [
            [0.95, 0.94, 0.8, 0.8, 0.93],
            [0.95, 0.94, 0.2, 0.2, 0.93],
            [0.05, 0.06, 0.8, 0.2, 0.07],
            [0.05, 0.06, 0.2, 0.8, 0.07],
        ]
    )
    information = prediction.mutual_information.tolist()
    assert min(information[0], information[1], information[4]) > 2 * max(information[2], information[3])
    chosen = select_rows(prediction, 5)
    assert chosen[0] == 0 and set(chosen[1:3]) == {2, 3} and chosen[3:] == [1, 4]


def test_copies_of_the_best_row_come_after_the_others() -> None:
    single = random_prediction(12).sample_probabilities
    assert single is not None
    best = select_rows(of(single), 1)[0]
    copies = torch.cat([single, single[:, best : best + 1].expand(-1, 6, -1)], dim=1)
    chosen = select_rows(of(copies), 5)
    same = {best, *range(12, 18)}
    assert len(same & set(chosen)) == 1
    assert sorted(select_rows(of(copies), 18)) == list(range(18))


def test_each_choice_is_the_best_of_a_plain_search() -> None:
    """The variance left, from a covariance matrix over all rows instead of one over the draws."""
    prediction = random_prediction(30, samples=6)
    samples = prediction.sample_probabilities
    assert samples is not None
    deviations = (samples - samples.mean(0)) / samples.mean(0).sqrt()
    matrix = deviations.permute(1, 2, 0).reshape(30, -1)
    matrix = (matrix / matrix.norm(dim=1, keepdim=True)).reshape(30, 3, 6)
    chosen: list[int] = []
    for _ in range(12):
        worth = []
        for row in range(30):
            left = float((matrix[row] ** 2).sum())
            if chosen:
                seen = matrix[chosen].reshape(-1, 6)
                cross = matrix[row] @ seen.T
                covariance: Tensor = seen @ seen.T + NOISE * torch.eye(len(seen))
                left -= float((cross @ torch.linalg.solve(covariance, cross.T)).trace())
            worth.append(-1.0 if row in chosen else left * float(prediction.mutual_information[row]))
        chosen.append(int(np.argmax(worth)))
    assert select_rows(prediction, 12) == chosen


def test_sentences_are_chosen_as_a_plain_search_would_by_the_mean_over_their_words() -> None:
    """The variance left of all words of a sentence together, each with its share of the information."""
    prediction = random_prediction(40, samples=5)
    samples = prediction.sample_probabilities
    assert samples is not None
    rows = np.sort(np.concatenate([np.arange(12), np.random.default_rng(0).integers(12, size=28)]))
    information = prediction.mutual_information
    blocks, worth = [], []
    for row in range(12):
        words = torch.from_numpy(np.flatnonzero(rows == row))
        deviations = ((samples - samples.mean(0)) / samples.mean(0).sqrt())[:, words].permute(1, 2, 0)
        deviations /= deviations.flatten(1).norm(dim=1)[:, None, None]
        share = information[words] / information[words].sum()
        blocks.append((deviations * share.sqrt()[:, None, None]).reshape(-1, 5))
        worth.append(float(information[words].mean()))
    chosen: list[int] = []
    for _ in range(8):
        seen = torch.cat([blocks[row] for row in chosen] or [torch.zeros(1, 5, dtype=torch.float64)])
        covariance = torch.linalg.inv(torch.eye(5, dtype=torch.float64) + seen.T @ seen / NOISE)
        left = [
            -1.0 if row in chosen else worth[row] * float((block @ covariance @ block.T).trace())
            for row, block in enumerate(blocks)
        ]
        chosen.append(int(np.argmax(left)))
    assert select_rows(prediction, 8, rows=rows) == chosen
    assert chosen[0] == int(np.argmax(worth)) and chosen != np.argsort(worth)[::-1][:8].tolist()
    entropies = [-float(prediction.entropy[torch.from_numpy(rows == row)].mean()) for row in range(12)]
    assert select_rows(prediction, 12, "entropy", rows=rows) == np.argsort(entropies, kind="stable").tolist()


def test_plain_scores() -> None:
    prediction = two_classes([[0.9, 0.55, 0.7, 0.02], [0.9, 0.55, 0.7, 0.02]])
    assert select_rows(prediction, 3, "entropy") == select_rows(prediction, 3, "margin") == [1, 2, 0]
    wide = random_prediction(40, samples=1)
    ranked = wide.probabilities.sort(dim=1, descending=True).values
    assert select_rows(wide, 40, "margin") == (ranked[:, 0] - ranked[:, 1]).argsort(stable=True).tolist()
    assert select_rows(wide, 40, "entropy") == (-wide.entropy).argsort(stable=True).tolist()
    drawn = select_rows(prediction, 4, "random", seed=3)
    assert sorted(drawn) == [0, 1, 2, 3] and drawn == select_rows(prediction, 4, "random", seed=3)
    assert any(select_rows(prediction, 4, "random", seed=seed) != drawn for seed in range(4, 9))


def test_rows_on_which_all_draws_agree_come_last() -> None:
    prediction = two_classes([[0.9, 0.9, 0.3, 0.5], [0.9, 0.1, 0.3, 0.5]])
    assert select_rows(prediction, 4)[0] == 1 and sorted(select_rows(prediction, 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("rows", [[0, 0, 1], [1, 1, 2, 2], [0, 2, 2, 3], [1, 0, 1, 1]])
def test_words_of_no_sentence_are_refused(rows: list[int]) -> None:
    with pytest.raises(BayesLoraError, match="needs one for each, from 0 and in order"):
        select_rows(random_prediction(4), 1, rows=rows)


@pytest.mark.parametrize(
    ("prediction", "budget", "score", "sentence"),
    [
        (random_prediction(4, samples=1), 2, "mutual_information", "2 or more samples"),
        (random_prediction(4), 5, "mutual_information", "budget is 5, but must be from 1 to 4"),
        (random_prediction(4), 0, "entropy", "budget is 0"),
        (random_prediction(4), 1, "bald", "score is 'bald'"),
        (summarize(torch.zeros(2, 4, 1)), 1, "entropy", "at least 2 classes"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    prediction: Prediction, budget: int, score: Any, sentence: str
) -> None:
    with pytest.raises(BayesLoraError, match=sentence):
        select_rows(prediction, budget, score)
