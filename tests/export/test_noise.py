"""How far noise of the size of float rounding moves a model's answers, which an export says and warns of."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForTokenClassification

from bayeslora import BLoraConfig, MeLoraConfig
from bayeslora.export import noise
from bayeslora.export.noise import moved_by_noise
from tests.conftest import build_tiny_bert, build_tiny_llama
from tests.methods.reference import FROZEN, layers_of, randomize, set_widths

TOKENS = {"input_ids": torch.arange(24).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}


def _blora(base: torch.nn.Module, targets: list[str], task: str) -> torch.nn.Module:
    config = BLoraConfig(r=4, target_modules=targets, init_weights=False, quantize_input=True, task_type=task)
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(model):
        randomize(layer, generator, FROZEN)
        set_widths(layer, **{"weight": 8, "in": 4, "A_out": 4, "E_out": 4, "out": 4})
        for kind in ("in", "A_out", "E_out", "out"):
            layer.quantizers("default").set_range(kind, torch.tensor(3.0))
    return model


def test_noise_is_measured_on_the_model_as_it_is_and_much_movement_is_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = _blora(build_tiny_bert(), ["query", "key", "value"], "SEQ_CLS")
    before = model(**TOKENS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = moved_by_noise(model, [TOKENS])
    assert found["noise_changed"] == 0 and 0 <= found["noise_divergence"] < noise.MOST_DIVERGENCE
    assert torch.equal(model(**TOKENS).logits, before)

    monkeypatch.setattr(noise, "NOISE", 0.5)
    monkeypatch.setattr(noise, "MOST_DIVERGENCE", found["noise_divergence"])
    with pytest.warns(UserWarning, match=r"noise of 0\.5 on the embedded tokens changes \d+\.\d% of this model's"):
        assert moved_by_noise(model, [TOKENS])["noise_divergence"] > found["noise_divergence"]


def test_every_next_token_of_a_language_model_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _blora(build_tiny_llama(), ["q_proj", "v_proj"], "CAUSAL_LM")
    monkeypatch.setattr(noise, "NOISE", 0.5)
    changed = moved_by_noise(model, [TOKENS])["noise_changed"]
    assert 0 < changed < 1 and changed * 24 == pytest.approx(round(changed * 24))
    assert moved_by_noise(model, [None]) and moved_by_noise(model, []) == {}


def test_tags_of_a_row_are_answers_of_its_tokens() -> None:
    base = AutoModelForTokenClassification.from_config(build_tiny_bert(num_labels=4).config)
    model = _blora(base, ["query"], "TOKEN_CLS")
    assert moved_by_noise(model, [TOKENS])["noise_changed"] == 0


def test_what_moves_by_rounding_alone_is_not_measured() -> None:
    plain = get_peft_model(build_tiny_bert(), MeLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert moved_by_noise(plain, [TOKENS]) == {}
    number = _blora(build_tiny_bert(num_labels=1), ["query"], "SEQ_CLS")
    assert moved_by_noise(number, [TOKENS]) == {}
