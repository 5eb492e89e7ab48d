"""Rounding after training: one layer by hand, ranges of the whole sample, operations and bytes counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import bayeslora
from bayeslora.cost import operations, relative_bops
from bayeslora.errors import BayesLoraError
from bayeslora.posthoc import ActivationCounts, RoundedModel, round_after_training
from bayeslora.posthoc.rounding import RoundedLinear
from bayeslora.prediction import predict
from bayeslora.quantization import gptq_codes, grid_step
from tests.cost.models import QKV, family_model
from tests.oracles.rounding import least_error, on_grid, rounded_layer
from tests.posthoc.test_bayesianize import trained_lora
from tests.prediction.models import classifier, inputs

VALUE = "bert.encoder.layer.1.attention.self.value"


def inputs_of(model: nn.Module, path: str, *batches: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """All inputs (n, d_in) and outputs (n, d_out) of a layer without padding, in float64."""
    found: list[tuple[Tensor, Tensor]] = []
    layer = model.get_submodule(path)
    handle = layer.register_forward_hook(lambda _, args, out: found.append((args[0], out)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return tuple(  # type: ignore[return-value]
        torch.cat([pair[which][mask] for pair, mask in zip(found, masks, strict=True)]).double() for which in (0, 1)
    )


def layer_of(rounded: RoundedModel, path: str) -> RoundedLinear:
    layer = rounded.model.get_submodule(path)
    assert isinstance(layer, RoundedLinear)
    return layer


@pytest.mark.parametrize(("weight_bits", "input_bits", "output_bits"), [(8, 8, 8), (4, 4, 8), (3, 4, 4), (2, 4, 8)])
def test_a_layer_is_the_one_computed_by_hand(weight_bits: int, input_bits: int, output_bits: int) -> None:
    model, batch = trained_lora(), inputs(24)
    lora = model.get_submodule(f"base_model.model.{VALUE}")
    update = lora.scaling["default"] * lora.lora_B["default"].weight @ lora.lora_A["default"].weight
    weight = (lora.base_layer.weight + update).detach().double()
    x, y = inputs_of(model.get_base_model(), VALUE, batch)
    rounded = round_after_training(model, batch, weight_bits, input_bits, output_bits)
    layer = layer_of(rounded, VALUE)
    # The ranges are as good as the best of a search over all of them.
    for values, bound, bits in ((x, layer.input_range, input_bits), (y, layer.output_range, output_bits)):
        error = float((on_grid(values, bound.double(), bits) - values).square().sum())
        assert error <= 1.02 * least_error(values, bits)
    slack = 1.02 if weight_bits < 8 else 2.0  # 32 numbers and 3,000 fine grids: the search's best has luck
    for row, found in zip(weight[:6], layer.weight.detach().double()[:6], strict=True):
        assert float((found - row).square().sum()) <= slack * least_error(row, weight_bits)
    # With these ranges the outputs are the formula's.
    bounds = bayeslora.quantization.optimal_range(weight, weight_bits, dim=1).double()
    expected = rounded_layer(
        x, weight, layer.bias.double(), (bounds, layer.input_range.double(), layer.output_range.double()),
        (weight_bits, input_bits, output_bits),
    )  # fmt: skip
    step = 2 * float(layer.output_range) / (2**output_bits - 1)
    difference = (layer(x.float()).double() - expected).abs() / step
    assert difference.max() < 1.01 and float((difference > 0.01).float().mean()) < 0.001  # float32 may round a tie


def test_nothing_is_rounded_at_32_bits_and_the_model_stays_as_it_was() -> None:
    model, batch = trained_lora(), inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rounded = round_after_training(model, batch, 32, 32, scope="encoder")
    torch.testing.assert_close(
        predict(rounded.model, batch).logits, predict(model, batch).logits, rtol=1e-4, atol=1e-5
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model, PeftModel) and not isinstance(rounded.model, PeftModel)


def test_wide_grids_change_outputs_less_than_narrow_ones() -> None:
    model, batch = trained_lora(), inputs(24)
    exact = predict(model, batch).logits
    widths = [(16, 16), (8, 8), (4, 8), (3, 4), (2, 4)]
    errors = [
        float(
            (predict(round_after_training(model, batch, *w, scope="encoder").model, batch).logits - exact)
            .square()
            .sum()
        )
        for w in widths
    ]
    assert errors == sorted(errors) and errors[0] < 1e-3 * errors[-1]


def test_ranges_are_those_of_all_rows_together_without_padding() -> None:
    model, batch = trained_lora(), inputs(24)
    batch["attention_mask"][:, -3:] = 0
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(8), slice(8, 24))]
    whole, split = (round_after_training(model, given, 4, 4, 4) for given in (batch, parts))
    for path in (layer.name for layer in whole.layers):
        assert torch.equal(layer_of(whole, path).input_range, layer_of(split, path).input_range)
        assert torch.equal(layer_of(whole, path).output_range, layer_of(split, path).output_range)
    counted = round_after_training(model, ActivationCounts(model, parts), 4, 4, 4)
    for name, value in counted.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, -3:] = 7  # what stands under the padding
    other = round_after_training(model, changed, 4, 4, 4)
    assert torch.equal(layer_of(other, VALUE).input_range, layer_of(whole, VALUE).input_range)


def test_gptq_changes_the_outputs_less_than_the_nearest_codes() -> None:
    model, batch = trained_lora(), inputs(64)
    exact = predict(model, batch).logits
    counted = ActivationCounts(model, batch, moments=True)
    errors = {}
    for rounding in ("nearest", "gptq"):
        rounded = round_after_training(model, batch, 3, 32, rounding=rounding)  # type: ignore[arg-type]
        errors[rounding] = float((predict(rounded.model, batch).logits - exact).square().sum())
        again = round_after_training(model, counted, 3, 32, rounding=rounding)  # type: ignore[arg-type]
        assert torch.equal(layer_of(again, VALUE).weight, layer_of(rounded, VALUE).weight)
    assert errors["gptq"] < 0.7 * errors["nearest"]
    x, _ = inputs_of(model.get_base_model(), VALUE, batch)
    weight = layer_of(round_after_training(model, batch, 32, 32), VALUE).weight.detach()
    bound = bayeslora.quantization.optimal_range(weight, 3, dim=1)
    expected = gptq_codes(weight, bound, 3, x.T @ x) * grid_step(bound, 3)
    assert torch.equal(layer_of(rounded, VALUE).weight.detach(), expected)
    with pytest.raises(BayesLoraError, match="counted without moments: add them"):
        round_after_training(model, ActivationCounts(model, batch), 3, 8, rounding="gptq")
    with pytest.raises(BayesLoraError, match="rounding is 'up', but must be 'nearest' or 'gptq'"):
        round_after_training(model, batch, rounding="up")  # type: ignore[arg-type]


def test_bit_operations_of_one_layer_and_its_attention_by_hand() -> None:
    rounded = round_after_training(trained_lora(), inputs(), 3, 4, 8, scope="attention")
    found = {op.name: op for op in operations(rounded.model, 10, rounded.layers)}
    d = 32
    assert found[f"{VALUE}.weight"].bops == 10 * d * d * 3 * 4
    assert sum(found[f"{VALUE}.{part}"].bops for part in "AEB") == 0
    attention = VALUE.rpartition(".")[0]
    assert found[f"{attention}.scores"].bops == 10 * 10 * d * 8 * 8
    assert found[f"{attention}.weighted_values"].bops == 10 * 10 * d * 32 * 8
    share = relative_bops(rounded.model, layers=rounded.layers, tokens=10)["adapted"]
    full = 10 * (d * d + 16 * (2 * d + 1)) * 32 * 32  # LoRA of rank 16: W0, A, E and B
    assert share == pytest.approx(10 * d * d * 3 * 4 / full, rel=1e-12)


def test_the_scopes_are_the_adapted_layers_the_projections_and_the_blocks() -> None:
    model = get_peft_model(classifier("bert"), LoraConfig(target_modules=["value"], task_type="SEQ_CLS"))
    names = {
        scope: [each.name for each in round_after_training(model, inputs(), 8, 8, scope=scope).layers]
        for scope in ("adapted", "attention", "encoder")
    }
    assert [name.rpartition(".")[2] for name in names["adapted"]] == ["value"] * 3
    assert {name.rpartition(".")[2] for name in names["attention"]} == {"query", "key", "value"}
    assert len(names["attention"]) == 9 and len(names["encoder"]) == 18
    assert not any("pooler" in name or "classifier" in name for name in names["encoder"])
    rounded = round_after_training(model, inputs(), 8, 8, 8, scope="encoder")
    widths = {layer.name: layer.bits for layer in rounded.layers}
    assert widths[VALUE] == {"weight": 8, "in": 8, "out": 8}
    assert widths["bert.encoder.layer.1.output.dense"] == {"weight": 8, "in": 8, "out": 32}


def test_bytes_by_hand() -> None:
    rounded = round_after_training(trained_lora(), inputs(), 3, 4, 8)
    d, layers = 32, 6
    one = d * d * 3 // 8 + 4 * (d + 2 + d)  # codes; a range a row and two of activations; biases
    assert rounded.layer_bytes == layers * one
    others = sum(p.numel() for p in classifier("bert").parameters()) - layers * (d * d + d)
    assert rounded.model_bytes == layers * one + 4 * others


def test_conv1d_and_plain_models_are_rounded_too() -> None:
    model = trained_lora("gpt2")
    rounded = round_after_training(model, inputs(), 16, 16)
    torch.testing.assert_close(
        predict(rounded.model, inputs()).logits, predict(model, inputs()).logits, rtol=1e-2, atol=1e-2
    )
    plain = round_after_training(classifier("bert"), inputs(), 8, 8, scope="attention")
    assert len(plain.layers) == 9


def test_a_block_that_runs_several_times_is_rounded_once() -> None:
    model: Any = family_model("albert").to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model.embeddings.position_ids = torch.arange(40).unsqueeze(0)
    model.embeddings.token_type_ids = torch.zeros(1, 40, dtype=torch.long)
    batch = {"input_ids": torch.randint(1, 60, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    rounded = round_after_training(model, batch, 8, 8, scope="attention")
    assert [layer.name.rpartition(".")[2] for layer in rounded.layers] == list(QKV["albert"])


def test_what_cannot_be_rounded_is_refused() -> None:
    model = trained_lora()
    with pytest.raises(BayesLoraError, match="weight_bits is 1, but must be from 2 to 16, or 32"):
        round_after_training(model, inputs(), 1, 8)
    with pytest.raises(BayesLoraError, match="scope is 'model', but must be one of 'adapted', 'attention', 'encoder'"):
        round_after_training(model, inputs(), scope="model")  # type: ignore[arg-type]
    with pytest.raises(BayesLoraError, match="scope is 'adapted', but .* has no such layers"):
        round_after_training(classifier("bert"), inputs())
    with pytest.raises(BayesLoraError, match="do not reach bert.* but its input needs a range"):
        round_after_training(model, [])
    embeddings = LoraConfig(target_modules=["word_embeddings"], task_type="SEQ_CLS")
    with pytest.raises(BayesLoraError, match="word_embeddings is a Embedding, but must be a linear layer"):
        round_after_training(get_peft_model(classifier("bert"), embeddings), inputs())
    output = LoraConfig(target_modules=["intermediate.dense"], task_type="SEQ_CLS")
    with pytest.raises(BayesLoraError, match="output_bits is 8, but scope 'adapted' has no query"):
        round_after_training(get_peft_model(classifier("bert"), output), inputs(), output_bits=8)
    with torch.no_grad():
        model.get_base_model().bert.encoder.layer[0].output.dense.bias[0] = float("inf")
    with pytest.raises(BayesLoraError, match="is not finite"):
        round_after_training(model, inputs())
