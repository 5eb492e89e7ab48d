"""Vector scaling and isotonic maps: distortions that are known are undone, and too few rows are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bayeslora import IsotonicCalibration, TemperatureScaling, VectorScaling
from bayeslora.errors import BayesLoraError
from bayeslora.posthoc import MCDropout
from bayeslora.posthoc.temperature import predictive_nll
from bayeslora.prediction import predict, sampled_logits
from tests.posthoc.test_calibration import Fixed
from tests.prediction.models import TARGETS, classifier, inputs, noisy

W, B = torch.tensor([0.5, 1.5, 0.8]), torch.tensor([1.0, -0.4, -0.6])


def drawn(distort: Callable[[Tensor], Tensor], count: int = 6000, classes: int = 3) -> dict[str, Tensor]:
    """Logits, and labels drawn from the probabilities that `distort` makes of them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=generator) * 2
    labels = torch.multinomial(distort(logits), 1, generator=generator)[:, 0]
    return {"x": logits, "labels": labels}


def test_the_factors_and_offsets_that_made_the_labels_are_found() -> None:
    data = drawn(lambda logits: (W * logits + B).softmax(-1))
    scaled = VectorScaling(Fixed()).fit([{name: value[:1000] for name, value in data.items()}, data])
    assert scaled.weight is not None and scaled.bias is not None
    torch.testing.assert_close(scaled.weight, W.double(), rtol=0.1, atol=0)
    torch.testing.assert_close(scaled.bias, B.double(), rtol=0, atol=0.1)
    found = predict(scaled, data).logits
    torch.testing.assert_close(found.softmax(-1), (scaled.weight * data["x"] + scaled.bias).softmax(-1))
    temperature = predict(TemperatureScaling(Fixed()).fit(data), data).logits
    assert predictive_nll(found[None], data["labels"]) < predictive_nll(temperature[None], data["labels"]) - 0.05


def test_no_other_factors_or_offsets_are_likelier() -> None:
    data = drawn(lambda logits: (W * logits + B).softmax(-1), 300)
    scaled = VectorScaling(Fixed()).fit(data)
    assert scaled.weight is not None and scaled.bias is not None
    best = predictive_nll((scaled.weight * data["x"] + scaled.bias)[None], data["labels"])
    for change in torch.eye(6).double() * 0.02:
        for sign in (-1, 1):
            w, b = scaled.weight + sign * change[:3], scaled.bias + sign * change[3:]
            assert predictive_nll((w * data["x"] + b)[None], data["labels"]) > best


def test_samples_of_another_predictor_are_scaled_each() -> None:
    data = drawn(lambda logits: (W * logits + B).softmax(-1), 300)
    inner = MCDropout(Fixed(0.3))
    scaled = VectorScaling(inner).fit(data, samples=4, seed=1)
    found = predict(scaled, data, samples=4, seed=1, per_sample=True)
    assert scaled.weight is not None and scaled.bias is not None and found.sample_probabilities is not None
    logits = sampled_logits(inner, data, 4, 1)
    expected = (scaled.weight * logits + scaled.bias).softmax(-1)
    torch.testing.assert_close(found.sample_probabilities, expected)
    assert found.mutual_information.max() > 0


@pytest.mark.parametrize("classes", [2, 3])
def test_a_distortion_of_any_shape_is_undone(classes: int) -> None:
    """Labels are right at most 40% more often than by chance: no factor and offset makes that of sure logits."""

    def distort(logits: Tensor) -> Tensor:
        return 0.4 * logits.softmax(-1) + 0.6 / classes

    data = drawn(distort, 12_000, classes)
    found = predict(IsotonicCalibration(Fixed()).fit(data), data).probabilities
    torch.testing.assert_close(found.sum(-1), torch.ones(12_000).double())
    off = (found - distort(data["x"])).abs().mean()
    before = (data["x"].softmax(-1) - distort(data["x"])).abs().mean()
    assert off < 0.025 < 0.15 < before
    if classes == 2:  # two mirrored maps, each rising
        order = data["x"].double().softmax(-1)[:, 1].argsort()
        assert (found[order, 1].diff() > -1e-12).all()


def test_the_steps_are_the_means_of_the_rows_that_they_pool() -> None:
    """Pool adjacent violators by hand: labels 0 1 0 | 1 1 by rising probability, ten times each."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.6, 0.9]).repeat_interleave(10)
    data = {"x": torch.stack([1 - p, p], dim=1).log(), "labels": torch.tensor([0, 1, 0, 1, 1]).repeat_interleave(10)}
    found = predict(IsotonicCalibration(Fixed()).fit(data), data).probabilities[::10, 1]
    edge = 1 / 52
    torch.testing.assert_close(found, torch.tensor([edge, 0.5, 0.5, 1 - edge, 1 - edge]).double())


def test_isotonic_averages_samples_first_and_keeps_absent_classes() -> None:
    data = drawn(lambda logits: logits.softmax(-1), 400)
    inner = MCDropout(Fixed(0.3))
    calibrated = IsotonicCalibration(inner).fit(data, samples=4, seed=1)
    found = predict(calibrated, data, samples=4, seed=1, per_sample=True)
    assert found.sample_probabilities is not None and len(found.sample_probabilities) == 1
    assert found.mutual_information.max() == 0
    for predictor in (IsotonicCalibration(Fixed()).fit(data), VectorScaling(Fixed()).fit(data)):
        absent = torch.tensor([[1.0, 2.0, -torch.inf]])
        assert predict(predictor, {"x": absent}).probabilities[0, 2] == 0
        assert predict(predictor, {"x": absent}).entropy.isfinite().all()


def test_an_adapters_samples_go_through_either() -> None:
    model = noisy(classifier("bert"), TARGETS["bert"])
    data = {**inputs(60), "labels": torch.arange(60) % 3}
    for kind in (VectorScaling, IsotonicCalibration):
        found = predict(kind(model).fit(data, samples=2), inputs(), samples=2)
        torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(4).double())


@pytest.mark.parametrize("kind", [VectorScaling, IsotonicCalibration])
def test_what_cannot_work_is_refused(kind: Any) -> None:
    x = torch.randn(40, 3)
    with pytest.raises(BayesLoraError, match="is not fitted, but must be: call fit"):
        predict(kind(Fixed()), {"x": x})
    with pytest.raises(BayesLoraError, match=r"4 of the 40 held-out rows are of class 2, but each of the 3 classes"):
        kind(Fixed()).fit({"x": x, "labels": torch.tensor([0] * 18 + [1] * 18 + [2] * 4)})
    with pytest.raises(BayesLoraError, match="1 output"):
        kind(Fixed()).fit({"x": x[:, :1], "labels": torch.zeros(40).long()})
    with pytest.raises(BayesLoraError, match="a batch has x, but labels are needed too"):
        kind(Fixed()).fit({"x": x})


def test_held_out_rows_that_are_all_right_are_refused_by_vector_scaling() -> None:
    labels = torch.arange(60) % 3
    text = (
        "the best factors and offsets for the 60 held-out examples are beyond a bound, but factors must be inside "
        "(0.02, 50.0) and offsets below 50: use more examples, or others"
    )
    with pytest.raises(BayesLoraError, match=re.escape(text)):
        VectorScaling(Fixed()).fit({"x": torch.nn.functional.one_hot(labels).float(), "labels": labels})


def test_logits_that_are_too_large_for_any_factor_are_refused_by_vector_scaling() -> None:
    x = 1e3 * torch.randn(90, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(90) % 3
    with pytest.raises(BayesLoraError, match="factors and offsets for the 90 held-out examples are beyond a bound"):
        VectorScaling(Fixed()).fit({"x": x, "labels": labels})
