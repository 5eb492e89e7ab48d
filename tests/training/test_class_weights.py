"""Class weights: known weights, a loss and gradients that plain torch gives, and an optimum worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.training.class_weights import class_weights, weighed_classes
from tests.conftest import build_tiny_bert

NAMES, COUNTS = ["bug", "a=b", "other"], [60, 30, 10]


class Constant(nn.Module):
    """The same logits for every row, with the mean cross-entropy as loss, times `scale`."""

    def __init__(self, logits: list[float], scale: float = 1.0) -> None:
        super().__init__()
        self.logits, self.scale = nn.Parameter(torch.tensor(logits)), scale

    def forward(self, labels: Tensor) -> Any:
        logits = self.logits.expand(len(labels), -1)
        return SimpleNamespace(loss=self.scale * F.cross_entropy(logits, labels), logits=logits)


def test_balanced_classes_have_the_same_total_and_rows_a_mean_of_one() -> None:
    weights = class_weights(["balanced"], NAMES, COUNTS)
    assert weights == pytest.approx([100 / (3 * count) for count in COUNTS])
    assert sum(w * n for w, n in zip(weights, COUNTS, strict=True)) == pytest.approx(100)
    assert class_weights(["balanced"], NAMES, [50, 50, 0]) == pytest.approx([1, 1, 0])


def test_given_weights_keep_their_ratios() -> None:
    weights = class_weights(["a=b=4"], NAMES, COUNTS)
    assert weights[1] / weights[0] == pytest.approx(4) and weights[0] == weights[2]
    assert sum(w * n for w, n in zip(weights, COUNTS, strict=True)) == pytest.approx(100)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["bugs=2"], "'bugs', but the classes are bug, a=b, other"),
        (["bug=x"], "'bug=x', but takes"),
        (["bug=-1"], "takes balanced or"),
        (["balanced", "bug=2"], "'balanced', but takes"),
        (["bug=1", "bug=2"], "each class once"),
        (["bug=0", "a=b=0", "other=0"], "0 for all rows"),
    ],
)
def test_what_cannot_be_used_is_told(asked: list[str], words: str) -> None:
    with pytest.raises(BayesLoraError, match=words.replace("(", "\\(")):
        class_weights(asked, NAMES, COUNTS)


def test_balanced_weights_make_equal_probabilities_the_optimum_of_a_constant() -> None:
    """Without features the best probabilities are the classes' weighted shares: 1/3 each, not 0.6, 0.3 and 0.1."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    for weights, shares in ((class_weights(["balanced"], NAMES, COUNTS), [1 / 3] * 3), ([], [0.6, 0.3, 0.1])):
        model = Constant([float(torch.tensor(share).log()) for share in shares])
        with weighed_classes(model, weights):
            model(labels=labels).loss.backward()
        assert model.logits.grad is not None and model.logits.grad.abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_loss_and_gradients_are_plain_torchs_and_the_models_factor_stays(scale: float) -> None:
    labels, weights = torch.tensor([0, 2, 2, 1]), [0.5, 1.0, 3.0]
    model, plain = Constant([0.3, -0.2, 0.9], scale), nn.Parameter(torch.tensor([0.3, -0.2, 0.9]))
    wanted = scale * (torch.tensor(weights)[labels] * F.cross_entropy(plain.expand(4, -1), labels, reduction="none"))
    wanted = wanted.sum() / 4
    wanted.backward()
    with weighed_classes(model, weights):
        loss = model(labels=labels).loss
        loss.backward()
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(model.logits.grad, plain.grad)
        model.eval()
        torch.testing.assert_close(model(labels=labels).loss, scale * F.cross_entropy(plain.expand(4, -1), labels))
    model.train()
    torch.testing.assert_close(model(labels=labels).loss, scale * F.cross_entropy(plain.expand(4, -1), labels))


def test_a_transformer_returns_the_weighted_loss() -> None:
    model = build_tiny_bert(num_labels=3).train()
    inputs = {"input_ids": torch.randint(5, 50, (6, 8)), "attention_mask": torch.ones(6, 8, dtype=torch.long)}
    labels, weights = torch.tensor([0, 1, 2, 0, 0, 1]), torch.tensor([0.5, 1.5, 2.0])
    with weighed_classes(model, weights.tolist()):
        output = model(**inputs, labels=labels)
    losses = F.cross_entropy(output.logits, labels, reduction="none")
    torch.testing.assert_close(output.loss, (weights[labels] * losses).mean())
