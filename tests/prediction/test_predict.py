"""`predict`: probabilities, uncertainty, and a model left as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bayeslora import MeLoraConfig
from bayeslora.errors import BayesLoraError
from bayeslora.prediction import evaluation_mode, predict
from tests.conftest import build_tiny_bert


class Fixed(nn.Module):
    """Gives its input back as logits, in some output format, and refuses labels."""

    def __init__(self, wrap: Any = lambda logits: logits) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.dropout(x))


LOGITS = torch.tensor([[0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0], [2000.0, 0.0, 0.0]])


def test_probabilities_labels_and_entropy_by_hand() -> None:
    prediction = predict(Fixed(), {"x": LOGITS})
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(prediction.probabilities, expected, rtol=0, atol=1e-7)
    assert prediction.labels.tolist() == [0, 0, 0]
    entropy = torch.tensor([math.log(3), 1.5 * math.log(2), 0.0], dtype=torch.float64)
    torch.testing.assert_close(prediction.entropy, entropy, rtol=0, atol=1e-7)
    assert prediction.mutual_information.tolist() == [0.0, 0.0, 0.0]
    assert prediction.probabilities.dtype == prediction.logits.dtype == torch.float64
    assert len(prediction) == 3


def test_a_loader_gives_what_one_batch_gives_and_the_last_partial_batch_counts() -> None:
    rows = torch.randn(7, 4)
    loader = DataLoader([{"x": row} for row in rows], batch_size=3)
    assert torch.equal(predict(Fixed(), loader).logits, predict(Fixed(), {"x": rows}).logits)


@pytest.mark.parametrize(
    "wrap", [lambda logits: (logits, "states"), lambda logits: {"logits": logits, "loss": None}], ids=["tuple", "dict"]
)
def test_logits_are_found_in_the_output(wrap: Any) -> None:
    assert torch.equal(predict(Fixed(wrap), {"x": LOGITS}).logits, LOGITS.double())


def test_one_output_is_a_regression_without_classes() -> None:
    prediction = predict(Fixed(), {"x": torch.tensor([[0.5], [-2.0]])})
    assert prediction.labels.tolist() == [0.5, -2.0]
    assert prediction.probabilities.shape == (2, 0)
    assert prediction.entropy.tolist() == [0.0, 0.0]


def test_labels_are_ignored_and_no_loss_is_computed(tiny_bert: Any) -> None:
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 8, 3]])
    out_of_range = torch.tensor([99, 99])
    prediction = predict(tiny_bert, {"input_ids": ids, "labels": out_of_range})
    torch.testing.assert_close(prediction.logits.float(), tiny_bert(input_ids=ids).logits.detach())


def test_every_module_is_in_the_mode_it_was_in_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)), Fixed())
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    fixed = Fixed(lambda logits: logits.sum()).train()
    with pytest.raises(BayesLoraError, match=r"logits have shape \(\), but must be \(batch, classes\)"):
        predict(fixed, {"x": LOGITS})
    assert fixed.training and fixed.dropout.training


def test_dropout_is_off_and_results_can_enter_autograd() -> None:
    model = Fixed().train()
    prediction = predict(model, {"x": LOGITS})
    assert torch.equal(prediction.logits, LOGITS.double())
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (prediction.probabilities * weight).sum().backward()
    assert weight.grad is not None


def test_a_deterministic_adapter_refuses_samples(tiny_bert: Any) -> None:
    model = get_peft_model(tiny_bert, LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    batch = {"input_ids": torch.tensor([[2, 5, 3]])}
    assert predict(model, batch).probabilities.sum().item() == pytest.approx(1.0)
    with pytest.raises(BayesLoraError, match=r"samples is 10, but the adapter \(LORA\) is deterministic"):
        predict(model, batch, samples=10)
    with pytest.raises(BayesLoraError, match=r"the model \(Fixed\) is deterministic"):
        predict(Fixed(), {"x": LOGITS}, samples=1)
    with pytest.raises(BayesLoraError, match="samples is -1, but must be a whole number of at least 0"):
        predict(model, batch, samples=-1)


def test_bad_batches_are_named() -> None:
    with pytest.raises(BayesLoraError, match="the loader gave 0 batches"):
        predict(Fixed(), [])
    with pytest.raises(BayesLoraError, match="input 'x' is a list, but must be a tensor"):
        predict(Fixed(), {"x": [[1.0, 2.0]]})
    with pytest.raises(BayesLoraError, match="a batch is a Tensor, but must be a mapping"):
        predict(Fixed(), [LOGITS])
    with pytest.raises(BayesLoraError, match="load a sequence classifier"):
        predict(Fixed(lambda logits: logits[None]), {"x": LOGITS})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_that_attention_hides_is_told(value: float) -> None:
    """A key of NaN gives finite logits in torch's attention on some processors."""
    model = get_peft_model(build_tiny_bert(), MeLoraConfig(r=2, target_modules=["key"], task_type="SEQ_CLS"))
    next(p for n, p in model.named_parameters() if "melora_B" in n).data[0, 0] = value
    with pytest.raises(BayesLoraError, match=r"not finite"):
        predict(model, {"input_ids": torch.arange(12).view(2, 6)})
