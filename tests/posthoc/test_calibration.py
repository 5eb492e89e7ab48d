"""Predictors around finished models: dropout, ensembles, temperatures, all behind `predict`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.posthoc import DeepEnsemble, MCDropout, TemperatureScaling
from bayeslora.prediction import predict
from tests.prediction.models import TARGETS, classifier, inputs, noisy


class Fixed(nn.Module):
    """Gives its input back as logits, after dropout."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(rate)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x) * self.scale


def lora(seed: int, dropout: float = 0.0) -> PeftModel:
    """A LoRA adapter and head as after training, on the same base model for every seed."""
    config = LoraConfig(r=2, target_modules=TARGETS["bert"], lora_dropout=dropout, task_type="SEQ_CLS")
    model = get_peft_model(classifier("bert"), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(std=0.5)
    return model.eval()


def test_dropout_samples_average_over_masks_and_leave_everything_as_it_was() -> None:
    model, x = Fixed(0.5), torch.tensor([[2.0, 0.0]])
    state = torch.get_rng_state()
    prediction = predict(MCDropout(model), {"x": x}, samples=400, per_sample=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.dropout.training
    assert prediction.sample_probabilities is not None
    kept, dropped = torch.tensor([4.0, 0.0]).softmax(-1)[0], 0.5  # scaled up by 1 / (1 - rate), or zero
    seen = prediction.sample_probabilities[:, 0, 0]
    assert {round(value, 6) for value in seen.tolist()} == {round(float(kept), 6), dropped}
    assert prediction.probabilities[0, 0] == pytest.approx(float(kept + dropped) / 2, abs=0.05)
    assert prediction.mutual_information[0] > 0.1
    assert torch.equal(predict(MCDropout(model), {"x": x}, samples=0).logits, x.double())


def test_dropout_of_an_adapter_is_seeded() -> None:
    model = lora(0, dropout=0.5)
    first = predict(MCDropout(model), inputs(), samples=4, seed=1)
    assert torch.equal(first.logits, predict(MCDropout(model), inputs(), samples=4, seed=1).logits)
    assert not torch.equal(first.logits, predict(MCDropout(model), inputs(), samples=4, seed=2).logits)
    assert first.mutual_information.max() > 1e-6


@pytest.mark.parametrize("model", [Fixed(0.0), nn.Linear(2, 2)], ids=["zero", "none"])
def test_dropout_that_would_do_nothing_is_refused(model: nn.Module) -> None:
    with pytest.raises(BayesLoraError, match="but Monte-Carlo dropout needs a rate above 0"):
        MCDropout(model)


def test_an_ensemble_averages_probabilities_of_adapters_and_their_heads(tmp_path: Path) -> None:
    members = [lora(seed) for seed in range(3)]
    expected = torch.stack([predict(member, inputs()).probabilities for member in members])
    for index, member in enumerate(members):
        member.save_pretrained(str(tmp_path / str(index)))
    ensemble = DeepEnsemble.from_folders(classifier("bert"), [tmp_path / str(index) for index in range(3)])
    for samples in (0, 3):
        found = predict(ensemble, inputs(), samples, per_sample=True)
        torch.testing.assert_close(found.probabilities, expected.mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(found.sample_probabilities, expected, rtol=0, atol=1e-6)
    assert found.mutual_information.min() > 0
    whole = predict(DeepEnsemble(members), inputs())
    torch.testing.assert_close(whole.probabilities, found.probabilities, rtol=0, atol=1e-6)


def test_an_ensemble_leaves_the_active_adapter_and_what_is_trained() -> None:
    model = lora(0)
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS["bert"], task_type="SEQ_CLS"))
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    alone = predict(model, inputs()).logits
    predict(DeepEnsemble(model), inputs())
    assert model.active_adapter == "default"
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert torch.equal(predict(model, inputs()).logits, alone)


def test_ensembles_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="has 1 member, but needs at least 2"):
        DeepEnsemble([Fixed()])
    with pytest.raises(BayesLoraError, match="the adapter 'b' was given, but the model has default"):
        DeepEnsemble(lora(0), ["default", "b"])
    with pytest.raises(BayesLoraError, match="samples is 5, but the ensemble's samples are its 2 members"):
        predict(DeepEnsemble([Fixed(), Fixed()]), {"x": torch.zeros(1, 2)}, samples=5)
    with pytest.raises(BayesLoraError, match="lacks an adapter for this model"):
        DeepEnsemble.from_folders(classifier("bert"), [tmp_path, tmp_path])


def held_out(temperature: float, count: int = 4000) -> dict[str, Tensor]:
    """Logits, and labels that are drawn from them at `temperature`."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 4, generator=generator) * 3
    labels = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
    return {"x": logits, "labels": labels}


@pytest.mark.parametrize("true", [0.5, 2.0])
def test_the_temperature_that_made_the_labels_is_found(true: float) -> None:
    data = held_out(true)
    scaled = TemperatureScaling(Fixed()).fit([{name: value[:1000] for name, value in data.items()}, data])
    assert scaled.temperature == pytest.approx(true, rel=0.05)
    before, after = predict(Fixed(), data), predict(scaled, data)
    assert torch.equal(before.labels, after.labels)
    torch.testing.assert_close(after.logits * scaled.temperature, before.logits)
    rows = torch.arange(len(data["labels"]))
    assert (
        -after.logits.log_softmax(-1)[rows, data["labels"]].mean()
        < -before.logits.log_softmax(-1)[rows, data["labels"]].mean()
    )


def test_a_temperature_scales_the_samples_of_another_predictor() -> None:
    x = {"x": torch.randn(5, 3) * 4}
    plain = predict(MCDropout(Fixed(0.5)), x, samples=6, per_sample=True)
    scaled = predict(TemperatureScaling(MCDropout(Fixed(0.5)), 2.0), x, samples=6, per_sample=True)
    assert plain.sample_probabilities is not None
    expected = (plain.sample_probabilities.log() / 2).softmax(-1)
    torch.testing.assert_close(scaled.sample_probabilities, expected)
    torch.testing.assert_close(scaled.probabilities, expected.mean(0))
    model = noisy(classifier("bert"), TARGETS["bert"])
    assert predict(TemperatureScaling(model, 1.5), inputs(), samples=3).mutual_information.max() > 0


def test_held_out_data_that_say_nothing_about_confidence_are_refused() -> None:
    x = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    with pytest.raises(
        BayesLoraError, match=r"best temperature for the 2 held-out examples is 0\.02, but must be inside"
    ):
        TemperatureScaling(Fixed()).fit({"x": x, "labels": torch.tensor([0, 1])})
    with pytest.raises(BayesLoraError, match="best temperature for the 2 held-out examples is 50, but must be inside"):
        TemperatureScaling(Fixed()).fit({"x": x, "labels": torch.tensor([1, 0])})
    with pytest.raises(BayesLoraError, match="a batch has x, but labels are needed too"):
        TemperatureScaling(Fixed()).fit({"x": x})
    with pytest.raises(BayesLoraError, match=r"temperature is 0, but must be positive"):
        TemperatureScaling(Fixed(), 0)
    with pytest.raises(BayesLoraError, match="a regression"):
        predict(TemperatureScaling(Fixed()), {"x": torch.zeros(2, 1)})


def test_logits_can_come_from_a_function_and_classes_may_be_absent() -> None:
    model = noisy(classifier("bert"), TARGETS["bert"])

    def two_of_three(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits.masked_fill(batch["absent"], float("-inf"))

    absent = torch.zeros(4, 3, dtype=torch.bool)
    absent[1, 2] = True
    for samples in (0, 3):
        found = predict(model, {**inputs(), "absent": absent}, samples, logits=two_of_three)
        assert found.probabilities[1, 2] == 0 and found.probabilities[0].min() > 0
        for values in (found.entropy, found.expected_entropy, found.mutual_information):
            assert torch.isfinite(values).all()
