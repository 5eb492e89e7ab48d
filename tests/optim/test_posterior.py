"""A posterior over the weights of plain LoRA: predicted with, saved beside the adapter, and loaded elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import bayeslora
from bayeslora import (
    IVON,
    BayesLoraError,
    ModelPredictor,
    TemperatureScaling,
    WeightPosterior,
    load_posterior,
    predict,
    save_posterior,
)
from bayeslora.posterior import POSTERIOR_FILE
from tests.conftest import build_tiny_bert

BATCH = {"input_ids": torch.randint(5, 60, (4, 6), generator=torch.Generator().manual_seed(2))}


def _trained(ess: float = 2.0) -> tuple[nn.Module, IVON]:
    """Plain LoRA after one step; a small `ess`, so that draws differ visibly."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(build_tiny_bert(num_hidden_layers=1), config)
    optimizer = IVON(bayeslora.parameter_groups(model, lr=0.1, weight_decay=1e-3), lr=0.1, ess=ess)
    optimizer.sample()
    model(**BATCH, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, IVON]:
    return _trained()


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_a_deterministic_adapter_predicts_with_its_optimizers_posterior(trained: tuple[nn.Module, IVON]) -> None:
    model, optimizer = trained
    before = _weights(model)
    mean = predict(model, BATCH)
    sampled = predict(model, BATCH, samples=4, optimizer=optimizer, per_sample=True)
    again = predict(model, [BATCH], samples=4, optimizer=optimizer, per_sample=True)
    assert torch.equal(sampled.sample_probabilities, again.sample_probabilities)
    assert (sampled.mutual_information > 1e-4).all()
    assert torch.equal(predict(model, BATCH, optimizer=optimizer).probabilities, mean.probabilities)
    # Draw number 2 is what the model computes with inside `sampled`.
    with torch.no_grad(), optimizer.sampled(seed=0, draw=2):
        logits = model(**BATCH).logits.double()
    torch.testing.assert_close(sampled.sample_probabilities[2], logits.softmax(-1), atol=1e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(_weights(model), before, strict=True))


def test_a_predictor_around_it_is_a_predictor(trained: tuple[nn.Module, IVON]) -> None:
    model, optimizer = trained
    softened = TemperatureScaling(ModelPredictor(model, optimizer), temperature=100.0)
    assert (predict(softened, BATCH, samples=2).probabilities - 0.5).abs().max() < 0.05
    with pytest.raises(BayesLoraError, match="ModelPredictor"):
        predict(softened, BATCH, samples=2, optimizer=optimizer)


def test_a_later_process_draws_the_same_from_the_saved_posterior(
    trained: tuple[nn.Module, IVON], tmp_path: Path
) -> None:
    model, optimizer = trained
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert save_posterior(model, optimizer, tmp_path) == tmp_path / POSTERIOR_FILE
    names = set(load_posterior(model, tmp_path).deviations)
    assert "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight" in names
    assert all(".default" not in name for name in names)

    loaded = PeftModel.from_pretrained(build_tiny_bert(num_hidden_layers=1), tmp_path, adapter_name="other").eval()
    assert not any(p.requires_grad for p in loaded.parameters())
    before = _weights(loaded)
    posterior = load_posterior(loaded, tmp_path)
    for antithetic in (False, True):
        expected = predict(model, BATCH, samples=3, seed=5, optimizer=optimizer, antithetic=antithetic)
        found = predict(posterior, BATCH, samples=3, seed=5, antithetic=antithetic)
        torch.testing.assert_close(found.probabilities, expected.probabilities, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(_weights(loaded), before, strict=True))
    with posterior.sampled(seed=1):
        assert not torch.equal(_weights(loaded)[-1], before[-1])


def test_what_could_not_be_drawn_is_refused(trained: tuple[nn.Module, IVON], tmp_path: Path) -> None:
    model, optimizer = trained
    with pytest.raises(BayesLoraError, match="AdamW was given, but a posterior over the weights is needed"):
        predict(model, BATCH, samples=2, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(BayesLoraError, match="AdamW was given, but a posterior over the weights is needed"):
        save_posterior(model, torch.optim.AdamW(model.parameters()), tmp_path)
    with pytest.raises(BayesLoraError, match="deterministic"):
        predict(model, BATCH, samples=2)
    with pytest.raises(BayesLoraError, match=r"posterior.safetensors is missing"):
        load_posterior(model, tmp_path)
    (tmp_path / POSTERIOR_FILE).write_bytes(b"damaged")
    with pytest.raises(BayesLoraError, match="damaged"):
        load_posterior(model, tmp_path)
    save_posterior(model, optimizer, tmp_path)
    with pytest.raises(BayesLoraError, match="but is missing from the model: load the adapter"):
        load_posterior(build_tiny_bert(num_hidden_layers=1), tmp_path)
    with pytest.raises(BayesLoraError, match="but the model lacks it: save"):
        save_posterior(build_tiny_bert(num_hidden_layers=1), optimizer, tmp_path)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    with pytest.raises(BayesLoraError, match="unmerge"):
        predict(merged, BATCH, samples=2, optimizer=optimizer)


def test_a_posterior_follows_ranks_that_are_cut() -> None:
    class Layer(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.A, self.B = nn.Parameter(torch.zeros(rank, 3)), nn.Parameter(torch.zeros(5, rank))

    def model(rank: int) -> nn.Module:
        return nn.ModuleDict({"one": Layer(rank), "two": Layer(4)})

    deviations = {"one.A": torch.rand(4, 3), "one.B": torch.rand(5, 4), "two.A": torch.rand(4, 3)}
    posterior = WeightPosterior(model(4), [("one.A", 12), ("", 7), ("one.B", 20), ("two.A", 12)], dict(deviations))
    posterior = posterior.cut(model(2), {"two": torch.ones(4).bool(), "one": torch.tensor([True, False, False, True])})
    assert posterior.order == [("one.A", 6), ("", 7), ("one.B", 10), ("two.A", 12)]
    assert torch.equal(posterior.deviations["one.A"], deviations["one.A"][[0, 3]])
    assert torch.equal(posterior.deviations["one.B"], deviations["one.B"][:, [0, 3]])
    assert torch.equal(posterior.deviations["two.A"], deviations["two.A"])


def test_equal_posteriors_are_equal_files(tmp_path: Path) -> None:
    """safetensors writes several entries of metadata in an order of chance."""
    model, optimizer = _trained()
    files = {save_posterior(model, optimizer, tmp_path / str(number)).read_bytes() for number in range(8)}
    assert len(files) == 1
