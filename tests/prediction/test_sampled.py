"""`predict` with samples: the right averages, the same for every batch size and process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from bayeslora.errors import BayesLoraError
from bayeslora.prediction import Prediction, predict
from bayeslora.prediction.predict import summarize
from tests.conftest import build_tiny_deberta
from tests.prediction.models import TARGETS, classifier, inputs, merged_draw, noisy
from tests.processes import run_code


def same(one: Prediction, other: Prediction) -> None:
    for name, value in vars(one).items():
        if value is not None:
            torch.testing.assert_close(getattr(other, name), value, rtol=0, atol=1e-6)


def test_two_samples_by_hand() -> None:
    """One sample is sure of class 0, the other of class 1: no class is likelier, and only the weights are to blame."""
    found = summarize(torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]]))
    assert found.probabilities.tolist() == [[0.5, 0.5]]
    for value in (found.entropy, found.mutual_information):
        assert value.item() == pytest.approx(torch.tensor(2.0).log().item())
    assert found.expected_entropy.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(found.logits.exp(), found.probabilities)


def test_equal_samples_have_no_information_about_the_weights() -> None:
    logits = torch.randn(3, 4) * 5
    found, one = summarize(logits.expand(7, 3, 4)), summarize(logits.unsqueeze(0))
    assert found.mutual_information.min() >= 0 and found.mutual_information.max() < 1e-12
    torch.testing.assert_close(found.probabilities, one.probabilities)
    torch.testing.assert_close(found.entropy, one.entropy)
    torch.testing.assert_close(one.expected_entropy, one.entropy)


def test_an_improbable_class_keeps_its_order_of_magnitude() -> None:
    found = summarize(torch.tensor([[[0.0, -300.0]], [[0.0, -400.0]]]))
    assert found.logits[0, 1].item() == pytest.approx(-300 - torch.tensor(2.0).log().item())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_probabilities_are_averaged_over_the_models_that_hold_the_draws(family: str) -> None:
    model = noisy(classifier(family), TARGETS[family])
    found = predict(model, inputs(), samples=4, seed=9, per_sample=True)
    expected = torch.stack([predict(merged_draw(model, 9, draw), inputs()).probabilities for draw in range(4)])
    assert found.sample_probabilities is not None
    torch.testing.assert_close(found.sample_probabilities, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.probabilities, expected.mean(0), rtol=0, atol=1e-5)
    conditional = torch.special.entr(expected).sum(-1).mean(0)
    torch.testing.assert_close(found.expected_entropy, conditional, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy - found.expected_entropy, found.mutual_information)
    assert predict(model, inputs(), samples=4).sample_probabilities is None


def test_the_batch_size_changes_nothing_and_the_seed_does() -> None:
    model = noisy(classifier("bert"), TARGETS["bert"])
    rows = inputs(rows=7)
    whole = predict(model, rows, samples=5, seed=2, per_sample=True)
    singles = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    for size in (1, 3):
        same(whole, predict(model, DataLoader(singles, batch_size=size), samples=5, seed=2, per_sample=True))
    assert not torch.allclose(whole.logits, predict(model, rows, samples=5, seed=3).logits)
    # More samples begin with the same ones.
    more = predict(model, rows, samples=8, seed=2, per_sample=True)
    assert whole.sample_probabilities is not None and more.sample_probabilities is not None
    torch.testing.assert_close(more.sample_probabilities[:5], whole.sample_probabilities, rtol=0, atol=1e-6)


SCRIPT = """
import torch
from bayeslora.prediction import predict
from tests.prediction.models import TARGETS, classifier, inputs, noisy
torch.manual_seed(int(__import__("sys").argv[1]))
torch.save(predict(noisy(classifier("bert"), TARGETS["bert"]), inputs(), samples=3, seed=4).logits, "{path}")
"""


def test_the_same_seed_gives_the_same_prediction_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "logits.pt"
    script = SCRIPT.replace("{path}", path.as_posix())
    run_code(script, tmp_path, "77")
    here = predict(noisy(classifier("bert"), TARGETS["bert"]), inputs(), samples=3, seed=4).logits
    assert torch.equal(torch.load(path), here)


def test_regression_has_a_mean_and_a_deviation() -> None:
    model = noisy(build_tiny_deberta(num_labels=1), TARGETS["deberta"])
    found = predict(model, inputs(), samples=6, per_sample=True)
    assert found.sample_values is not None and found.sample_values.shape == (6, 4)
    torch.testing.assert_close(found.labels, found.sample_values.mean(0))
    torch.testing.assert_close(found.std, found.sample_values.std(0, correction=0))
    assert found.std.min() > 0 and found.probabilities.shape == (4, 0) and found.sample_probabilities is None
    mean = predict(model, inputs())
    assert mean.std.tolist() == [0.0] * 4


def test_opposite_pairs_average_out_what_is_odd_in_the_noise() -> None:
    """A linear model is odd in its noise but for the mean: with pairs, two samples average to the mean's logits."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(x)
            return out

    model = noisy(Linear(), ["layer"])
    x = {"x": torch.randn(5, 6)}
    mean = predict(model, x).labels
    pairs = predict(model, x, samples=2, antithetic=True)
    torch.testing.assert_close(pairs.labels, mean, rtol=0, atol=1e-5)
    assert pairs.std.max() > 1e-2
    assert (predict(model, x, samples=2).labels - mean).abs().max() > 1e-2


def test_the_model_is_left_at_its_mean_and_torchs_random_state_alone() -> None:
    model = noisy(classifier("bert"), TARGETS["bert"]).train()
    state = torch.get_rng_state()
    before = predict(model, inputs()).logits
    predict(model, inputs(), samples=3)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert torch.equal(predict(model, inputs()).logits, before)


def test_what_is_no_predictor_or_seed_is_refused() -> None:
    with pytest.raises(BayesLoraError, match="str was given, but a model or a predictor is needed"):
        predict("model", inputs())  # type: ignore[arg-type]
    with pytest.raises(BayesLoraError, match="the seed is 1.5, but must be a whole number"):
        predict(noisy(classifier("bert"), TARGETS["bert"]), inputs(), samples=1, seed=1.5)  # type: ignore[arg-type]
