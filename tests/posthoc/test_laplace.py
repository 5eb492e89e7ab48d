"""Laplace on the last layer, held against autograd's Hessian, numpy's regression and sampling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.posthoc import LaplacePredictor, TemperatureScaling
from bayeslora.posthoc.laplace import probit_logits
from bayeslora.prediction import predict
from tests.prediction.models import TARGETS, classifier, inputs, noisy

STRUCTURES = ["full", "kron", "diag"]


def data(rows: int = 24, classes: int = 3) -> dict[str, Tensor]:
    return {**inputs(rows), "labels": torch.arange(rows) % classes}


class Head(nn.Module):
    """A linear layer on its inputs, and nothing else."""

    def __init__(self, features: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(features, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


def problem(rows: int = 40, features: int = 3, classes: int = 3) -> tuple[Head, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    model = Head(features, classes)
    x = torch.randn(rows, features, generator=generator)
    return model, {"x": x, "labels": torch.arange(rows) % classes}


def precision_matrix(laplace: LaplacePredictor) -> Tensor:
    """H + lambda I as the library's decomposition has it, over (class, feature) pairs."""
    curvature, precision = laplace._curvature, laplace.prior_precision
    assert curvature is not None and precision is not None
    size = curvature.eigenvalues.numel()
    basis = curvature.rotate(torch.eye(size, dtype=torch.float64).view(size, *curvature.eigenvalues.shape))
    basis = basis.reshape(size, size).T
    return basis @ torch.diag(curvature.eigenvalues.flatten() + precision) @ basis.T


def hessian(model: Head, batch: dict[str, Tensor]) -> Tensor:
    """Autograd's Hessian of the summed cross-entropy in the weights and bias, over (class, feature) pairs."""
    x = torch.cat([batch["x"], torch.ones(len(batch["x"]), 1)], dim=1).double()
    weights = torch.cat([model.head.weight, model.head.bias.unsqueeze(1)], dim=1).detach().double()

    def loss(flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x @ flat.view_as(weights).T, batch["labels"], reduction="sum")

    found: Any = torch.autograd.functional.hessian(loss, weights.flatten())
    return found


def test_the_full_curvature_is_autograds_hessian() -> None:
    model, batch = problem()
    laplace = LaplacePredictor(model, "full", prior_precision=2.0).fit([batch])
    expected = hessian(model, batch) + 2 * torch.eye(12)
    torch.testing.assert_close(precision_matrix(laplace), expected, rtol=1e-5, atol=1e-5)


def test_the_diagonal_is_that_of_the_hessian_and_kronecker_factors_are_exact_for_one_row() -> None:
    model, batch = problem()
    laplace = LaplacePredictor(model, "diag", prior_precision=2.0).fit(batch)
    expected = torch.diag(hessian(model, batch).diagonal()) + 2 * torch.eye(12)
    torch.testing.assert_close(precision_matrix(laplace), expected, rtol=1e-5, atol=1e-5)
    row = {name: value[:1] for name, value in batch.items()}
    laplace = LaplacePredictor(model, "kron", prior_precision=2.0).fit(row)
    torch.testing.assert_close(
        precision_matrix(laplace), hessian(model, row) + 2 * torch.eye(12), rtol=1e-5, atol=1e-5
    )


def test_kronecker_factors_are_those_of_the_sums() -> None:
    model, batch = problem()
    laplace = LaplacePredictor(model, "kron", prior_precision=2.0).fit(batch)
    x = torch.cat([batch["x"], torch.ones(40, 1)], dim=1).double()
    p = model(batch["x"]).detach().double().softmax(-1)
    outer = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).sum(0)
    expected = torch.kron(outer, x.T @ x) / 40 + 2 * torch.eye(12)
    torch.testing.assert_close(precision_matrix(laplace), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_samples_have_the_covariance_of_the_posterior(structure: Any) -> None:
    model, batch = problem(features=2, classes=2)
    laplace = LaplacePredictor(model, structure, prior_precision=3.0).fit(batch)
    sampler = laplace.sampler(20_000, 0, False, lambda model, batch: model(**batch))
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    with torch.inference_mode():
        logits = sampler({"x": points})
    bias, first, second = logits[:, 0], logits[:, 1], logits[:, 2]
    weights = torch.stack([first - bias, second - bias, bias], dim=2).reshape(-1, 6)
    trained = torch.cat([model.head.weight, model.head.bias.unsqueeze(1)], dim=1).detach().flatten().double()
    torch.testing.assert_close(weights.mean(0), trained, rtol=0, atol=0.02)
    torch.testing.assert_close(weights.T.cov(), precision_matrix(laplace).inverse(), rtol=0.06, atol=0.006)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_covariance_of_logits_is_that_of_the_posterior(structure: Any) -> None:
    model, batch = problem()
    laplace = LaplacePredictor(model, structure, prior_precision=2.0).fit(batch)
    assert laplace._curvature is not None
    x = torch.cat([batch["x"][:5], torch.ones(5, 1)], dim=1).double()
    covariance = precision_matrix(laplace).inverse().view(3, 4, 3, 4)
    expected = torch.einsum("nd,adbe,ne->nab", x, covariance, x)
    torch.testing.assert_close(laplace._curvature.logit_covariance(x, 2.0), expected)


def regression(rows: int = 30) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor]]:
    """Features with a column of ones, targets, and the batch."""
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.normal(size=(rows, 3)), np.ones((rows, 1))], axis=1).astype(np.float32)
    y = (x @ [0.5, -1.0, 2.0, 0.3] + 0.4 * generator.normal(size=rows)).astype(np.float32)
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    return x64, y64, {"x": torch.tensor(x[:, :3]), "labels": torch.tensor(y)}


def ridge(x: np.ndarray, y: np.ndarray, precision: float, noise: float) -> Head:
    """The model at the mean of the exact posterior."""
    weights = np.linalg.solve(x.T @ x / noise + precision * np.eye(4), x.T @ y / noise)
    model = Head(3, 1).double()
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor(weights[None, :3]))
        model.head.bias.copy_(torch.tensor(weights[3:]))
    return model


def log_evidence(x: np.ndarray, y: np.ndarray, precision: float, noise: float) -> float:
    covariance = noise * np.eye(len(y)) + x @ x.T / precision
    return float(multivariate_normal(np.zeros(len(y)), covariance).logpdf(y))


def test_a_regression_has_the_exact_posterior_and_evidence() -> None:
    """At the ridge solution Laplace's evidence is the density of the targets under their Gaussian marginal."""
    x, y, batch = regression()
    batch["x"] = batch["x"].double()
    precision = 1.7
    noise, model = 0.16, ridge(x, y, precision, 0.16)
    for _ in range(30):  # the noise variance and the solution that belong together
        laplace = LaplacePredictor(model, "full", prior_precision=precision).fit(batch)
        assert laplace.noise_variance is not None
        noise, model = laplace.noise_variance, ridge(x, y, precision, laplace.noise_variance)
    laplace = LaplacePredictor(model, "full", prior_precision=precision).fit(batch)
    assert laplace.noise_variance == pytest.approx(noise, rel=1e-4)
    assert laplace.log_marginal_likelihood == pytest.approx(log_evidence(x, y, precision, noise), abs=1e-5)
    expected = np.linalg.inv(x.T @ x / noise + precision * np.eye(4))
    np.testing.assert_allclose(precision_matrix(laplace).inverse().numpy(), expected, rtol=1e-4)
    found = predict(laplace, batch, samples=4000)
    np.testing.assert_allclose(found.std.numpy(), np.sqrt(np.einsum("nd,de,ne->n", x, expected, x)), rtol=0.06)


def test_the_evidence_is_largest_at_what_is_chosen() -> None:
    x, y, batch = regression()
    batch["x"] = batch["x"].double()
    model = ridge(x, y, 1.0, 0.16)
    laplace = LaplacePredictor(model, "full").fit(batch)
    best, precision = laplace.log_marginal_likelihood, laplace.prior_precision
    assert best is not None and precision is not None
    for factor in (0.7, 1.4):
        other = LaplacePredictor(model, "full", prior_precision=precision * factor).fit(batch)
        assert other.log_marginal_likelihood is not None and other.log_marginal_likelihood < best
    assert laplace.noise_variance == pytest.approx(0.16, rel=0.5)
    classes, batch = problem()
    chosen = LaplacePredictor(classes).fit(batch)
    assert chosen.noise_variance is None and chosen.prior_precision is not None
    flat = torch.cat([classes.head.weight, classes.head.bias.unsqueeze(1)], dim=1).detach().double().flatten()
    logits = classes(batch["x"]).detach().double()

    def evidence(precision: float) -> float:
        likelihood = -nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
        shrunk = torch.eye(12) + hessian(classes, batch) / precision
        return float(likelihood - precision / 2 * flat.square().sum() - torch.logdet(shrunk) / 2)

    assert chosen.log_marginal_likelihood == pytest.approx(evidence(chosen.prior_precision), abs=1e-4)
    assert all(evidence(chosen.prior_precision * factor) < evidence(chosen.prior_precision) for factor in (0.8, 1.25))


def test_the_probit_approximation_is_near_the_average_over_gaussian_logits() -> None:
    torch.manual_seed(1)
    for classes in (2, 4):
        mean, factor = 2 * torch.randn(200, classes).double(), 0.6 * torch.randn(200, classes, classes).double()
        covariance = factor @ factor.mT
        draws = mean + torch.einsum("nab,snb->sna", factor, torch.randn(3000, 200, classes).double())
        expected = draws.softmax(-1).mean(0)
        found = probit_logits(mean, covariance).softmax(-1)
        off, unaveraged = (found - expected).abs(), (mean.softmax(-1) - expected).abs()
        assert off.max() < (0.03 if classes == 2 else 0.15)
        assert off.mean() < unaveraged.mean() / 2
        torch.testing.assert_close(probit_logits(mean, 0 * covariance).softmax(-1), mean.softmax(-1))
        shared = covariance + 50 * torch.ones(classes, classes)  # noise that all classes share changes nothing
        torch.testing.assert_close(probit_logits(mean, shared).softmax(-1), found)


def test_two_classes_have_mackays_probability() -> None:
    mean, covariance = torch.tensor([[0.0, 1.5]]).double(), torch.tensor([[[0.5, 0.1], [0.1, 0.9]]]).double()
    expected = 1 / (1 + math.exp(-1.5 / math.sqrt(1 + math.pi / 8 * (0.5 + 0.9 - 0.2))))
    assert float(probit_logits(mean, covariance).softmax(-1)[0, 1]) == pytest.approx(expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("family", ["bert", "deberta", "llama", "gpt2"])
def test_any_adapter_and_model_with_a_linear_head(family: str, structure: Any) -> None:
    config = LoraConfig(r=2, target_modules=TARGETS[family], task_type="SEQ_CLS")
    model = get_peft_model(classifier(family), config).eval()
    expected = predict(model, inputs()).logits
    laplace = LaplacePredictor(model, structure).fit([data(16), data(8)])
    first = predict(laplace, inputs(), samples=6, seed=1)
    assert torch.equal(first.logits, predict(laplace, inputs(), samples=6, seed=1).logits)
    assert not torch.equal(first.logits, predict(laplace, inputs(), samples=6, seed=2).logits)
    assert first.mutual_information.min() > 0
    two, five = (predict(laplace, inputs(), samples=n, per_sample=True).sample_probabilities for n in (2, 5))
    assert two is not None and five is not None
    torch.testing.assert_close(two, five[:2], rtol=0, atol=1e-6)  # the same draws, from products of other sizes
    assert torch.equal(predict(laplace, inputs()).logits, expected)
    assert torch.equal(predict(model, inputs()).logits, expected)
    averaged = LaplacePredictor(model, structure, probit=True).fit([data(16), data(8)])
    found = predict(averaged, inputs())
    assert (found.entropy > predict(model, inputs()).entropy).all()
    many = predict(laplace, inputs(), samples=3000).probabilities
    torch.testing.assert_close(found.probabilities, many, rtol=0, atol=0.05)


def test_a_variational_adapter_a_regressor_and_16_bits() -> None:
    model = noisy(classifier("bert"), TARGETS["bert"])
    assert predict(LaplacePredictor(model).fit(data()), inputs(), samples=3).mutual_information.max() > 0
    config = LoraConfig(r=2, target_modules=TARGETS["bert"], task_type="SEQ_CLS")
    model = get_peft_model(classifier("bert", num_labels=1), config).eval()
    found = predict(LaplacePredictor(model).fit({**inputs(24), "labels": torch.randn(24)}), inputs(), samples=5)
    assert found.std.min() > 0
    low: PeftModel = get_peft_model(classifier("bert"), config).eval().bfloat16()
    scaled = TemperatureScaling(LaplacePredictor(low).fit(data()), 2.0)
    assert predict(scaled, inputs(), samples=3).mutual_information.max() > 0


def test_a_large_head_has_kronecker_factors_by_default() -> None:
    generator = torch.Generator().manual_seed(0)
    model = Head(1000, 3)
    batch = {"x": torch.randn(20, 1000, generator=generator), "labels": torch.arange(20) % 3}
    curvature = LaplacePredictor(model).fit(batch)._curvature
    assert curvature is not None and curvature.left is not None and curvature.whole is None


def test_what_cannot_work_is_refused() -> None:
    model = classifier("bert")
    for probit, samples in ((False, 2), (True, 0)):
        with pytest.raises(BayesLoraError, match="the posterior is not fitted: call fit"):
            predict(LaplacePredictor(model, probit=probit), inputs(), samples=samples)
    with pytest.raises(BayesLoraError, match="but labels are needed too"):
        LaplacePredictor(model).fit(inputs())
    with pytest.raises(BayesLoraError, match="0 batches"):
        LaplacePredictor(model).fit([])
    with pytest.raises(BayesLoraError, match="must be class ids"):
        LaplacePredictor(model).fit({**inputs(), "labels": torch.rand(4)})
    with pytest.raises(BayesLoraError, match="structure is 'rank'"):
        LaplacePredictor(model, "rank")  # type: ignore[arg-type]
    with pytest.raises(BayesLoraError, match="prior_precision is 0"):
        LaplacePredictor(model, prior_precision=0)
    with pytest.raises(BayesLoraError, match="do not come straight from a linear layer"):
        LaplacePredictor(noisy(classifier("llama"), ["score"])).fit(data())
