"""Ranks cut out for real: the same function from smaller tensors, saved small, reloaded equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from bayeslora import BayesLoop, BLoraConfig, describe, parameter_groups, shrink
from tests.methods.reference import (
    D_IN,
    D_OUT,
    FROZEN,
    LEARN,
    RANK,
    WARM_UP,
    Tiny,
    layers_of,
    seeded,
    tiny_model,
    train_steps,
)

X = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def _prune(layer: Any, diagonal: list[float], open_ranks: int) -> None:
    """Diagonal entries, and rank gates of which the first `open_ranks` are open."""
    layer.blora_E["default"].copy_(torch.tensor(diagonal))
    if "default" in layer.blora_rank:
        layer.blora_rank["default"].logits.copy_(torch.tensor([9.0] * open_ranks + [-9.0] * (RANK - open_ranks)))


def _pruned(phase: Any = FROZEN, **options: Any) -> nn.Module:
    model = tiny_model(phase, **options).eval()
    first, second = layers_of(model)
    _prune(first, [1.1, 0.0, 1.3, 0.9], 3)  # a hole and a closed tail: ranks 0 and 2 are left
    _prune(second, [0.0, 0.0, 0.0, 1.0], 3)  # nothing is left
    return model


@pytest.mark.parametrize(
    "options", [{}, {"mode": "ra"}, {"kind": "conv1d", "per_channel": True}, {"quantize_input": True}]
)
@pytest.mark.parametrize("phase", [WARM_UP, LEARN, FROZEN])
def test_shrinking_changes_no_output_and_no_description_but_the_parameters(
    phase: Any, options: dict[str, Any]
) -> None:
    model = _pruned(phase, **options)
    expected, before = model(X), [layer.to_dict() for layer in describe(model)]
    ranks = shrink(model)
    assert ranks == {"first": 2, "second": 0}
    torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-6)
    after = [layer.to_dict() for layer in describe(model)]
    cut = [2, 4]
    for one, two, gone in zip(before, after, cut, strict=True):
        per_rank = one["in_features"] + one["out_features"] + 1 + options.get("per_channel", False)  # A, B, E, a range
        assert one.pop("parameters") - two.pop("parameters") == gone * per_rank
        assert one == two


def test_shrinking_really_cuts_the_tensors_and_writes_the_ranks_into_the_configuration() -> None:
    model = _pruned()
    scaling = layers_of(model)[0].scaling["default"]
    shrink(model)
    first, second = layers_of(model)
    assert first.blora_A["default"].shape == (2, D_IN) and first.blora_B["default"].shape == (D_OUT, 2)
    assert first.blora_E["default"].tolist() == pytest.approx([1.1, 1.3])
    assert first.blora_rank["default"].logits.shape == (2,)
    assert second.blora_A["default"].shape == (0, D_OUT) and second.blora_B["default"].shape == (D_OUT, 0)
    assert first.scaling["default"] == scaling == 6 / RANK
    assert model.peft_config["default"].rank_pattern == {"first": 2, "second": 0}
    assert model.peft_config["default"].r == RANK


def test_a_rank_whose_diagonal_is_quantized_to_zero_is_cut() -> None:
    model = tiny_model(FROZEN, mode="q").eval()
    for layer in layers_of(model):
        quantizers = layer.blora_quantizers["default"]
        quantizers.gate_logits.data.fill_(-3.0)  # two bits: what is below a third of the range becomes zero
        quantizers.set_range("E", torch.tensor(1.5))
        _prune(layer, [1.0, 0.4, -1.2, -0.1], RANK)
    expected = model(X)
    assert [layer.rank for layer in describe(model)] == [2, 2]
    assert shrink(model) == {"first": 2, "second": 2}
    torch.testing.assert_close(model(X), expected, atol=1e-6, rtol=1e-6)
    assert layers_of(model)[0].blora_E["default"].tolist() == pytest.approx([1.0, -1.2])


def test_shrinking_twice_is_shrinking_once() -> None:
    model = _pruned()
    first = shrink(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert shrink(model) == first
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_nothing_is_cut_from_a_full_adapter() -> None:
    model = tiny_model(FROZEN, mode="ra").eval()
    for layer in layers_of(model):
        _prune(layer, [1.0, 2.0, -1.0, 0.5], RANK)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert shrink(model) == {"first": RANK, "second": RANK}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_shrunk_adapter_is_saved_small_and_reloads_equal(tmp_path: Path) -> None:
    model = _pruned()
    model.save_pretrained(tmp_path / "full")
    expected = model(X)
    shrink(model)
    model.save_pretrained(tmp_path / "small")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("full", "small")]
    # Four bytes for each entry of a row of A, a column of B, the diagonal, the gates, and two numbers of evidence: two
    # ranks here, four there.
    saved = 4 * (2 * (D_IN + D_OUT + 4) + 4 * (D_OUT + D_OUT + 4))
    assert sizes[0] - sizes[1] == pytest.approx(saved, abs=64)
    config = PeftConfig.from_pretrained(tmp_path / "small")
    assert config.rank_pattern == {"first": 2, "second": 0} and config.r == RANK
    again = PeftModel.from_pretrained(seeded(Tiny), tmp_path / "small").eval()
    torch.testing.assert_close(again(X), expected, atol=1e-6, rtol=0)
    assert [layer.initial_rank for layer in describe(again)] == [RANK, RANK]


def test_only_the_named_adapter_is_cut() -> None:
    model = _pruned()
    model.add_adapter("other", BLoraConfig(r=3, target_modules=["first"], init_weights=False))
    shrink(model, "default")
    layer = layers_of(model)[0]
    assert layer.blora_A["default"].shape[0] == 2 and layer.blora_A["other"].shape[0] == 3
    assert model.peft_config["other"].rank_pattern == {}


def test_a_model_without_our_adapter_is_left_alone() -> None:
    model = get_peft_model(Tiny(), LoraConfig(target_modules=["first"]))
    expected = model(X)
    assert shrink(model) == {} == shrink(Tiny())
    assert torch.equal(model(X), expected)


def test_a_shrunk_adapter_merges_and_trains_on() -> None:
    model = _pruned(mode="ra")
    shrink(model)
    expected = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    optimizer = torch.optim.AdamW(parameter_groups(model.train(), lr=1e-3))
    loop = BayesLoop(model, optimizer, total_steps=10)
    train_steps(model, optimizer, loop, X, 3)
    assert [layer.rank for layer in describe(model)] == [2, 0]
