"""Ranges of groups of inputs: each group is quantized as if it were alone, in training, on disk and in exports."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import bayeslora
from bayeslora import BayesLoraError, BLoraConfig, describe, export
from bayeslora.export.container import PACKED, read_container, write_container
from bayeslora.quantization import codes, grid_step, optimal_range, quantize
from tests.conftest import build_tiny_llama
from tests.methods.reference import (
    D_IN,
    D_OUT,
    FROZEN,
    LEARN,
    Tiny,
    layers_of,
    seeded,
    set_widths,
    tiny_model,
    train_steps,
)

GROUP = 2
X = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(7))


def _by_group(weight: Tensor, bounds: Tensor, bits: int) -> Tensor:
    """Quantize each group of each row of `weight` (d_out, d_in) by itself."""
    rows = [
        torch.cat([quantize(part, bound, bits) for part, bound in zip(row.chunk(len(ranges)), ranges, strict=True)])
        for row, ranges in zip(weight, bounds, strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_group_is_quantized_as_if_it_were_alone(bits: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(5, 12, generator=generator, requires_grad=True)
    bounds = (0.5 + torch.rand(5, 3, generator=generator)).requires_grad_()
    along = torch.randn(5, 12, generator=generator)
    whole = quantize(weight.T, bounds.T, bits).T if transposed else quantize(weight, bounds, bits)
    alone = _by_group(weight, bounds, bits)
    assert torch.equal(whole, alone)
    found, wanted = (torch.autograd.grad((each * along).sum(), (weight, bounds)) for each in (whole, alone))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        values = codes(weight, bounds, bits).float() * grid_step(bounds, bits).repeat_interleave(4, 1)
        torch.testing.assert_close(values, alone)


def test_groups_have_the_least_squared_error_of_their_own() -> None:
    """Outliers in one group leave the others alone, which is what groups are for."""
    model = _trained({"fixed_bits": {"weight": 4}, "group_size": GROUP}, outlier=40.0)
    for layer in layers_of(model):
        bounds = layer.packed_tensors("default").ranges["weight"]
        weight = layer.get_base_weight()
        assert bounds.shape == (D_OUT, weight.shape[1] // GROUP)
        wanted = optimal_range(weight.reshape(-1, GROUP), 4, dim=1).view_as(bounds)
        assert torch.allclose(bounds, wanted)
        by_row = quantize(weight, optimal_range(weight, 4, dim=1), 4)
        assert (quantize(weight, bounds, 4) - weight).square().sum() < (by_row - weight).square().sum() / 4


def _trained(options: dict[str, Any], kind: str = "linear", outlier: float = 1.0) -> nn.Module:
    base = seeded(lambda: Tiny(kind))
    with torch.no_grad():
        for layer in (base.first, base.second):
            layer.weight[0] *= outlier
            layer.weight[:, 0] *= outlier
    config = BLoraConfig(r=2, target_modules=["first", "second"], bops_price=0.0, rank_price=0.0, **options)
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=1e-2), lr=1e-2)
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=12, num_examples=6, seed=0)
    train_steps(model, optimizer, loop, X, 12)
    return model.eval()


@pytest.mark.parametrize("gates", ["evidence", "paper"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_trained_adapter_comes_back_from_its_files(gates: str, kind: str, tmp_path: Path) -> None:
    model = _trained({"gates": gates, "group_size": GROUP, "fixed_bits": {"weight": 4}}, kind)
    layer = layers_of(model)[0]
    weight = layer.base_layer.weight.T if kind == "conv1d" else layer.base_layer.weight
    used = layer._quantization("default", X)("weight", layer.base_layer.weight)
    bounds = layer.packed_tensors("default").ranges["weight"]
    assert torch.equal(used.T if kind == "conv1d" else used, _by_group(weight, bounds, 4))
    expected = model(X)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(PeftModel.from_pretrained(seeded(lambda: Tiny(kind)), tmp_path / "saved").eval()(X), expected)
    export(model, tmp_path / "packed", format="packed")
    again = PeftModel.from_pretrained(seeded(lambda: Tiny(kind)), tmp_path / "packed").eval()
    torch.testing.assert_close(again(X), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("phase", [LEARN, FROZEN])
@pytest.mark.parametrize("per_channel", [False, True])
def test_packed_files_hold_every_range(phase: Any, per_channel: bool, tmp_path: Path) -> None:
    model = tiny_model(phase, per_channel=per_channel, group_size=GROUP).eval()
    for layer in layers_of(model):
        set_widths(layer, weight=4, A_out=32, E_out=32, out=32)
    expected = model(X)
    export(model, tmp_path, format="packed")
    again = PeftModel.from_pretrained(seeded(Tiny), tmp_path).eval()
    torch.testing.assert_close(again(X), expected, atol=1e-6, rtol=0)
    for before, after in zip(layers_of(model), layers_of(again), strict=True):
        shapes = [each.packed_tensors("default").ranges["weight"].shape for each in (before, after)]
        assert shapes[0] == shapes[1] == (D_OUT, before.in_features // GROUP)


def test_what_cannot_have_groups_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="group_size is 1, but must be at least 2"):
        BLoraConfig(group_size=1)
    with pytest.raises(BayesLoraError, match="group_size is given, but mode 'ra' has no bit-widths"):
        BLoraConfig(group_size=32, mode="ra")
    with pytest.raises(BayesLoraError, match="group_size is 8, but must divide the 12 inputs of a layer"):
        tiny_model(group_size=8)


def test_products_of_integers_have_no_groups(tmp_path: Path) -> None:
    base = build_tiny_llama()
    model = get_peft_model(base, BLoraConfig(r=2, target_modules=["q_proj"], group_size=8, task_type="CAUSAL_LM"))
    for layer in layers_of(model):
        layer.progress("default").advance(FROZEN)
        set_widths(layer, weight=4)
    with pytest.raises(BayesLoraError, match="a product of integers has one a row: export 'gguf' or 'onnx'"):
        export(model, tmp_path / "integer", format="integer")
    assert not (tmp_path / "integer").exists()
    for layer in layers_of(model):
        set_widths(layer, weight=32)
    assert export(model, tmp_path / "integer", format="integer")["max_output_error"] is not None


@pytest.mark.parametrize("size", [3, "2", 1, -2, 0, 1.5])
def test_a_packed_file_with_another_group_size_is_refused(size: Any, tmp_path: Path) -> None:
    export(tiny_model(FROZEN, group_size=GROUP), tmp_path, format="packed")
    text, tensors = read_container(tmp_path / "adapter_model.safetensors", PACKED)
    index = json.loads(zlib.decompress(base64.b85decode(text)))
    assert index["group_size"] == GROUP
    index["group_size"] = size
    changed = base64.b85encode(zlib.compress(json.dumps(index).encode())).decode()
    write_container(tmp_path / "adapter_model.safetensors", changed, tensors)
    with pytest.raises(BayesLoraError, match="damaged|bytes of codes"):
        bayeslora.load_packed(tmp_path)


@pytest.mark.parametrize("group_size", [None, GROUP])
def test_a_base_weight_of_a_given_width_has_it_from_the_first_step(group_size: int | None, tmp_path: Path) -> None:
    """So all of training is that of factors beside the rounded weight; A, E and B follow when gates close."""
    base = seeded(Tiny)
    config = BLoraConfig(r=2, target_modules=["first"], group_size=group_size, fixed_bits={"weight": 4, "A": 8})
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=1e-2), lr=1e-2)
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=12, num_examples=6, seed=0)
    loop.step_begin()
    (layer,) = layers_of(model)
    weight = layer.get_base_weight()
    bounds = layer.packed_tensors("default").ranges["weight"]
    rounded = quantize(weight, bounds, 4)
    assert not torch.equal(rounded, weight)
    assert torch.equal(layer._quantization("default", X)("weight", weight), rounded)
    assert describe(model)[0].bits == {**dict.fromkeys(("A", "E", "B", "A_out", "E_out", "out"), 32), "weight": 4}
    wanted = rounded @ X[0] + layer.bias  # B is zero at the start
    torch.testing.assert_close(layer(X[:1])[0], wanted, atol=1e-6, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(seeded(Tiny), tmp_path).eval()
    assert torch.equal(again(X), model.eval()(X))
