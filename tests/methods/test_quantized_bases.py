"""Bases loaded in 4 or 8 bits (bitsandbytes, torchao, on a CPU) train, save, reload, and keep their own width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OPTConfig, OPTForCausalLM, TorchAoConfig

from bayeslora import BayesLoop, BayesLoraError, BLoraConfig, describe, parameter_groups
from bayeslora.methods.blora.layer import BLoraLayer

STEPS = 8
TOKENS = torch.arange(24).view(2, 12) % 20


def _bnb_4bit() -> object:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def _bnb_8bit() -> object:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao_int8() -> object:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quant_type=quantization.Int8WeightOnlyConfig())


BASES: dict[str, tuple[Callable[[], object], int]] = {
    "bitsandbytes 4 bits": (_bnb_4bit, 4),
    "bitsandbytes 8 bits": (_bnb_8bit, 8),
    "torchao int8": (_torchao_int8, 8),
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        max_position_embeddings=32,
        init_std=0.1,
        dropout=0.0,
    )
    folder = tmp_path_factory.mktemp("base")
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


def _load(folder: Path, name: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BASES[name][0](), device_map={"": "cpu"})


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """The base weights of the adapted layers as they lie in memory, packed or not."""
    weights = {}
    for name, module in model.named_modules():
        if name.endswith("base_layer"):
            weight = module.weight
            weights[name] = (weight.dequantize() if hasattr(weight, "qdata") else weight.data).clone()
    return weights


def _config(mode: str) -> BLoraConfig:
    return BLoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        mode=mode,
        warmup_fraction=0.25,
        freeze_fraction=0.25,
    )


def test_a_fixed_width_for_a_weight_that_keeps_its_own_is_refused(base_folder: Path) -> None:
    config = BLoraConfig(target_modules=["q_proj"], fixed_bits={"weight": 8})
    with pytest.raises(BayesLoraError, match="a base weight loaded in few bits keeps those"):
        get_peft_model(_load(base_folder, "bitsandbytes 8 bits"), config)
    others = dict.fromkeys(["A", "E", "B", "A_out", "E_out", "out"], 8)
    config = BLoraConfig(target_modules=["q_proj"], mode="q", fixed_bits=others)
    with pytest.raises(BayesLoraError, match="but mode 'q' must learn a width"):
        get_peft_model(_load(base_folder, "bitsandbytes 8 bits"), config)


@pytest.mark.parametrize("mode", ["q+ra", "ra"])
@pytest.mark.parametrize("name", list(BASES))
def test_trains_saves_and_reloads_without_touching_the_base(
    name: str, mode: str, base_folder: Path, tmp_path: Path
) -> None:
    width = BASES[name][1]
    model = get_peft_model(_load(base_folder, name), _config(mode))
    before = _stored(model)
    assert len(before) == 2

    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    loop = BayesLoop(model, optimizer, total_steps=STEPS)
    losses = []
    model.train()
    for _ in range(STEPS):
        loop.step_begin()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.item())
        loop.before_optimizer_step()
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
    model.eval()

    assert losses[-1] < losses[0]
    after = _stored(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())

    described = describe(model)
    assert [layer.bits["weight"] for layer in described] == [width, width]
    assert not any("weight" in module.kinds for module in model.modules() if hasattr(module, "kinds"))

    with torch.inference_mode():
        expected = model(input_ids=TOKENS).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(_load(base_folder, name), tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(input_ids=TOKENS).logits, expected, atol=1e-6, rtol=1e-5)
    assert [layer.to_dict() for layer in describe(again)] == [layer.to_dict() for layer in described]


@pytest.mark.parametrize("name", list(BASES))
def test_a_disabled_adapter_is_the_quantized_base(name: str, base_folder: Path) -> None:
    base = _load(base_folder, name).eval()
    with torch.inference_mode():
        expected = base(input_ids=TOKENS).logits
    config = _config("q+ra")
    config.init_weights = False
    model = get_peft_model(base, config).eval()
    with torch.inference_mode():
        assert not torch.allclose(model(input_ids=TOKENS).logits, expected, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", list(BASES))
def test_evaluating_does_not_change_what_a_merge_starts_from(name: str, base_folder: Path) -> None:
    model = get_peft_model(_load(base_folder, name), _config("ra")).eval()
    layer = next(module for module in model.modules() if isinstance(module, BLoraLayer))
    before = layer.get_base_weight().clone()
    with torch.no_grad():
        first = model(input_ids=TOKENS).logits
        # bitsandbytes reorders 4-bit weights in the pass, and rounds their scales to bfloat16
        torch.testing.assert_close(layer.get_base_weight(), before, rtol=1 / 128, atol=1e-6)
        torch.testing.assert_close(model(input_ids=TOKENS).logits, first)
