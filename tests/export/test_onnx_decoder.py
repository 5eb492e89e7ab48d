"""ONNX decoders write, token by token with their cache, what the evaluated model writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import bayeslora
from bayeslora import BayesLoraError, BLoraConfig, MeLoraConfig, export
from bayeslora.data.packaged import packaged_model
from tests.conftest import VOCABULARY, build_tiny_gpt2, build_tiny_llama, build_tiny_tokenizer
from tests.methods.reference import FROZEN, RANK, layers_of, randomize, set_widths

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from bayeslora.export import agreement  # noqa: E402 - after the packages that it needs
from bayeslora.export.onnx.graph import Graph  # noqa: E402
from bayeslora.export.onnx.layers import _blocks  # noqa: E402
from bayeslora.export.onnx.reader import OnnxDecoder  # noqa: E402

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _tiny_qwen() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = Qwen2Config(
        vocab_size=len(VOCABULARY), intermediate_size=64, tie_word_embeddings=True, eos_token_id=3, **sizes
    )
    return Qwen2ForCausalLM(config)


BASES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (build_tiny_llama, LLAMA),
    "llama-tied": (lambda: build_tiny_llama(tie_word_embeddings=True, num_key_value_heads=1), ["q_proj", "down_proj"]),
    "llama3": (
        lambda: build_tiny_llama(
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        ),
        LLAMA,
    ),
    "qwen2": (_tiny_qwen, ["q_proj", "v_proj", "up_proj"]),
    "gpt2": (build_tiny_gpt2, ["c_attn", "c_fc"]),
}


def _spread(model: nn.Module, scale: float = 3.0) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(scale) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 8)
            assert name
    return model.eval()


class Cached:
    """The graph in `folder`, with the keys and values of the tokens that it has read."""

    def __init__(self, folder: Path) -> None:
        self.session = onnxruntime.InferenceSession(folder / "model.onnx")
        self.caches = [each for each in self.session.get_inputs() if each.name.startswith("past_key_values")]
        self.past: dict[str, np.ndarray] = {}

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        empty = {
            each.name: np.zeros((len(ids), each.shape[1], 0, each.shape[3]), dtype=np.float32) for each in self.caches
        }
        fed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        names = [each.name for each in self.session.get_outputs()]
        assert names == ["logits", *(name.replace("past_key_values", "present") for name in empty)]
        logits, *present = self.session.run(
            names, {**{name: value.numpy() for name, value in fed.items()}, **(self.past or empty)}
        )
        self.past = dict(zip(empty, present, strict=True))
        return torch.from_numpy(logits)


@torch.no_grad()
def _steps(model: nn.Module, folder: Path, count: int = 6) -> float:
    """The largest difference from the model of logits that the graph writes with its cache, on two texts.

    The second starts with padding. Both are read at once, then token by token, each the likeliest that the model finds
    without a cache.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, len(VOCABULARY), (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cached, new, worst = Cached(folder), ids, 0.0
    for _ in range(count):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        found = cached(new, mask, positions[:, -new.shape[1] :].contiguous())
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -new.shape[1] :]
        shown = mask[:, -new.shape[1] :].bool()
        worst = max(worst, float((found - expected)[shown].abs().max()))
        assert torch.equal(found[:, -1].argmax(1), expected[:, -1].argmax(1))
        new = expected[:, -1].argmax(1, keepdim=True)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return worst


def without_widths(method: str, targets: list[str], task_type: str) -> PeftConfig:
    """The configuration of an adapter that learns no widths, so that its graph is merged, with a random update."""
    shared: dict[str, Any] = {"r": RANK, "target_modules": targets, "task_type": task_type}
    if method == "lora":
        return LoraConfig(init_lora_weights=False, **shared)
    if method == "melora":
        return MeLoraConfig(init_weights=False, num_examples=9, **shared)
    return BLoraConfig(init_weights=False, mode="ra", **shared)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", "lora"), ("llama-tied", "melora"), ("llama3", "blora"), ("qwen2", "lora"), ("gpt2", "melora")],
)
def test_a_merged_decoder_writes_what_the_model_writes(kind: str, method: str, tmp_path: Path) -> None:
    build, targets = BASES[kind]
    model = get_peft_model(_spread(build()), without_widths(method, targets, "CAUSAL_LM")).eval()
    batch = {"input_ids": torch.arange(5, 17).reshape(2, 6), "attention_mask": torch.ones(2, 6).long()}
    result = export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer(), batch=batch)
    assert result["max_output_error"] < 1e-4 and result["changed"] == 0 and result["widened"] is None
    assert result["rows"] == 2 and result["loss_after"] == pytest.approx(result["loss_before"], abs=1e-5)
    assert _steps(model, tmp_path) < 1e-4
    stored = sum(np.prod(each.dims) for each in onnx.load(tmp_path / "model.onnx").graph.initializer)
    assert stored < 1.1 * result["float32_bytes"] / 4  # a head that is the embedding is stored once


def _learned(base: nn.Module, targets: list[str], widths: dict[str, int], **more: Any) -> nn.Module:
    shared: dict[str, Any] = {"r": RANK, "target_modules": targets, "task_type": "CAUSAL_LM", **more}
    model = get_peft_model(base, BLoraConfig(init_weights=False, quantize_input=True, **shared)).eval()
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(model):
        randomize(layer, generator, FROZEN)
        set_widths(layer, **widths)
        for kind in ("in", "A_out", "E_out", "out"):
            layer.quantizers("default").set_range(kind, torch.tensor(60.0))
    return model


WIDE = {"in": 32, "A_out": 32, "E_out": 32, "out": 32}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("bits", "stored"), [(8, 8), (4, 4), (2, 4)])
def test_codes_are_multiplied_in_blocks(kind: str, bits: int, stored: int, tmp_path: Path) -> None:
    """With inputs that are on no grid; onnxruntime rounds them, which is all that differs."""
    build, targets = BASES[kind]
    model = _learned(_spread(build()), targets, {"weight": bits, "A": 8, "E": 8, "B": 8, **WIDE})
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10)}
    options = {"tokenizer": build_tiny_tokenizer(), "batch": batch, "unadapted": "float32", "allow_error": True}
    result = export(model, tmp_path, format="onnx", **options)
    assert 0 < result["max_output_error"] < 0.05 * result["max_output"]
    assert ("weight" in result["widened"]) == (bits == 2)
    nodes = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 2 * {"llama": 4, "gpt2": 2}[kind]  # query, key and value are one, and so are gate and up
    assert {a.i for node in nodes for a in node.attribute if a.name == "bits"} == {stored}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("size", "operator"), [(32, "MatMulNBits"), (8, "Gemm")])
def test_groups_of_inputs_keep_their_steps(kind: str, size: int, operator: str, tmp_path: Path) -> None:
    """In blocks where they fit them, and otherwise in float32, which rounds no input."""
    build, targets = BASES[kind]
    widths = {"weight": 4, "A": 8, "E": 8, "B": 8, **WIDE}
    model = _learned(_spread(build()), targets, widths, group_size=size)
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10)}
    options = {"tokenizer": build_tiny_tokenizer(), "batch": batch, "unadapted": "float32", "allow_error": True}
    result = export(model, tmp_path, format="onnx", **options)
    assert result["max_output_error"] < (0.05 if size == 32 else 1e-4) * result["max_output"]
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert (nodes["MatMulNBits"] > 0) == (operator == "MatMulNBits")


@pytest.mark.parametrize("in_bits", [8, 32])
def test_groups_of_inputs_under_inputs_on_a_grid(in_bits: int, tmp_path: Path) -> None:
    widths = {"weight": 4, "in": in_bits, "A": 8, "E": 8, "B": 8, "A_out": 8, "E_out": 8, "out": 8}
    model = _learned(_spread(build_tiny_llama()), LLAMA, widths, group_size=8)
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10)}
    options = {"tokenizer": build_tiny_tokenizer(), "batch": batch, "unadapted": "float32", "allow_error": True}
    result = export(model, tmp_path, format="onnx", **options)
    assert result["max_output_error"] < 0.05 * result["max_output"] and "weight 4 as 32" in result["widened"]


def test_blocks_hold_the_codes() -> None:
    """Unpacked here as onnxruntime's documents say: the first of two codes in the low half, 8 or 128 for 0."""
    for bits, largest in ((4, 7), (8, 127)):
        weight = np.random.default_rng(0).integers(-largest, largest + 1, (5, 70)).astype(np.int8)
        graph = Graph()
        _blocks(graph, "x", weight, np.arange(1, 6, dtype=np.float32), bits)
        packed, scales = (onnx.numpy_helper.to_array(each) for each in graph._constants.values())
        assert packed.shape == (5, 3, 32 * bits // 8)
        assert list(scales) == [scale for scale in range(1, 6) for _ in range(3)]
        codes = packed.reshape(5, -1)
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(5, -1)
        assert np.array_equal(codes[:, :70].astype(int) - (1 << (bits - 1)), weight)


def test_inputs_on_a_grid_are_multiplied_as_integers(tmp_path: Path) -> None:
    widths = {"weight": 4, "in": 8, "A": 8, "E": 8, "B": 8, "A_out": 8, "E_out": 8, "out": 8}
    model = _learned(_spread(build_tiny_llama()), LLAMA, widths)
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10)}
    options = {"tokenizer": build_tiny_tokenizer(), "batch": batch, "unadapted": "float32", "allow_error": True}
    result = export(model, tmp_path, format="onnx", **options)
    assert result["max_output_error"] < 0.05 * result["max_output"]
    session_options = onnxruntime.SessionOptions()
    session_options.optimized_model_filepath = str(tmp_path / "optimized")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", session_options)
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized").graph.node)
    assert operators["MatMulNBits"] == 0 and operators["QGemm"] >= 2 * 4  # projections, o, gate and up, down


@pytest.mark.parametrize("tied", [True, False])
def test_unadapted_weights_have_eight_bits_and_a_tied_head_is_stored_once(tied: bool, tmp_path: Path) -> None:
    base = _spread(build_tiny_llama(tie_word_embeddings=tied, hidden_size=64))
    model = _learned(base, ["q_proj"], {"weight": 8, "A": 8, "E": 8, "B": 8, **WIDE})
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10)}
    result = export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer(), batch=batch)
    assert result["unadapted"] == "int8 weights"
    assert 0 < result["max_output_error"] < 0.1 * result["max_output"] and result["divergence"] < 0.001
    stored = {each.name: each for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    words = len(VOCABULARY) * 64
    whole = [name for name, each in stored.items() if np.prod(each.dims) == words]
    assert whole == (["lm_head.weight.blocks"] if tied else ["model.embed_tokens.codes", "lm_head.weight.blocks"])


def test_the_card_alone_writes_what_the_model_writes(tmp_path: Path) -> None:
    """In a process that refuses torch and this library."""
    model = get_peft_model(_spread(build_tiny_llama()), LoraConfig(r=2, init_lora_weights=False)).eval()
    tokenizer = build_tiny_tokenizer()
    export(model, tmp_path, format="onnx", tokenizer=tokenizer)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    refuse = "import sys\nfor name in ('torch', 'transformers', 'peft', 'bayeslora'):\n    sys.modules[name] = None\n"
    text = "good film"
    code = f"{refuse}{code}\nimport json\nprint(json.dumps(generate({text!r}, 8)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([tokenizer.backend_tokenizer.encode(text).ids])
    written = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert json.loads(done.stdout.splitlines()[-1]) == tokenizer.backend_tokenizer.decode(written.tolist())
    assert str(tmp_path) not in card and "of the next tokens change" in card


def test_a_decoder_far_from_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _learned(_spread(build_tiny_llama()), LLAMA, {"weight": 4, "A": 8, "E": 8, "B": 8, **WIDE})
    options: dict[str, Any] = {"format": "onnx", "tokenizer": build_tiny_tokenizer()}
    monkeypatch.setattr(agreement, "MOST_DIVERGENCE", 1e-9)
    with pytest.raises(BayesLoraError, match=r"diverges by .* nats .* but 1e-09 nats is the most: .*allow_error=True"):
        export(model, tmp_path, **options)
    result = export(model, tmp_path, **options, allow_error=True)
    assert f"{result['divergence']:.2g} nats" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_what_the_graph_does_not_have_is_refused(tmp_path: Path) -> None:
    def refused(base: nn.Module, target: str) -> str:
        model = get_peft_model(base, LoraConfig(r=2, target_modules=[target]))
        with pytest.raises(BayesLoraError) as error:
            export(model, tmp_path / "out", format="onnx", tokenizer=build_tiny_tokenizer())
        assert not (tmp_path / "out").exists()
        return str(error.value)

    sizes = {"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 1, "ffn_dim": 64}
    opt = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=4, max_position_embeddings=16))
    assert re.match("the model is a OPTForCausalLM, but format 'onnx' is for Bart.*Llama", refused(opt, "q_proj"))
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    llama = build_tiny_llama(rope_parameters=dynamic)
    assert "rotary embedding is 'dynamic', but format 'onnx' is for default, linear" in refused(llama, "q_proj")
    assert "activation is 'tanh', but format" in refused(build_tiny_gpt2(activation_function="tanh"), "c_attn")
    scaled = build_tiny_gpt2(scale_attn_by_inverse_layer_idx=True)
    assert "scaled by layer" in refused(scaled, "c_attn")


@pytest.mark.slow
def test_smollm_writes_with_its_cache_what_the_model_writes(tmp_path: Path) -> None:
    path = packaged_model("smollm2")
    options: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    base = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.01)
    batch = dict(tokenizer(["The capital of France is"], return_tensors="pt"))
    result = export(model, tmp_path, format="onnx", tokenizer=tokenizer, batch=batch)
    assert result["max_output_error"] < 1e-4 * result["max_output"]
    cached, ids, new, written = Cached(tmp_path), batch["input_ids"], batch["input_ids"], []
    with torch.no_grad():
        for _ in range(12):
            total = ids.shape[1]
            positions = torch.arange(total - new.shape[1], total)[None]
            found = cached(new, torch.ones_like(ids), positions)[:, -1]
            expected = model(input_ids=ids).logits[:, -1]
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
            new = found.argmax(1, keepdim=True)
            written.append(int(new))
            ids = torch.cat([ids, new], 1)
    generated = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert written == generated.tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}],
    ids=["greedy", "uncached", "beams", "sampled"],
)
def test_a_graph_generates_what_the_model_generates(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    build, targets = BASES[kind]
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False, fan_in_fan_out=kind == "gpt2")
    model = get_peft_model(_spread(build()), config).eval()
    model.generation_config.eos_token_id = 3
    export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer())
    graph = OnnxDecoder(tmp_path)
    assert graph.generation_config.eos_token_id == 3
    ids = torch.randint(5, len(VOCABULARY), (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    given = {"samples": 0, "seed": 1, "uncertainty": False, "max_new_tokens": 8, "pad_token_id": 0, **options}
    expected, found = (bayeslora.generate(each, ids, mask, **given) for each in (model, graph))
    assert torch.equal(found.sequences, expected.sequences) and found.tokens.shape[-1] > 1
    torch.testing.assert_close(found.log_probability, expected.log_probability, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.token_entropy, expected.token_entropy, atol=1e-3, rtol=1e-3)


def test_a_graph_reads_a_token_behind_those_in_its_cache_alone(tmp_path: Path, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build_tiny_llama(), LoraConfig(r=RANK, target_modules=["q_proj"])).eval()
    export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer())
    graph, read = OnnxDecoder(tmp_path), []
    run = graph.session.run

    def noted(names: Any, feeds: dict[str, np.ndarray]) -> Any:
        read.append((feeds["input_ids"].shape[1], feeds["past_key_values.0.key"].shape[2]))
        return run(names, feeds)

    monkeypatch.setattr(graph, "session", SimpleNamespace(run=noted))
    graph.generate(torch.arange(5, 11)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert read == [(6, 0), (1, 6), (1, 7), (1, 8)]


def test_settings_of_generate_that_contradict_each_other_go_along(tmp_path: Path) -> None:
    """Many models of the hub have a temperature and do not sample; Transformers refuses to write that."""
    model = get_peft_model(build_tiny_llama(), LoraConfig(r=RANK, target_modules=["q_proj"])).eval()
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, False
    export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer())
    graph = OnnxDecoder(tmp_path)
    assert graph.generation_config.temperature == 0.7 and graph.generation_config.do_sample is False
    with pytest.raises(ValueError, match="not_an_option"):
        graph.generate(torch.arange(5, 9)[None], not_an_option=1)
