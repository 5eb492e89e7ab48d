"""Costs as sums of products: the same numbers as `relative_bops` at any widths and ranks."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import bayeslora
from bayeslora.cost import SCOPES, bops_cost, bytes_cost, rank_cost, relative_bops
from bayeslora.errors import BayesLoraError
from bayeslora.vocabulary import ALL_KINDS, KINDS, WIDTHS
from tests.cost.models import QKV, Layer, adapted, family_model, tiny_config

FAMILIES = {"bert": {}, "deberta-v2": {}, "deberta-v2 unshared": {"share_att_key": False}, "gpt2": {}, "llama": {}}


def chosen(rng: random.Random, layers: list[Layer]) -> tuple[dict[tuple[str, str], int], dict[str, int], list[Layer]]:
    """Random widths and ranks, and the layers described with them."""
    widths = {(layer.name, kind): rng.choice(WIDTHS) for layer in layers for kind in layer.bits}
    ranks = {layer.name: rng.randrange(20) for layer in layers}
    described = [
        replace(layer, rank=ranks[layer.name], bits={kind: widths[layer.name, kind] for kind in layer.bits})
        for layer in layers
    ]
    return widths, ranks, described


@pytest.mark.parametrize("kinds", [KINDS, ALL_KINDS], ids=["", "quantize_input"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bit_operations_are_those_of_relative_bops(family: str, kinds: tuple[str, ...]) -> None:
    name, rng = family.split()[0], random.Random(0)
    model = family_model(name, **FAMILIES[family])
    more = {"bert": ("dense",), "llama": ("o_proj", "down_proj"), "gpt2": ("c_proj",)}.get(name, ())
    for targets in (QKV[name], (*QKV[name], *more)):
        layers = adapted(model, targets, 8, **dict.fromkeys(kinds, 32))
        for scope in SCOPES:
            cost = bops_cost(model, scope, tokens=24, baseline_rank=6, layers=layers)
            for _ in range(3):
                widths, ranks, described = chosen(rng, layers)
                expected = relative_bops(model, described, tokens=24, baseline_rank=6)[scope]
                assert cost.share(widths, ranks) == pytest.approx(expected, rel=1e-12)
                assert bops_cost(model, scope, 24, 6, layers=described).share({}, {}) == pytest.approx(
                    expected, rel=1e-12
                )


def test_a_fused_projection_is_both_operands_of_the_scores() -> None:
    model = family_model("gpt2")
    cost = bops_cost(model, "attention", layers=adapted(model, ("c_attn",), 4, out=32))
    out = ("transformer.h.0.attn.c_attn", "out")
    assert [(product.left, product.right) for product in cost.products if out in (product.left, product.right)] == [
        (out, out),
        (32, out),
    ]


def model_of(family: str = "bert", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_config(tiny_config(family))
    config = bayeslora.BLoraConfig(r=4, target_modules=list(QKV[family]), **options)
    return peft.get_peft_model(base, config)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "gpt2", "llama"])
def test_a_model_describes_itself(family: str) -> None:
    """A new adapter costs what `relative_bops` says of it, with no width or rank named."""
    for quantize_input in (False, True):
        model = model_of(family, quantize_input=quantize_input)
        for scope in SCOPES:
            assert bops_cost(model, scope).share({}, {}) == pytest.approx(relative_bops(model)[scope], rel=1e-12)


def test_adapted_layers_are_the_default_scope() -> None:
    model = model_of()
    layers = bayeslora.describe(model)
    narrow = {(layer.name, "weight"): 4 for layer in layers}
    described = [replace(layer, bits={**layer.bits, "weight": 4}) for layer in layers]
    assert bops_cost(model).share(narrow, {}) == pytest.approx(relative_bops(model, described)["adapted"], rel=1e-12)
    with pytest.raises(BayesLoraError, match="scope is 'layer', but must be one of adapted"):
        bops_cost(model, "layer")  # type: ignore[arg-type]


def test_bytes_by_hand() -> None:
    """d_in = d_out = 32, two blocks of three layers, rank 4."""
    model = model_of()
    layers = bayeslora.describe(model)
    cost = bytes_cost(model)
    assert cost.baseline == 6 * 4 * (32 * 32 + 16 * 64)
    assert cost.total({}, {}) == 6 * 4 * (32 * 32 + 4 * 65)
    first = layers[0].name
    widths = {(first, "weight"): 4, (first, "A"): 2, (first, "E"): 16, (first, "B"): 8}
    ours = 32 * 32 / 2 + 3 * (32 / 4 + 2 + 32)
    assert cost.total(widths, {first: 3}) == 5 * 4 * (32 * 32 + 4 * 65) + ours


def test_base_weights_take_bytes_where_their_width_is_learned() -> None:
    adapters = 6 * 4 * 4 * 65
    for model in (model_of(mode="ra"), wrapped_lora()):
        cost = bytes_cost(model)
        assert cost.total({}, {}) == adapters
        assert cost.baseline == 6 * 4 * 16 * 64
    layers = bayeslora.describe(model)
    assert bytes_cost(model, weights={layers[0].name}).total({}, {}) == adapters + 4 * 32 * 32


def wrapped_lora() -> nn.Module:
    base = transformers.AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=list(QKV["bert"])))


def test_the_cost_of_ranks_is_the_mean_rank() -> None:
    model = model_of()
    layers = [layer.name for layer in bayeslora.describe(model)]
    assert rank_cost(model).share({}, {}) == 4
    assert rank_cost(model).share({}, dict(zip(layers, range(6), strict=True))) == 2.5
