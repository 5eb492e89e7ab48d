"""What both variational methods share with every adapter: merging, files, export, types, ranks, quantized bases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import bayeslora
from bayeslora import BlobConfig, MeLoraConfig, describe
from tests.conftest import build_tiny_bert, build_tiny_gpt2
from tests.methods.reference import D_IN, D_OUT, RANK, Tiny, layers_of, seeded
from tests.methods.test_quantized_bases import BASES, TOKENS, _load, _stored, base_folder  # noqa: F401
from tests.methods.variational_models import METHODS, X, config, oracle, randomize, sampled, tiny
from tests.processes import run_code

each_method = pytest.mark.parametrize("method", tuple(METHODS))


def _close(actual: Tensor, expected: Tensor, **kwargs: Any) -> None:
    torch.testing.assert_close(actual, expected, **{"atol": 1e-5, "rtol": 1e-5, **kwargs})


def _mean(model: nn.Module) -> Tensor:
    with bayeslora.posterior_mean(model), torch.no_grad():
        return model(X)


# Merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@each_method
def test_merging_takes_the_mean_even_in_training_mode_and_unmerging_undoes_it(
    method: str, kind: str, safe: bool
) -> None:
    model = tiny(method, kind)
    mean = _mean(model)
    raw = [layer.base_layer.weight.detach().clone() for layer in layers_of(model)]
    for training in (True, False):
        model.train(training)
        model.merge_adapter(safe_merge=safe)
        _close(model(X), mean)
        model.unmerge_adapter()
        for before, layer in zip(raw, layers_of(model), strict=True):
            _close(layer.base_layer.weight, before, atol=1e-6)


@each_method
def test_merge_and_unload_leaves_a_plain_model(method: str) -> None:
    model = tiny(method)
    mean = _mean(model)
    plain = model.merge_and_unload(safe_merge=True)
    assert type(plain) is Tiny and type(plain.first) is nn.Linear
    _close(plain(X), mean)


@each_method
def test_a_broken_adapter_is_not_merged_safely(method: str) -> None:
    model = tiny(method)
    layers_of(model)[0].B("default").data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


@each_method
def test_disabling_a_merged_adapter_gives_the_base(method: str) -> None:
    model = tiny(method).eval()
    model.merge_adapter()
    with model.disable_adapter():
        _close(model(X), seeded(Tiny)(X), atol=1e-6)


# Files and export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@each_method
def test_reloaded_exported_and_merged_models_give_the_same_mean_prediction(
    method: str, kind: str, tmp_path: Path
) -> None:
    options = {"modules_to_save": ["head"], "rank_pattern": {"second": 2}, "alpha_pattern": {"second": 9}}
    model = tiny(method, kind, **options)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].bias.fill_(0.25)
    mean = _mean(model)
    model.save_pretrained(tmp_path / "own")
    bayeslora.export(model, tmp_path / "lora", format="lora")
    again = PeftModel.from_pretrained(seeded(lambda: Tiny(kind)), tmp_path / "own")
    exported = PeftModel.from_pretrained(seeded(lambda: Tiny(kind)), tmp_path / "lora")
    for other in (again, exported, copy.deepcopy(again).merge_and_unload(), exported.merge_and_unload()):
        assert not other.training or type(other) is Tiny
        _close(other(X), mean)
    for scope in ("example", "token", "batch"):  # and the same posterior
        assert torch.equal(sampled(again, X, scope=scope, seed=4), sampled(model, X, scope=scope, seed=4))
    assert [layer.to_dict() for layer in describe(again)] == [layer.to_dict() for layer in describe(model)]
    assert not any(p.requires_grad for p in again.parameters())
    saved = load_file(tmp_path / "own" / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@each_method
def test_a_reloaded_adapter_goes_on_training_as_the_saved_one_would(method: str, tmp_path: Path) -> None:
    model = tiny(method)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(seeded(Tiny), tmp_path, is_trainable=True).train()
    gradients = []
    for one in (model, again):
        torch.manual_seed(3)
        (one(X).square().sum() + one.base_model.penalty()["kl"]).backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 6 + 2 * (method != "blob")
    for name, value in gradients[0].items():
        assert torch.equal(gradients[1][name], value), name


def test_another_process_gives_the_same_prediction_for_the_same_seed(tmp_path: Path) -> None:
    model = tiny("melora").eval()
    model.save_pretrained(tmp_path)
    torch.save([X, sampled(model, X.repeat(2, 1, 1), scope="batch", seed=5, draws=[1, 3])], tmp_path / "outputs.pt")
    code = """
import sys, torch, bayeslora
from peft import PeftModel
from tests.methods.reference import Tiny, seeded
torch.manual_seed(77)
model = PeftModel.from_pretrained(seeded(Tiny), sys.argv[1])
x, expected = torch.load(sys.argv[1] + "/outputs.pt")
with torch.no_grad(), bayeslora.sampling(model, "batch", seed=5, draws=[1, 3]):
    print("largest difference", (model(x.repeat(2, 1, 1)) - expected).abs().max().item())
"""
    assert float(run_code(code, tmp_path, str(tmp_path)).rpartition("difference ")[2]) == 0.0


@pytest.mark.parametrize("build", [build_tiny_bert, build_tiny_gpt2])
@each_method
def test_transformers_survive_the_same_round_trip(method: str, build: Any, tmp_path: Path) -> None:
    targets = ["query", "key", "value"] if build is build_tiny_bert else ["c_attn"]
    tokens = torch.arange(12).view(2, 6)

    def base() -> nn.Module:
        return build(initializer_range=0.3)  # at 0.02 a model of this size says the same whatever one does to it

    model = get_peft_model(base(), config(method, target_modules=targets)).eval()
    for index, layer in enumerate(layers_of(model)):
        randomize(layer, seed=index)
    with torch.no_grad():
        mean = model(input_ids=tokens).logits
        assert not torch.allclose(mean, base()(input_ids=tokens).logits, atol=1e-3)
        model.save_pretrained(tmp_path / "own")
        measured = bayeslora.export(model, tmp_path / "lora", batch={"input_ids": tokens})
        assert measured["max_output_error"] <= 1e-5
        for name in ("own", "lora"):
            other = PeftModel.from_pretrained(base(), tmp_path / name)
            _close(other(input_ids=tokens).logits, mean)
            _close(other.merge_and_unload()(input_ids=tokens).logits, mean)


# Ranks, adapters, types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["example", "token", "batch"])
@each_method
def test_rank_zero_works_forward_backward_saved_exported_and_reloaded(method: str, scope: str, tmp_path: Path) -> None:
    model = tiny(method, rank_pattern={"first": 0}, noise_scope=scope)
    first = layers_of(model)[0]
    assert torch.equal(first(X), first.base_layer(X))
    (model(X).sum() + model.base_model.penalty()["kl"]).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(torch.tensor(value).isfinite() for value in model.base_model.statistics().values())
    assert [layer.rank for layer in describe(model)] == [0, RANK]
    mean = _mean(model)
    model.save_pretrained(tmp_path / "own")
    bayeslora.export(model, tmp_path / "lora")
    for name in ("own", "lora"):
        _close(PeftModel.from_pretrained(seeded(Tiny), tmp_path / name)(X), mean)
    model.merge_adapter()
    _close(model(X), mean)


@each_method
def test_all_ranks_zero_have_no_divergence(method: str) -> None:
    model = tiny(method, rank_pattern={"first": 0, "second": 0})
    assert model.base_model.kl().item() == 0.0
    assert model.base_model.statistics()["kl"] == 0.0


@each_method
def test_adapters_come_switch_and_go(method: str) -> None:
    model = tiny(method).eval()
    mean = model(X)
    model.add_adapter("second", config(method, r=2))
    model.set_adapter("second")
    for index, layer in enumerate(layers_of(model)):
        randomize(layer, "second", seed=10 + index)
    other = model(X)
    assert not torch.allclose(other, mean, atol=1e-2)
    assert {layer.rank for layer in describe(model)} == {2}
    model.set_adapter("default")
    assert torch.equal(model(X), mean)
    model.delete_adapter("second")
    assert torch.equal(model(X), mean)
    assert all(layer.adapter_names == {"default"} and list(layer._fresh) == ["default"] for layer in layers_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_method
def test_a_cast_model_computes_in_its_type_and_draws_in_float32(method: str, dtype: torch.dtype) -> None:
    model = tiny(method)
    exact = {s: sampled(model, X, scope=s, seed=0) for s in ("example", "token", "batch")}
    mean, divergence = _mean(model), model.base_model.kl()
    model = model.to(dtype)
    for scope, expected in exact.items():
        y = sampled(model, X.to(dtype), scope=scope, seed=0)
        assert y.dtype == dtype and (y.float() - expected).norm() / expected.norm() < 0.03, scope
    with bayeslora.posterior_mean(model):
        y = model(X.to(dtype))
    assert y.dtype == dtype and (y.float() - mean).norm() / mean.norm() < 0.03
    assert model.base_model.kl().dtype == torch.float32
    _close(model.base_model.kl(), divergence, rtol=0.02, atol=0.1)
    model(X.to(dtype)).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.merge_adapter(safe_merge=True)
    assert (model(X.to(dtype)).float() - mean).norm() / mean.norm() < 0.03


@each_method
def test_an_adapter_on_a_half_precision_base_stays_float32(method: str) -> None:
    model = get_peft_model(seeded(Tiny).to(torch.bfloat16), config(method))
    assert {p.dtype for name, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    assert model.train()(X.to(torch.bfloat16)).dtype == torch.bfloat16


@each_method
def test_dropout_acts_in_training_on_the_adapter_alone(method: str) -> None:
    model = tiny(method, lora_dropout=0.5)
    layer = layers_of(model)[0]
    with bayeslora.posterior_mean(model):
        assert not torch.equal(layer(X), layer(X))
        model.eval()
        _close(layer(X), oracle(layer, X, [None] * len(X)))


@each_method
def test_the_shapes_of_a_layers_tensors(method: str) -> None:
    layer = layers_of(tiny(method))[0]
    shapes = {name: tuple(getattr(layer, name)["default"].shape) for name in layer.adapter_layer_names}
    if method == "blob":
        assert shapes == {"blob_M": (RANK, D_IN), "blob_G": (RANK, D_IN), "blob_B": (D_OUT, RANK)}
    else:
        core = (RANK, RANK) if method == "melora" else (RANK,)
        assert shapes == {
            "melora_A": (RANK, D_IN),
            "melora_B": (D_OUT, RANK),
            "melora_M": core,
            "melora_rho": core,
        }


# Quantized bases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(BASES))
@pytest.mark.parametrize("config_class", [MeLoraConfig, BlobConfig])
def test_a_base_in_4_or_8_bits_trains_samples_saves_and_reloads(
    config_class: Any,
    name: str,
    base_folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    adapter = config_class(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", num_examples=48, kl_weight=1e-3
    )
    model = get_peft_model(_load(base_folder, name), adapter).train()
    before = _stored(model)
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=1e-2))
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=8)
    losses = []
    for _ in range(8):
        loop.step_begin()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.item())
        loop.before_optimizer_step()
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval()
    after = _stored(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {layer.bits["weight"] for layer in describe(model)} == {BASES[name][1]}
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(_load(base_folder, name), tmp_path).eval()
    with torch.inference_mode():
        mean = model(input_ids=TOKENS).logits
        _close(again(input_ids=TOKENS).logits, mean)
        drawn = []
        for one in (model, again):
            with bayeslora.sampling(one, "batch", seed=1):
                drawn.append(one(input_ids=TOKENS).logits)
    _close(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], mean, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
@each_method
def test_a_transformers_model_checkpoints_its_layers(method: str, reentrant: bool, tiny_bert: PreTrainedModel) -> None:
    model = get_peft_model(tiny_bert, config(method, target_modules=["query", "value"])).train()
    for index, layer in enumerate(layers_of(model)):
        randomize(layer, seed=index)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(5)
        tokens = torch.arange(12).view(2, 6)
        model(input_ids=tokens, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert any(value.any() for name, value in gradients[0].items() if "rho" in name or "_G" in name)
    for name, value in gradients[0].items():
        _close(gradients[1][name], value, atol=1e-7)
