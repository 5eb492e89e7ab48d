"""LoRA cut by SVD: equal to the dense decomposition, with ranks that save, load and predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from bayeslora import describe
from bayeslora.errors import BayesLoraError
from bayeslora.posthoc import truncate_rank
from bayeslora.prediction import predict
from tests.posthoc.test_bayesianize import SETTINGS, trained_lora
from tests.prediction.models import classifier, inputs


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
