"""Packed adapters: function, description and codes of the frozen model, in the bytes that its widths ask for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import bayeslora
from bayeslora import BayesLoraError, BLoraConfig, DyLoraConfig, describe, export, load_packed, shrink
from bayeslora.cost import relative_bops
from bayeslora.export.container import CODES, INDEX_KEY, unpack
from bayeslora.export.packed.reader import read_index
from bayeslora.optim import IVON
from bayeslora.quantization import codes
from tests.conftest import build_tiny_bert, build_tiny_llama
from tests.methods import adalora_models, variational_models
from tests.methods.reference import (
    D_IN,
    FROZEN,
    LEARN,
    RANK,
    WARM_UP,
    Tiny,
    all_widths,
    layers_of,
    randomize,
    seeded,
    set_widths,
    tiny_model,
)
from tests.processes import run_code

X = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(7))
TOKENS = torch.arange(24).view(2, 12)


def _loaded(folder: Path, kind: str = "linear", **options: Any) -> nn.Module:
    return PeftModel.from_pretrained(seeded(lambda: Tiny(kind)), folder, **options).eval()


def _bert(**options: Any) -> nn.Module:
    settings = {"r": RANK, "target_modules": ["query", "key", "value"], "init_weights": False, "task_type": "SEQ_CLS"}
    model = get_peft_model(build_tiny_bert(), BLoraConfig(**{**settings, **options}))
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(model):
        randomize(layer, generator, FROZEN)
    return model.eval()


def _described(model: nn.Module) -> list[dict[str, Any]]:
    return [layer.to_dict() for layer in describe(model)]


@torch.no_grad()
def _outputs(model: nn.Module) -> Tensor:
    return model(X)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("phase", [WARM_UP, LEARN, FROZEN])
@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "q", "quantize_input": True}, {"mode": "ra"}, {"per_channel": True}, {"use_rslora": True, "r": 3}],
    ids=str,
)
def test_the_loaded_model_is_the_frozen_one_bit_by_bit(options: Any, phase: Any, kind: str, tmp_path: Path) -> None:
    """Against the shrunk model, whose matrices have the same shapes; against the unshrunk one to float rounding."""
    model = tiny_model(phase, kind, **options).eval()
    for layer in layers_of(model):
        if options.get("mode") != "ra":
            set_widths(layer, A_out=32, E_out=32, out=32)  # a code that flips would be a whole step, not rounding
    before = _outputs(model)
    export(model, tmp_path, format="packed")
    loaded = _loaded(tmp_path, kind)
    torch.testing.assert_close(_outputs(loaded), before, atol=1e-6, rtol=0)
    shrink(model)
    assert torch.equal(_outputs(loaded), _outputs(model))
    assert _described(loaded) == _described(model)


@pytest.mark.parametrize("width", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("per_channel", [False, True])
def test_every_width_of_everything_comes_back_exactly(width: int, per_channel: bool, tmp_path: Path) -> None:
    model = tiny_model(FROZEN, mode="q", quantize_input=True, per_channel=per_channel).eval()
    for layer in layers_of(model):
        all_widths(layer, width)
    shrink(model)
    export(model, tmp_path, format="packed")
    loaded = _loaded(tmp_path)
    assert torch.equal(_outputs(loaded), _outputs(model))
    assert _described(loaded) == _described(model)
    assert {bits for layer in describe(loaded) for bits in layer.bits.values()} == {width}


@pytest.mark.parametrize("kind", ["A", "E", "B"])
def test_codes_on_disk_and_after_loading_are_the_quantizers(kind: str, tmp_path: Path) -> None:
    model = tiny_model(FROZEN, mode="q").eval()
    for layer in layers_of(model):
        all_widths(layer, 4)
    shrink(model)
    export(model, tmp_path, format="packed")
    stored, position = load_file(tmp_path / "adapter_model.safetensors")[CODES], 0
    for layer, again in zip(layers_of(model), layers_of(_loaded(tmp_path)), strict=True):
        expected: dict[str, Tensor] = {}
        for each in ("A", "E", "B"):
            tensor = getattr(layer, f"blora_{each}")["default"]
            bound = layer.quantizers("default").ranges()[layer.quantizers("default").kinds.index(each)]
            expected[each] = codes(tensor.detach(), bound, 4)
            size = math.ceil(tensor.numel() / 2)
            assert torch.equal(unpack(stored[position : position + size], 4, tensor.shape).int(), expected[each])
            position += size
            if each == kind:
                found = codes(getattr(again, f"blora_{each}")["default"].detach(), bound, 4)
                assert torch.equal(found, expected[each]) and found.unique().numel() > 1
    assert position == len(stored)


def test_ranks_are_cut_and_none_may_be_left(tmp_path: Path) -> None:
    model = tiny_model(FROZEN, mode="q+ra").eval()
    with torch.no_grad():
        layers_of(model)[0].blora_E["default"].zero_()
        layers_of(model)[1].blora_E["default"][1] = 0.0
    state = {key: value.clone() for key, value in model.state_dict().items()}
    result = export(model, tmp_path, format="packed")
    assert result["ranks"]["first"] == 0 and 0 < result["ranks"]["second"] < RANK
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == result["ranks"]
    assert load_packed(tmp_path)["base_model.model.first.blora_A"].shape == (0, D_IN)
    shrink(model)
    assert torch.equal(_outputs(_loaded(tmp_path)), _outputs(model))


@pytest.mark.parametrize("gates", ["evidence", "paper"])
def test_the_plain_state_dict_is_that_of_the_loaded_adapter(gates: str, tmp_path: Path) -> None:
    model = _bert(gates=gates)
    export(model, tmp_path, format="packed")
    state = load_packed(tmp_path)
    loaded = PeftModel.from_pretrained(build_tiny_bert(), tmp_path)
    expected = get_peft_model_state_dict(loaded)
    shrink(model)
    unpacked = get_peft_model_state_dict(model)
    # Evidence is of use to training alone: a loaded adapter has none.
    gathered = {key for key in unpacked if ".blora_evidence." in key}
    assert state.keys() == expected.keys() - gathered and expected.keys() == unpacked.keys()
    sums = {key for key in gathered if not key.endswith(".present")}
    assert bool(gathered) == (gates == "evidence") and not any(expected[key].any() for key in sums)
    for key, tensor in state.items():
        assert tensor.dtype == expected[key].dtype == unpacked[key].dtype
        assert tensor.shape == unpacked[key].shape and torch.equal(tensor, expected[key])
    assert load_packed(tmp_path / "adapter_model.safetensors").keys() == state.keys()


def test_a_transformers_model_with_head_and_biases_keeps_outputs_and_costs(tmp_path: Path) -> None:
    model = _bert(bias="all", quantize_input=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()))
        shrink(model)
        expected = model(input_ids=TOKENS).logits
    export(model, tmp_path, format="packed")
    loaded = PeftModel.from_pretrained(build_tiny_bert(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=TOKENS).logits, expected)
    assert _described(loaded) == _described(model)
    assert relative_bops(loaded) == relative_bops(model)
    assert relative_bops(loaded)["adapted"] < 0.9


def test_a_folder_is_one_tensor_file_one_config_one_card_and_no_pickle(tmp_path: Path) -> None:
    export(_bert(), tmp_path, format="packed")
    written = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        index = read_index(file.metadata()[INDEX_KEY])
        assert sorted(file.keys()) == [f"base_model.model.classifier.{name}" for name in ("bias", "weight")] + [CODES]
    assert index.method == "blora" and len(index.layers) == 6
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "BLORA" and config["inference_mode"] is True


@pytest.mark.parametrize("width", [2, 4])
def test_the_file_is_at_most_5_percent_and_4_kib_above_the_ideal(width: int, tmp_path: Path) -> None:
    """84 adapted layers with all eight quantizers; the ideal counts the bits of A, E and B alone, not the ranges."""
    base = build_tiny_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=12)
    config = BLoraConfig(
        r=8, target_modules="all-linear", init_weights=False, quantize_input=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for layer in layers_of(model):
        randomize(layer, generator, FROZEN)
        all_widths(layer, 8)
        set_widths(layer, A=width, E=width, B=width)
    result = export(model, tmp_path, format="packed")
    described = describe(model)
    assert len(described) == 84
    bits = sum(layer.rank * (layer.in_features + layer.out_features + 1) * width for layer in described)
    assert result["ideal_bytes"] == math.ceil(bits / 8)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= 1.05 * bits / 8 + 4096


@pytest.mark.parametrize("width", [2, 8, 16])
def test_a_bfloat16_adapter_keeps_its_codes(width: int, tmp_path: Path) -> None:
    model = tiny_model(FROZEN, mode="q").eval()
    for layer in layers_of(model):
        all_widths(layer, width)
        for container in (layer.blora_A, layer.blora_B, layer.blora_E):
            container["default"].data = container["default"].data.bfloat16()
    export(model, tmp_path, format="packed")
    for layer, again in zip(layers_of(model), layers_of(_loaded(tmp_path)), strict=True):
        quantizers = layer.quantizers("default")
        bound = quantizers.ranges()[quantizers.kinds.index("A")]
        expected = codes(layer.blora_A["default"].detach(), bound, width)
        found = again.blora_A["default"].detach()[: len(expected)]
        if len(found) == len(expected):
            assert torch.equal(codes(found, bound, width), expected)


def _variational(method: str) -> tuple[nn.Module, Callable[[], nn.Module]]:
    return variational_models.tiny(method).eval(), lambda: seeded(Tiny)


def _adalora() -> tuple[nn.Module, Callable[[], nn.Module]]:
    model = adalora_models.randomized(adalora_models.scored()).eval()
    with torch.no_grad():
        layers_of(model)[0].bayes_adalora_E["default"][:4] = 0.0
    return model, lambda: seeded(adalora_models.Scored)


def _dylora() -> tuple[nn.Module, Callable[[], nn.Module]]:
    config = DyLoraConfig(r=4, target_modules=["first", "second"], init_weights=False)
    return get_peft_model(seeded(Tiny), config).eval(), lambda: seeded(Tiny)


OTHERS = {
    "melora": lambda: _variational("melora"),
    "melora-diagonal": lambda: _variational("melora-diagonal"),
    "blob": lambda: _variational("blob"),
    "adalora": _adalora,
    "dylora": _dylora,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", list(OTHERS))
def test_methods_without_quantizers_are_held_in_the_type_they_have(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, base = OTHERS[method]()
    for layer in layers_of(model):
        for container in layer.adapter_layer_names:
            parameter = getattr(layer, container)["default"]
            parameter.data = parameter.data.to(dtype)
    result = export(model, tmp_path, format="packed")
    state = load_packed(tmp_path)
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    assert result["kept_bytes"] == sum(tensor.nbytes for tensor in state.values())
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    shrink(model)
    expected = get_peft_model_state_dict(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    if dtype == torch.float32:
        ours, theirs = (m(X) if method != "adalora" else m(X).logits for m in (model, loaded))
        assert torch.equal(ours, theirs) and _described(loaded) == _described(model)


@pytest.mark.parametrize("method", ["melora", "blob"])
def test_a_posterior_inside_the_adapter_draws_the_same(method: str, tmp_path: Path) -> None:
    model, base = OTHERS[method]()
    export(model, tmp_path, format="packed")
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    ours, theirs = (variational_models.sampled(m, X, scope="example", seed=3) for m in (model, loaded))
    assert torch.equal(ours, theirs) and not torch.equal(ours, _outputs(model))


def test_one_rank_of_dylora_is_packed(tmp_path: Path) -> None:
    model, base = _dylora()
    with bayeslora.at_rank(model, 2):
        expected = _outputs(model)
        assert set(export(model, tmp_path, format="packed")["ranks"].values()) == {2}
    assert model.peft_config["default"].r == 4
    assert torch.equal(_outputs(PeftModel.from_pretrained(base(), tmp_path).eval()), expected)


def test_the_posterior_of_ivon_comes_along_with_its_ranks_cut(tmp_path: Path) -> None:
    model, base = _adalora()
    optimizer = IVON(bayeslora.parameter_groups(model.train(), lr=0.1), lr=0.0, ess=5.0)
    optimizer.sample()
    model(X[0], torch.arange(5) % 3).loss.backward()
    optimizer.step()
    with torch.no_grad():
        layers_of(model)[0].bayes_adalora_E["default"][:4] = 0.0
    bayeslora.save_posterior(model, optimizer, tmp_path / "run")
    model.eval()
    export(model, tmp_path / "a", format="packed", posterior=optimizer)
    export(model, tmp_path / "b", format="packed", posterior=tmp_path / "run")
    drawn = []
    for name in "ab":
        loaded = PeftModel.from_pretrained(base(), tmp_path / name).eval()
        with torch.no_grad(), bayeslora.load_posterior(loaded, tmp_path / name).sampled(seed=1):
            drawn.append(loaded(X).logits)
        stored = load_file(tmp_path / name / "posterior.safetensors")
        assert stored["base_model.model.first.bayes_adalora_A"].shape == (2, D_IN)
    assert torch.equal(*drawn)


def test_a_posterior_over_rounded_matrices_is_refused(tmp_path: Path) -> None:
    model = tiny_model(FROZEN).eval()
    all_widths(layers_of(model)[1], 4)
    optimizer = IVON(model.parameters(), lr=0.1, ess=5.0)
    with pytest.raises(BayesLoraError, match="below 32 bits.* export without the posterior"):
        export(model, tmp_path / "out", format="packed", posterior=optimizer)
    assert not (tmp_path / "out").exists()


def test_it_loads_as_a_further_adapter_and_without_first_weights(tmp_path: Path) -> None:
    model = tiny_model(FROZEN).eval()
    export(model, tmp_path, format="packed")
    shrink(model)
    expected = _outputs(model)
    lean = _loaded(tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(_outputs(lean), expected)
    lean.load_adapter(tmp_path, "again")
    lean.set_adapter("again")
    assert torch.equal(_outputs(lean.eval()), expected)


def test_a_named_adapter_is_packed_and_not_the_active_one(tmp_path: Path) -> None:
    model = tiny_model(FROZEN).eval()
    model.add_adapter("other", BLoraConfig(r=2, target_modules=["first"], mode="ra", init_weights=False))
    export(model, tmp_path, format="packed", adapter_name="other")
    assert {key.split(".")[2] for key in load_packed(tmp_path)} == {"first"}
    model.set_adapter("other")
    assert torch.equal(_outputs(_loaded(tmp_path)), _outputs(model))
    with pytest.raises(BayesLoraError, match="no adapter 'nobody'"):
        export(model, tmp_path / "lost", format="packed", adapter_name="nobody")


def test_a_process_that_imports_the_package_loads_it(tmp_path: Path) -> None:
    model = _bert()
    shrink(model)
    build_tiny_bert().save_pretrained(tmp_path / "base")
    export(model, tmp_path / "packed", format="packed")
    with torch.no_grad():
        torch.save({"x": TOKENS, "y": model(input_ids=TOKENS).logits}, tmp_path / "outputs.pt")
    code = """
import sys, torch, bayeslora
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification
folder = sys.argv[1]
base = AutoModelForSequenceClassification.from_pretrained(folder + "/base")
model = PeftModel.from_pretrained(base, folder + "/packed").eval()
saved = torch.load(folder + "/outputs.pt")
torch.set_num_threads(1)
print("largest difference", (model(input_ids=saved["x"]).logits - saved["y"]).abs().max().item())
"""
    assert float(run_code(code, tmp_path, str(tmp_path)).rpartition("difference ")[2]) == 0.0


def test_a_file_that_does_not_fit_its_config_or_model_is_refused(tmp_path: Path) -> None:
    export(tiny_model(FROZEN).eval(), tmp_path, format="packed")
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    for change, message in (
        ({"target_modules": ["first"]}, "has .*second.*, but the model does not"),
        ({"target_modules": ["first", "second", "head"], "rank_pattern": {}}, "lacks .*head"),
        ({"rank_pattern": {}}, "has shape .* in the packed adapter, but .* in the model"),
        ({"mode": "ra"}, "has .*quantizers.*, but the model does not"),
        ({"per_channel": True}, "has shape"),
        ({"peft_type": "MELORA"}, "lacks .*melora"),
    ):
        kept = {key: value for key, value in written.items() if change.get("peft_type") is None or key in SHARED}
        path.write_text(json.dumps({**kept, **change}))
        with pytest.raises(BayesLoraError, match=message) as caught:
            _loaded(tmp_path)
        assert "\n" not in str(caught.value)


SHARED = {"r", "target_modules", "rank_pattern", "lora_alpha", "inference_mode"}


def test_bad_requests_are_one_sentence(tmp_path: Path) -> None:
    model = tiny_model(FROZEN)
    with pytest.raises(BayesLoraError, match="takes no option 'colour'"):
        export(model, tmp_path, format="packed", colour="red")
    with pytest.raises(BayesLoraError, match="has no adapter of bayeslora"):
        export(Tiny(), tmp_path, format="packed")
    with pytest.raises(BayesLoraError, match="missing or not a file"):
        load_packed(tmp_path)
    export(model, tmp_path / "lora", allow_error=True)
    with pytest.raises(BayesLoraError, match="is not a packed adapter"):
        load_packed(tmp_path / "lora")
