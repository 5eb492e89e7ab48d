"""Codes of W0 by GPTQ: what they are, when they are chosen, and that every form of the adapter computes with them."""

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
from bayeslora import BayesLoraError, BLoraConfig, export, load_integer, load_packed
from bayeslora.export.container import PACKED, read_container, write_container
from bayeslora.quantization import codes, grid_step, repeated
from bayeslora.quantization.packing import unpack
from tests.conftest import build_tiny_bert
from tests.methods.reference import D_IN, Tiny, layers_of, seeded, train_steps

X = torch.randn(400, D_IN, generator=torch.Generator().manual_seed(7)).relu() + 0.3


def trained(
    kind: str = "linear", x: Tensor = X, steps: int = 12, taken: int | None = None, **options: Any
) -> nn.Module:
    """Return a tiny model whose base weights have GPTQ's codes, after `taken` of `steps` of the library's loop."""
    settings = {"r": 2, "target_modules": ["first", "second"], "bops_price": 0.0, "rank_price": 0.0} | options
    model = get_peft_model(seeded(lambda: Tiny(kind)), BLoraConfig(rounding="gptq", **settings)).train()
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=1e-2), lr=1e-2)
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=steps, num_examples=len(x), seed=0)
    train_steps(model, optimizer, loop, x, steps if taken is None else taken)
    return model.eval()


def used(layer: Any) -> Tensor:
    """The base weight (d_out, d_in) that the layer multiplies by."""
    weight = layer._quantization("default", X)("weight", layer.base_layer.weight)
    return weight.T if layer.is_transposed else weight


def given(layer: Any, bits: int) -> Tensor:
    shape = (layer.out_features, layer.in_features)
    return unpack(layer.quantizers("default").weight_codes, bits, shape)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(
    ("options", "share"),
    [({"per_channel": True}, 0.8), ({"group_size": 2}, 1.0), ({}, 0.8)],
    ids=["a range a row", "groups of two inputs", "one range"],
)
def test_a_given_width_has_codes_that_change_the_output_less(kind: str, options: dict[str, Any], share: float) -> None:
    model = trained(kind, fixed_bits={"weight": 2}, **options)
    layer = layers_of(model)[0]
    weight = layer.base_layer.weight.detach()
    weight = weight.T if layer.is_transposed else weight
    bound = layer.packed_tensors("default").ranges["weight"]
    step = repeated(grid_step(bound, 2), weight)
    nearest = codes(weight, bound, 2) * step
    assert torch.equal(used(layer), given(layer, 2) * step)
    errors = [float(((rounded - weight) @ X.T).square().mean()) for rounded in (used(layer), nearest)]
    assert errors[0] < share * errors[1]


def test_moments_are_of_inputs_weighted_by_the_gradients_of_their_outputs() -> None:
    options = {"steps": 80, "fixed_bits": {"weight": 4}, "per_channel": True}
    before, after = trained(taken=0, **options), trained(taken=1, **options)
    seen: dict[str, Tensor] = {}
    layer = layers_of(before)[1]
    layer.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], y=output))
    loss = before(X).square().mean()
    (gradient,) = torch.autograd.grad(loss, seen["y"])
    wanted = torch.einsum("t,ti,tj->ij", gradient.square().sum(1), seen["x"], seen["x"]).detach()
    found = layers_of(after)[1].evidence("default").moments
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-9)


def test_learned_widths_get_codes_with_every_decision_and_forget_the_moments() -> None:
    layers = layers_of(trained(steps=40, target_bops=0.02, bops_scope="adapted", quantize_input=True))
    bits = [layer.widths("default")["weight"] for layer in layers]
    assert set(bits) & {2, 4}
    for layer, width in zip(layers, bits, strict=True):
        assert not len(layer.evidence("default").moments)
        assert bool(layer.quantizers("default").weight_codes.numel()) == (width in (2, 4))
        if width in (2, 4):
            bound = layer.packed_tensors("default").ranges["weight"]
            assert torch.equal(used(layer), given(layer, width) * grid_step(bound, width))


def test_a_given_width_gets_its_codes_in_the_first_eighth_of_a_run() -> None:
    for taken, is_coded in ((9, False), (10, True)):
        for layer in layers_of(trained(steps=80, taken=taken, fixed_bits={"weight": 4})):
            assert bool(layer.quantizers("default").weight_codes.numel()) == is_coded
            assert bool(len(layer.evidence("default").moments)) != is_coded
            assert layer.moments is None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("options", [{"per_channel": True}, {"group_size": 2}])
def test_files_give_the_codes_back(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(kind, fixed_bits={"weight": 4, "A_out": 32, "E_out": 32, "out": 32}, **options)
    expected = model(X)
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(seeded(lambda: Tiny(kind)), tmp_path / "saved").eval()
    assert torch.equal(again(X), expected)
    measured = export(model, tmp_path / "packed", format="packed")
    assert measured["matrix_bytes"] > sum(layer.in_features * layer.out_features for layer in layers_of(model)) / 2
    packed = PeftModel.from_pretrained(seeded(lambda: Tiny(kind)), tmp_path / "packed").eval()
    torch.testing.assert_close(packed(X), expected, atol=1e-6, rtol=0)
    for layer, first in zip(layers_of(packed), layers_of(model), strict=True):
        assert torch.equal(used(layer), used(first))
    merged = PeftModel.from_pretrained(seeded(lambda: Tiny(kind)), tmp_path / "saved").merge_and_unload()
    torch.testing.assert_close(merged(X), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("coded", ["1", "111", "2", 11, None, "01", "00"])
def test_a_packed_file_that_says_otherwise_where_codes_are_is_refused(coded: Any, tmp_path: Path) -> None:
    export(trained(fixed_bits={"weight": 4}, per_channel=True), tmp_path, format="packed")
    text, tensors = read_container(tmp_path / "adapter_model.safetensors", PACKED)
    index = json.loads(zlib.decompress(base64.b85decode(text)))
    assert index["coded"] == "11"
    index["coded"] = coded
    changed = base64.b85encode(zlib.compress(json.dumps(index).encode())).decode()
    write_container(tmp_path / "adapter_model.safetensors", changed, tensors)
    with pytest.raises(BayesLoraError, match="damaged"):
        load_packed(tmp_path)


def test_codes_of_another_size_are_refused() -> None:
    model = trained(fixed_bits={"weight": 4})
    layer = layers_of(model)[0]
    layer.quantizers("default").weight_codes = layer.quantizers("default").weight_codes[1:]
    layer.frozen_weight.cached = None
    with pytest.raises(BayesLoraError, match="the data have 59 bytes, but 120 codes of 4 bits take 60"):
        model(X)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    """A tiny BERT with codes of 4 bits in all linear layers of its blocks."""
    torch.manual_seed(0)
    config = BLoraConfig(
        r=4, target_modules=["query", "key", "value"], task_type="SEQ_CLS", fixed_bits={"weight": 4}, per_channel=True,
        quantize_input=True, rounding="gptq", init_weights=False, warmup_fraction=0.2,
    )  # fmt: skip
    model = get_peft_model(build_tiny_bert(), config).train()
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=1e-2))
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=24, num_examples=16)
    tokens = torch.randint(5, 30, (16, 8))
    for _ in range(24):
        loop.step_begin()
        model(input_ids=tokens, labels=tokens[:, 0] % 2).loss.backward()
        loop.before_optimizer_step()
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
    return model.eval()


def test_an_integer_model_computes_with_the_codes(bert: nn.Module, tmp_path: Path) -> None:
    tokens = torch.randint(5, 30, (6, 8), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        expected = bert(**batch).logits
        export(bert, tmp_path, "integer", batch=batch, unadapted="float32")
        torch.testing.assert_close(load_integer(tmp_path)(**batch).logits, expected, atol=1e-4, rtol=0)


def test_products_of_graphs_and_of_llama_files_have_the_codes(bert: nn.Module) -> None:
    products, layers = pytest.importorskip("bayeslora.export.onnx.products"), layers_of(bert)
    llama = pytest.importorskip("bayeslora.export.gguf.layers")
    differs = 0
    for layer in layers:
        expected = given(layer, 4)
        assert torch.equal(torch.from_numpy(products.learned(layer, "default").weight), expected)
        assert torch.equal(torch.from_numpy(llama.learned_weight(layer, "default").values), expected)
        bound = layer.packed_tensors("default").ranges["weight"]
        differs += int((codes(layer.base_layer.weight, bound, 4) != expected).sum())
    assert differs > 100  # the nearest are others


def test_where_codes_could_not_be_chosen_the_option_is_refused() -> None:
    with pytest.raises(BayesLoraError, match="rounding is 'gptq', but gates='paper' gives no base weight a final"):
        BLoraConfig(gates="paper", rounding="gptq")
    with pytest.raises(BayesLoraError, match="rounding is 'gptq', but mode 'ra' gives no base weight a final width"):
        BLoraConfig(mode="ra", rounding="gptq")
    with pytest.raises(BayesLoraError, match="fixed_bits gives weight more than 4 bits, where the nearest codes do"):
        BLoraConfig(fixed_bits={"weight": 8}, rounding="gptq")
    with pytest.raises(BayesLoraError, match="rounding is 'up', but must be"):
        BLoraConfig(rounding="up")  # type: ignore[arg-type]
