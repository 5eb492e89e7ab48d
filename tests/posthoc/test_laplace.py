"""Laplace on the last layer, held against the posterior worked out by hand."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.posthoc import LaplacePredictor
from bayeslora.prediction import predict
from tests.prediction.models import TARGETS, classifier, inputs, noisy


def data(rows: int = 24) -> dict[str, Tensor]:
    return {**inputs(rows), "labels": torch.arange(rows) % 3}


def test_without_the_package_a_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(BayesLoraError, match=r"laplace-torch cannot be imported .*pip install bayeslora\[laplace\]"):
        LaplacePredictor(classifier("bert"))


class TestInstalled:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        pytest.importorskip("laplace")

    @pytest.mark.parametrize("structure", ["full", "kron", "diag"])
    @pytest.mark.parametrize("family", ["bert", "deberta", "llama"])
    def test_any_adapter_and_model_with_a_linear_head(self, family: str, structure: Any) -> None:
        config = LoraConfig(r=2, target_modules=TARGETS[family], task_type="SEQ_CLS")
        model = get_peft_model(classifier(family), config).eval()
        expected = predict(model, inputs()).logits
        laplace = LaplacePredictor(model, structure).fit([data(16), data(8)])
        first = predict(laplace, inputs(), samples=6, seed=1)
        assert torch.equal(first.logits, predict(laplace, inputs(), samples=6, seed=1).logits)
        assert not torch.equal(first.logits, predict(laplace, inputs(), samples=6, seed=2).logits)
        assert first.mutual_information.min() > 0
        assert torch.equal(predict(laplace, inputs()).logits, expected)
        assert torch.equal(predict(model, inputs()).logits, expected)

    def test_the_samples_have_the_covariance_of_the_gauss_newton_matrix(self) -> None:
        """One feature vector x a row: H = sum_n (diag(p) - p p^T) kron x x^T, posterior precision H + lambda I."""
        torch.manual_seed(0)
        head, x = nn.Linear(2, 2, bias=False), torch.randn(20, 2)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = head

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.head(x)
                return out

        laplace = LaplacePredictor(Model(), "full", prior_precision=3.0).fit({"x": x, "labels": torch.arange(20) % 2})
        p = head(x).softmax(-1).detach()
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        precision = torch.einsum("nab,ni,nj->aibj", curvature, x, x).reshape(4, 4) + 3 * torch.eye(4)
        sampler = laplace.sampler(20_000, 0, False, lambda model, batch: model(**batch))
        points = torch.eye(2)
        with torch.inference_mode():
            logits = sampler({"x": points})
        assert logits.shape == (20_000, 2, 2)
        # Logit c of unit vector i is weight (c, i).
        weights = logits.permute(0, 2, 1).reshape(-1, 4)
        torch.testing.assert_close(weights.mean(0), head.weight.detach().flatten().double(), rtol=0, atol=0.02)
        torch.testing.assert_close(weights.T.cov(), precision.inverse().double(), rtol=0.06, atol=0.004)

    def test_what_cannot_work_is_refused(self) -> None:
        model = classifier("bert")
        with pytest.raises(BayesLoraError, match="the posterior is not fitted: call fit"):
            predict(LaplacePredictor(model), inputs(), samples=2)
        with pytest.raises(BayesLoraError, match="no labels"):
            LaplacePredictor(model).fit(inputs())
        with pytest.raises(BayesLoraError, match="structure is 'rank'"):
            LaplacePredictor(model, "rank")  # type: ignore[arg-type]
        with pytest.raises(BayesLoraError, match="do not come straight from a linear layer"):
            LaplacePredictor(noisy(classifier("llama"), ["score"])).fit(data())
