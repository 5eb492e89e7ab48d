"""Training-free Bayesianization: the same mean, the noise it promises, the largest scale that holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import bayeslora
from bayeslora.errors import BayesLoraError
from bayeslora.methods.variational import stochastic_layers
from bayeslora.posthoc import bayesianize
from bayeslora.posthoc.bayesianize import largest_allowed
from bayeslora.posthoc.temperature import predictive_nll
from bayeslora.prediction import ModelPredictor, predict, sampled_logits
from tests.prediction.models import TARGETS, classifier, inputs


def trained_lora(family: str = "bert", **settings: object) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS[family], task_type="SEQ_CLS", **settings)
    model = get_peft_model(classifier(family), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.4)
        elif "modules_to_save" in name:
            parameter.data.normal_(std=4)
    return model.eval()


def anchor(model: nn.Module, rows: int = 24) -> dict[str, Tensor]:
    """Data that the model gets right, as it would after training: noise can only do harm."""
    return {**inputs(rows), "labels": predict(model, inputs(rows)).labels}


SETTINGS = [{}, {"use_rslora": True}, {"rank_pattern": {"value": 2}, "alpha_pattern": {"query": 5}}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "rslora", "patterns"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_mean_is_the_lora_that_was_given(family: str, settings: dict[str, object]) -> None:
    model = trained_lora(family, **settings)
    expected = predict(model, inputs()).logits
    new = bayesianize(model, anchor(model), samples=3, steps=2)
    torch.testing.assert_close(predict(new, inputs()).logits, expected, rtol=1e-4, atol=1e-5)
    assert predict(new, inputs(), samples=5).mutual_information.max() > 0


def test_the_scale_is_the_largest_tried_that_keeps_the_likelihood() -> None:
    model = trained_lora()
    data = anchor(model)
    before = predictive_nll(sampled_logits(ModelPredictor(model), data, 0), data["labels"])
    new = bayesianize(model, data, tolerance=0.05, samples=4, steps=6)
    after = predictive_nll(sampled_logits(ModelPredictor(new), data, 4), data["labels"])
    assert after <= before * 1.05
    for layer in stochastic_layers(new).values():
        layer.blob_G["default"].data.mul_(2**0.5 * 1.01)  # twice the deviation is past the bracket's other end
    wider = predictive_nll(sampled_logits(ModelPredictor(new), data, 4), data["labels"])
    assert wider > before * 1.05


def test_the_noise_is_equal_in_every_direction_of_the_column_space() -> None:
    model = trained_lora()
    new = bayesianize(model, anchor(model), samples=3, steps=2)
    for layer in stochastic_layers(new).values():
        b, std = layer.blob_B["default"], layer.blob_G["default"].square()
        columns = b.T @ b
        widths = columns.diagonal().sqrt()
        torch.testing.assert_close(columns, torch.diag(widths.square()), rtol=0, atol=1e-4 * float(widths.max()) ** 2)
        product = std * widths[:, None]
        torch.testing.assert_close(product, product[:1, :1].expand_as(product), rtol=1e-4, atol=0)


def test_the_result_is_saved_and_loaded_as_a_blob_adapter(tmp_path: Path) -> None:
    model = trained_lora()
    new = bayesianize(model, anchor(model), samples=3, steps=2)
    expected = predict(new, inputs(), samples=4).probabilities
    new.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(classifier("bert"), str(tmp_path)).eval()
    assert isinstance(loaded.peft_config["default"], bayeslora.BlobConfig)
    torch.testing.assert_close(predict(loaded, inputs(), samples=4).probabilities, expected, rtol=0, atol=1e-6)


def test_without_labels_the_predicted_classes_stand_for_them() -> None:
    data = inputs(24)
    model = trained_lora()
    labels = predict(model, data).labels
    state = {name: value.clone() for name, value in model.state_dict().items()}
    unlabelled = bayesianize(model, [data], samples=2, steps=3)
    again = trained_lora()
    again.load_state_dict(state)
    labelled = bayesianize(again, {**data, "labels": labels}, samples=2, steps=3)
    for key, value in unlabelled.state_dict().items():
        assert torch.equal(value, labelled.state_dict()[key]), key


@pytest.mark.parametrize("true", [3e-7, 0.0013, 2.0])
def test_the_search_returns_the_largest_value_that_was_allowed(true: float) -> None:
    tried: list[float] = []

    def allowed(scale: float) -> bool:
        tried.append(scale)
        return scale <= true

    found = largest_allowed(allowed, steps=8)
    assert len(tried) <= 14  # the start, at most 3 strides, 2 + 8 bisections
    assert found == max(scale for scale in tried if scale <= true)
    assert true / 2 ** (1 / 2**8) <= found <= true


def test_what_cannot_work_is_refused() -> None:
    untrained = get_peft_model(classifier("bert"), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(BayesLoraError, match="never lowers the anchor set's likelihood"):
        bayesianize(untrained, anchor(untrained, 4), samples=1)
    with pytest.raises(BayesLoraError, match="has the adapters none, but must have exactly one LORA"):
        bayesianize(classifier("bert"), inputs())
    with pytest.raises(BayesLoraError, match="has use_dora, but must be plain LoRA"):
        bayesianize(trained_lora(use_dora=True), inputs())
    for start in ("pissa", "olora"):
        text = f"init_lora_weights is '{start}', which changes the base weights, but the adapter alone must hold"
        with pytest.raises(BayesLoraError, match=text):
            bayesianize(trained_lora(init_lora_weights=start), inputs())
    with pytest.raises(BayesLoraError, match="tolerance is 0"):
        bayesianize(trained_lora(), inputs(), tolerance=0)
    with pytest.raises(BayesLoraError, match="always lowers the anchor set's likelihood"):
        largest_allowed(lambda scale: False, 3)
