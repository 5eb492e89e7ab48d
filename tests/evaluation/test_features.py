"""Scores by features: equal to SciPy's and scikit-learn's, known on Gaussian clusters, kept by a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial.distance import cdist
from scipy.stats import chi2
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

import bayeslora
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import FeatureDetector, FeatureSpace, dataset_features
from bayeslora.evaluation.uncertainty import detection_scores
from tests.conftest import build_tiny_bert, build_tiny_tokenizer
from tests.evaluation.test_runner import make_task

SCORES = ("energy", "mahalanobis", "relative_mahalanobis", "nearest_neighbors")


def clusters(count: int, seed: int, size: int = 5, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Points around class means at distance 8, with one covariance that is far from the identity."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    mixing = np.random.default_rng(99).normal(size=(size, size)) * np.geomspace(0.3, 3, size)
    return 8 * np.eye(classes, size)[labels] + random.normal(size=(count, size)) @ mixing, labels


POINTS, _ = clusters(40, seed=5)
LOGITS = np.random.default_rng(6).normal(size=(40, 3))


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, None])
def test_mahalanobis_distances_are_scipys(shrinkage: float | None) -> None:
    features, labels = clusters(60, seed=1)
    found = FeatureSpace(features, labels, shrinkage=shrinkage).scores(POINTS, LOGITS)
    means = np.stack([features[labels == k].mean(axis=0) for k in range(3)])

    deviations, center = features - means[labels], features.mean(axis=0)
    covariance = np.cov(deviations.T, bias=True)
    if shrinkage is None:
        covariance = LedoitWolf(assume_centered=True).fit(deviations).covariance_
    else:
        covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / 5 * np.eye(5)
    around = covariance + np.cov((means[labels] - center).T, bias=True)
    if shrinkage == 0:
        np.testing.assert_allclose(around, np.cov(features.T, bias=True))  # the papers'
    within = cdist(POINTS, means, "mahalanobis", VI=np.linalg.inv(covariance)) ** 2
    total = cdist(POINTS, center[None], "mahalanobis", VI=np.linalg.inv(around)) ** 2
    np.testing.assert_allclose(found["mahalanobis"], within.min(axis=1))
    np.testing.assert_allclose(found["relative_mahalanobis"], (within - total).min(axis=1), atol=1e-9)


def test_energy_and_neighbors_are_the_formulas() -> None:
    features, labels = clusters(60, seed=1)
    found = FeatureSpace(features, labels, neighbors=4).scores(POINTS, LOGITS)
    assert tuple(found) == SCORES
    np.testing.assert_allclose(found["energy"], -np.log(np.exp(LOGITS).sum(axis=1)))
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (features, POINTS)]
    np.testing.assert_allclose(found["nearest_neighbors"], np.sort(cdist(unit[1], unit[0]), axis=1)[:, 3], atol=1e-7)
    brute = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(unit[0]).kneighbors(unit[1])[0]
    np.testing.assert_allclose(found["nearest_neighbors"], brute[:, 3], atol=1e-7)


def test_the_distance_to_the_own_mean_has_a_chi_squared_law() -> None:
    """Of a point of a Gaussian with the true mean and covariance, in d dimensions."""
    space = FeatureSpace(*clusters(6000, seed=2), shrinkage=0.0)
    points, _ = clusters(3000, seed=3)
    distances = np.sort(space.scores(points, np.zeros((3000, 3)))["mahalanobis"])
    # The minimum over three classes is a little less than the distance to the own one.
    gaps = np.arange(1, 3001) / 3000 - chi2(5).cdf(distances)
    assert np.abs(gaps).max() < 1.63 / np.sqrt(3000) + 0.02


def test_an_invertible_map_of_all_features_changes_no_mahalanobis_distance() -> None:
    features, labels = clusters(60, seed=1)
    mapping = np.random.default_rng(4).normal(size=(5, 5))
    plain = FeatureSpace(features, labels, shrinkage=0.0).scores(POINTS, LOGITS)
    mapped = FeatureSpace(features @ mapping + 7, labels, shrinkage=0.0).scores(POINTS @ mapping + 7, LOGITS)
    for name in ("mahalanobis", "relative_mahalanobis"):
        np.testing.assert_allclose(mapped[name], plain[name], rtol=1e-6, atol=1e-6)
    assert not np.allclose(mapped["nearest_neighbors"], plain["nearest_neighbors"], atol=1e-2)
    rotation = np.linalg.qr(mapping)[0]
    turned = FeatureSpace(3 * features @ rotation, labels).scores(3 * POINTS @ rotation, LOGITS)
    shrunk = FeatureSpace(features, labels).scores(POINTS, LOGITS)
    for name in SCORES:  # shrinkage keeps rotations and scales, and so does the normalization
        np.testing.assert_allclose(turned[name], shrunk[name], rtol=1e-6, atol=1e-6)


def test_relative_distances_ignore_what_tells_no_class_apart() -> None:
    """A direction that all classes spread in alike counts in the plain distance and cancels in the relative one."""
    features, labels = clusters(3000, seed=1, size=3)
    noise = np.random.default_rng(7).normal(size=(3000, 1))
    points, _ = clusters(40, seed=5, size=3)
    far = [np.hstack([points, np.full((40, 1), value)]) for value in (0.0, 6.0)]
    space = FeatureSpace(np.hstack([features, noise]), labels)
    near, away = (space.scores(values, LOGITS) for values in far)
    assert (away["mahalanobis"] - near["mahalanobis"] > 25).all()
    assert np.abs(away["relative_mahalanobis"] - near["relative_mahalanobis"]).max() < 2


def test_relative_distances_are_the_same_far_away_where_classes_lie_far_apart() -> None:
    """Few rows, many directions and classes far apart: shrunk by itself, the covariance of all would win far away."""
    generator = np.random.default_rng(8)
    labels = np.arange(200) % 2
    features = 0.05 * generator.normal(size=(200, 120))
    features[:, 0] += 10 * labels
    space = FeatureSpace(features, labels)
    points = features[:20] + 0.01 * generator.normal(size=(20, 120))
    away = points.copy()
    away[:, 1:] += 3 * generator.normal(size=(20, 119))
    near, far = (space.scores(values, np.zeros((20, 2))) for values in (points, away))
    assert (far["mahalanobis"] > 100 * near["mahalanobis"]).all()
    assert (far["relative_mahalanobis"] - near["relative_mahalanobis"] > -0.1 * near["mahalanobis"]).all()


def test_foreign_points_are_detected_and_points_of_the_same_kind_are_not() -> None:
    space = FeatureSpace(*clusters(600, seed=1))
    inside, more = (clusters(500, seed)[0] for seed in (2, 3))
    foreign = clusters(500, seed=4)[0] - 20
    scores = [space.scores(values, np.zeros((500, 3))) for values in (inside, more, foreign)]
    for name in ("mahalanobis", "nearest_neighbors"):
        assert detection_scores(scores[0][name], scores[2][name])["auroc"] > 0.95
        assert abs(detection_scores(scores[0][name], scores[1][name])["auroc"] - 0.5) < 0.06


def test_wrong_features_and_options() -> None:
    features, labels = clusters(12, seed=1)
    for options, sentence in (
        ({"neighbors": 13}, "neighbors is 13, but must be between 1 and the number of rows, 12"),
        ({"neighbors": 0}, "neighbors is 0"),
        ({"shrinkage": 1.5}, "shrinkage is 1.5"),
    ):
        with pytest.raises(BayesLoraError, match=sentence):
            FeatureSpace(features, labels, **options)
    with pytest.raises(BayesLoraError, match="is singular, but must be invertible"):
        FeatureSpace(np.hstack([features, features]), labels, shrinkage=0.0)
    with pytest.raises(BayesLoraError, match="for 11 labels"):
        FeatureSpace(features, labels[:11])
    broken = features.copy()
    broken[3] = np.nan
    with pytest.raises(BayesLoraError, match="1 of 12 rows are not finite"):
        FeatureSpace(broken, labels)
    with pytest.raises(BayesLoraError, match="take them from the model"):
        FeatureSpace(features, labels).scores(features[:, :3], LOGITS)
    assert FeatureSpace(features[:6], labels[:6]).neighbors == 6


def loader(rows: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (rows, 8), generator=generator)
    labels = torch.arange(rows) % 2
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [{name: value[start : start + 7] for name, value in full.items()} for start in range(0, rows, 7)]


def test_a_detector_is_the_space_of_its_models_features() -> None:
    model = build_tiny_bert()
    detector = bayeslora.FeatureDetector(model, neighbors=3).fit(loader(40, 1))
    found = detector.score(loader(9, 2))
    features, logits = bayeslora.prediction.features_and_logits(model, loader(9, 2))
    training, _ = bayeslora.prediction.features_and_logits(model, loader(40, 1))
    expected = FeatureSpace(training.numpy(), np.arange(40) % 2, neighbors=3)
    for name, values in expected.scores(features.numpy(), logits.numpy()).items():
        np.testing.assert_array_equal(found[name], values)


READ_AGAIN = """
import json, sys
from bayeslora import FeatureDetector
from tests.evaluation.test_features import build_tiny_bert, loader
found = FeatureDetector.load(build_tiny_bert(), sys.argv[1]).score(loader(9, 2))
print(json.dumps({name: values.tolist() for name, values in found.items()}))
"""


def test_a_saved_detector_gives_the_same_scores(tmp_path: Path) -> None:
    detector = FeatureDetector(build_tiny_bert(), shrinkage=0.2, neighbors=3).fit(loader(40, 1))
    detector.save(tmp_path / "detector.safetensors")
    again = FeatureDetector.load(build_tiny_bert(), tmp_path / "detector.safetensors")
    assert again.space is not None and (again.space.shrinkage, again.space.neighbors) == (0.2, 3)
    for name, values in detector.score(loader(9, 2)).items():
        np.testing.assert_array_equal(again.score(loader(9, 2))[name], values)


@pytest.mark.slow
def test_a_saved_detector_gives_the_same_scores_in_another_process(tmp_path: Path) -> None:
    detector = FeatureDetector(build_tiny_bert()).fit(loader(40, 1))
    detector.save(tmp_path / "detector.safetensors")
    command = [sys.executable, "-c", READ_AGAIN, str(tmp_path / "detector.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    again = json.loads(done.stdout.splitlines()[-1])
    for name, values in detector.score(loader(9, 2)).items():
        np.testing.assert_allclose(again[name], values, rtol=1e-6, atol=1e-9)


def test_wrong_files_and_an_unfitted_detector(tmp_path: Path) -> None:
    model = build_tiny_bert()
    with pytest.raises(BayesLoraError, match="not fitted"):
        FeatureDetector(model).score(loader(9, 2))
    with pytest.raises(BayesLoraError, match="labels are needed"):
        FeatureDetector(model).fit([{"input_ids": torch.ones(2, 4, dtype=torch.long)}])
    (tmp_path / "text").write_text("no tensors")
    save_file({"features": torch.ones(2, 2)}, tmp_path / "other")
    for name in ("absent", "text", "other"):
        with pytest.raises(BayesLoraError, match=f"{name} cannot be read"):
            FeatureDetector.load(model, tmp_path / name)


def test_features_of_a_split_keep_its_order() -> None:
    tokenizer: Any = build_tiny_tokenizer()
    model = build_tiny_bert()
    data = bayeslora.data.encode(make_task(), tokenizer)["validation"]
    whole, logits = dataset_features(model, data, tokenizer, batch_size=3)
    for row in range(len(data)):
        alone, own = dataset_features(model, data.select([row]), tokenizer)
        np.testing.assert_allclose(whole[row], alone[0], atol=1e-6)
        np.testing.assert_allclose(logits[row], own[0], atol=1e-6)
    with pytest.raises(BayesLoraError, match="0 rows"):
        dataset_features(model, data.select([]), tokenizer)
