"""LoRA cut by SVD: equal to the dense decomposition, with ranks that save, load and predict.

With data: the components that exact gradients choose, and predictions that move less.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from bayeslora import describe
from bayeslora.errors import BayesLoraError
from bayeslora.methods.blora.components import close_together, taken_over
from bayeslora.posthoc import truncate_rank
from bayeslora.posthoc.truncation import component_sketch
from bayeslora.prediction import predict
from tests.conftest import build_tiny_llama
from tests.posthoc.test_bayesianize import SETTINGS, trained_lora
from tests.prediction.models import classifier, inputs
from tests.processes import run_code


def updates(model: Any) -> dict[str, Tensor]:
    """s B A of every adapted layer, in float64."""
    return {
        path: module.scaling["default"]
        * (module.lora_B["default"].weight.double() @ module.lora_A["default"].weight.double()).detach()
        for path, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }


def cut(update: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(update, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "rslora", "patterns"])
@pytest.mark.parametrize("rank", [1, 2, 3, 9])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_one_rank_gives_the_truncated_dense_decomposition(family: str, rank: int, settings: dict[str, object]) -> None:
    model = trained_lora(family, **settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = updates(truncate_rank(model, rank))
    for path, update in updates(model).items():
        torch.testing.assert_close(found[path], cut(update, rank), rtol=1e-5, atol=1e-5 * float(update.abs().max()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_full_rank_predicts_what_the_model_predicts() -> None:
    model = trained_lora(rank_pattern={"value": 2}, alpha_pattern={"query": 5})
    again = truncate_rank(model, 4)
    torch.testing.assert_close(predict(again, inputs()).logits, predict(model, inputs()).logits, rtol=1e-4, atol=1e-5)
    assert describe(again) == describe(model)


def test_a_mean_rank_keeps_the_largest_singular_values_of_all_layers() -> None:
    model = trained_lora(alpha_pattern={"query": 5})
    dense = updates(model)
    values = torch.cat([torch.linalg.svdvals(update)[:4] for update in dense.values()]).sort(descending=True).values
    for mean in (0.5, 1.0, 1.5, 4.0):
        total = round(mean * len(dense))
        least = values[total - 1] * (1 - 1e-9)
        ranks = {path: int((torch.linalg.svdvals(update)[:4] >= least).sum()) for path, update in dense.items()}
        new = truncate_rank(model, mean_rank=mean)
        assert {layer.name: layer.rank for layer in describe(new)} == {p: k for p, k in ranks.items() if k}
        assert sum(ranks.values()) == total


def test_given_ranks_may_be_0_and_are_saved_and_loaded(tmp_path: Path) -> None:
    model = trained_lora()
    paths = list(updates(model))
    given = dict(zip(paths, (0, 1, 2, 3), strict=False))
    new = truncate_rank(model, given)
    ranks = {layer.name: layer.rank for layer in describe(new)}
    assert ranks == {paths[1]: 1, paths[2]: 2, paths[3]: 3, **dict.fromkeys(paths[4:], 4)}
    expected = predict(new, inputs()).logits
    new.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(classifier("bert"), str(tmp_path)).eval()
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert torch.equal(predict(loaded, inputs()).logits, expected)
    by_hand = trained_lora()
    by_hand.load_state_dict(model.state_dict())
    for path, update in updates(model).items():
        base = by_hand.get_base_model().get_submodule(path)
        base.base_layer.weight.data += cut(update, given.get(path, 4)).float()
        base.lora_B["default"].weight.data.zero_()
    torch.testing.assert_close(predict(by_hand, inputs()).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_layers_that_had_no_adapter_do_not_get_one(layers: list[int]) -> None:
    model = trained_lora(layers_to_transform=layers)
    paths = list(updates(model))
    new = truncate_rank(model, {paths[0]: 0})
    assert list(updates(new)) == paths[1:]


def test_what_cannot_be_cut_is_refused() -> None:
    model = trained_lora()
    path = next(iter(updates(model)))
    with pytest.raises(BayesLoraError, match="rank is None and mean_rank None, but exactly one must be given"):
        truncate_rank(model)
    with pytest.raises(BayesLoraError, match="rank is 0, but must be a whole number of at least 1"):
        truncate_rank(model, 0)
    with pytest.raises(BayesLoraError, match=f"the rank of {path} is 5, but must be a whole number from 0 to 4"):
        truncate_rank(model, {path: 5})
    with pytest.raises(BayesLoraError, match="rank names 'query', but the adapted layers are"):
        truncate_rank(model, {"query": 1})
    with pytest.raises(BayesLoraError, match="every rank is 0"):
        truncate_rank(model, dict.fromkeys(updates(model), 0))
    for mean in (0.0, 4.1, float("nan")):
        with pytest.raises(BayesLoraError, match="at most 4 for this adapter"):
            truncate_rank(model, mean_rank=mean)
    with pytest.raises(BayesLoraError, match="has the adapters none, but must have exactly one LORA"):
        truncate_rank(classifier("bert"), 1)
    pissa = get_peft_model(classifier("bert"), LoraConfig(target_modules=["value"], init_lora_weights="pissa"))
    with pytest.raises(BayesLoraError, match="init_lora_weights is 'pissa', which changes the base weights"):
        truncate_rank(pissa, 1)


# With data.


class Components:
    """A LoRA whose A and B are the singular vectors of each update, so that a factor turns a component on and off."""

    def __init__(self, model: Any) -> None:
        self.model, self.updates = model, updates(model)
        self.ranks = [module.r["default"] for module in _adapted(model)]
        self.factors: list[Tensor] = []
        for place, (module, update) in enumerate(zip(_adapted(model), self.updates.values(), strict=True)):
            u, s, vh = torch.linalg.svd(update / module.scaling["default"], full_matrices=False)
            r = self.ranks[place]
            module.lora_A["default"].weight.data = vh[:r].float()
            module.lora_B["default"].weight.data = (u[:, :r] * s[:r]).float()
            module.lora_A["default"].register_forward_hook(lambda _, __, out, place=place: out * self.factors[place])

    def logits(self, batch: dict[str, Tensor], factors: Tensor) -> Tensor:
        self.factors = list(factors.split(self.ranks))
        logits: Tensor = self.model(**batch).logits
        return logits

    def dense(self, factors: Tensor) -> dict[str, Tensor]:
        """Update of every layer with these factors (K,) of its components."""
        found = {}
        for (path, update), part in zip(self.updates.items(), factors.split(self.ranks), strict=True):
            u, s, vh = torch.linalg.svd(update, full_matrices=False)
            found[path] = (u[:, : len(part)] * s[: len(part)] * part) @ vh[: len(part)]
        return found

    def scores(self, batch: dict[str, Tensor]) -> Tensor:
        """Derivatives (rows, K) that have the Fisher information of a row, up to their signs, of up to two logits."""
        rows = []
        for row in range(len(batch["input_ids"])):
            factors = torch.ones(sum(self.ranks), requires_grad=True)
            logits = self.logits({name: value[row : row + 1] for name, value in batch.items()}, factors)[0]
            scale = 2**0.5 if len(logits) == 1 else torch.softmax(logits, -1).detach().prod().sqrt()
            (gradient,) = torch.autograd.grad((logits[-1] - (logits[0] if len(logits) > 1 else 0)) * scale, factors)
            rows.append(gradient)
        return torch.stack(rows).double()


def _adapted(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def small_lora(seed: int = 0, num_labels: int = 2, size: float = 0.1, **settings: object) -> PeftModel:
    """A model with a LoRA that changes its predictions a little."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"], task_type="SEQ_CLS", **settings)
    model = get_peft_model(classifier("bert", layers=2, num_labels=num_labels), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * size**0.5
        elif "classifier" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model.eval()


def divergence(model: Any, other: Any, batch: dict[str, Tensor]) -> float:
    """Mean over rows of KL(model || other)."""
    p, q = (predict(each, batch).logits.log_softmax(-1) for each in (model, other))
    return float((p.exp() * (p - q)).sum(1).mean())


def halves() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    rows = inputs(256)
    return {name: v[:128] for name, v in rows.items()}, {name: v[128:] for name, v in rows.items()}


@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "rslora", "patterns"])
def test_data_choose_what_exact_gradients_of_single_rows_choose(num_labels: int, settings: dict[str, object]) -> None:
    """Nine rows, none of which shares its bucket of the sketch: then it is their second moment, not an estimate."""
    model, data = small_lora(num_labels=num_labels, **settings), inputs(9)
    components = Components(small_lora(num_labels=num_labels, **settings))
    scores = components.scores(data)
    is_open, _ = close_together(scores, limit=6)
    expected = components.dense(taken_over(scores, torch.ones_like(is_open), is_open) * is_open)
    found = updates(truncate_rank(model, mean_rank=1.5, data=data))
    assert len({*found} - {path for path, update in expected.items() if not update.any()}) == len(found)
    for path, update in expected.items():
        largest = float(update.abs().max())
        torch.testing.assert_close(found.get(path, torch.zeros(())) + 0 * update, update, rtol=0, atol=2e-3 * largest)


def test_the_predictions_move_less_than_with_any_set_of_components() -> None:
    model, (data, _) = small_lora(), halves()
    components = Components(small_lora())
    before = components.logits(data, torch.ones(8)).log_softmax(-1).detach()
    found = []
    for chosen in itertools.combinations(range(8), 4):
        after = components.logits(data, torch.zeros(8).index_fill(0, torch.tensor(chosen), 1.0)).log_softmax(-1)
        found.append(float((before.exp() * (before - after)).sum(1).mean().detach()))
    assert divergence(model, truncate_rank(model, mean_rank=1, data=data), data) < min(found)
    assert min(found) < 0.2 * sum(found) / len(found)


def test_the_predictions_of_other_rows_move_far_less_than_by_singular_values() -> None:
    data, others = halves()
    ratios = []
    for seed, mean in itertools.product(range(2), (0.5, 1.0, 1.5)):
        model = small_lora(seed, num_labels=seed % 2 + 2, size=0.3)
        by_values = divergence(model, truncate_rank(model, mean_rank=mean), others)
        new = truncate_rank(model, mean_rank=mean, data=data)
        assert sum(layer.rank for layer in describe(new)) == round(mean * 4)
        ratios.append(divergence(model, new, others) / by_values)
    assert torch.tensor(ratios).log().mean().exp() < 0.3


def test_a_seed_a_batch_or_batches_in_any_mode_give_one_result() -> None:
    data, _ = halves()
    model = small_lora(num_labels=3, lora_dropout=0.5)
    expected = updates(truncate_rank(model, mean_rank=1, data=data, seed=3))
    again = updates(truncate_rank(model.train(), mean_rank=1, data=iter([data]), seed=3))
    assert model.training and again.keys() == expected.keys()
    assert all(torch.equal(again[path], update) for path, update in expected.items())
    other = updates(truncate_rank(model, mean_rank=1, data=data, seed=4))
    assert any(not torch.equal(other.get(path, torch.zeros(())), update) for path, update in expected.items())
    parts = [{name: value[start : start + 32] for name, value in data.items()} for start in (0, 32, 64, 96)]
    two_classes = small_lora()
    one, four = (truncate_rank(two_classes, mean_rank=1, data=each) for each in (data, parts))
    assert divergence(two_classes, four, data) < 1.5 * divergence(two_classes, one, data) + 1e-6


def test_the_sketch_of_a_language_model_is_the_information_of_the_predicted_answers() -> None:
    """Summed over all answers and averaged over seeds, at the position before the only labelled token."""
    torch.manual_seed(0)
    base = build_tiny_llama(vocab_size=12, num_hidden_layers=1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    ids = torch.randint(4, 12, (6, 5))
    labels = torch.where(torch.arange(5) == 3, ids, -100)
    components = Components(model)
    expected = torch.zeros(2, 2).double()
    for row in ids:
        factors = torch.ones(2, requires_grad=True)
        logs = components.logits({"input_ids": row[None]}, factors)[0, 2].log_softmax(-1)
        for log in logs:
            (gradient,) = torch.autograd.grad(log, factors, retain_graph=True)
            expected += log.exp().item() * torch.outer(gradient, gradient).double()
    components.factors = [torch.ones(2)]
    found = torch.zeros(2, 2).double()
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    paths = list(components.updates)
    for seed in range(150):
        sketch = component_sketch(model, "default", paths, data, seed)
        found += sketch.T @ sketch / 150
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2 * float(expected.diagonal().max()))


def test_what_data_have_chosen_predicts_alike_in_a_new_process_with_peft_alone(tmp_path: Path) -> None:
    model, (data, others) = small_lora(num_labels=3, size=0.5), halves()
    new = truncate_rank(model, mean_rank=0.75, data=data)
    assert len({layer.rank for layer in describe(new)}) > 1 or len(describe(new)) < 4
    classifier("bert", layers=2).save_pretrained(str(tmp_path / "base"))
    new.save_pretrained(str(tmp_path / "adapter"))
    torch.save({"inputs": others, "logits": new(**others).logits.detach()}, tmp_path / "expected.pt")
    code = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
base = AutoModelForSequenceClassification.from_pretrained("base")
expected = torch.load("expected.pt")
with torch.no_grad():
    logits = PeftModel.from_pretrained(base, "adapter").eval()(**expected["inputs"]).logits
assert "bayeslora" not in sys.modules
print("difference", float((logits - expected["logits"]).abs().max()))
"""
    assert float(run_code(code, tmp_path).rpartition("difference ")[2]) == 0.0


def test_data_that_cannot_decide_are_refused() -> None:
    model, data = small_lora(), inputs(4)
    with pytest.raises(BayesLoraError, match="data is given with rank, but chooses components for a mean rank"):
        truncate_rank(model, 1, data=data)
    with pytest.raises(BayesLoraError, match="the data show no finite effect of the adapter"):
        truncate_rank(model, mean_rank=1, data=[])
    for module in _adapted(model):
        module.lora_B["default"].weight.data.zero_()
    with pytest.raises(BayesLoraError, match="the data show no finite effect of the adapter"):
        truncate_rank(model, mean_rank=1, data=data)
