"""ONNX encoder-decoders write, token by token with their caches, what the evaluated model writes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import bayeslora
from bayeslora import BayesLoraError, BLoraConfig, export
from tests.conftest import VOCABULARY, build_tiny_tokenizer
from tests.methods.reference import FROZEN, RANK, layers_of, randomize, set_widths

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from bayeslora.export.onnx.reader import OnnxEncoderDecoder  # noqa: E402 - after the packages that it needs
from tests.export.test_onnx_decoder import without_widths  # noqa: E402

SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2,
    "num_decoder_layers": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
POSITIONS = 23
BART: dict[str, Any] = {
    "vocab_size": len(VOCABULARY), "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS, "dropout": 0.0, "decoder_start_token_id": 3, "eos_token_id": 3,
    "forced_eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 2,
}  # fmt: skip
WIDE = {"A_out": 32, "E_out": 32, "out": 32}
BASES: dict[str, Any] = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**SIZES)),
    "t5-gated": lambda: T5ForConditionalGeneration(
        T5Config(**SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False, scale_decoder_outputs=False)
    ),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**SIZES)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "bart-scaled": lambda: BartForConditionalGeneration(
        BartConfig(**BART, scale_embedding=True, activation_function="relu")
    ),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**BART, scale_embedding=True)),
    "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(**BART, scale_embedding=True)),
}
ALL = ["q", "k", "v", "o", "wi", "wo"]
ALL_OF_BART = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
ASKED = torch.randint(5, len(VOCABULARY), (2, 19), generator=torch.Generator().manual_seed(1))
SHOWN = torch.ones_like(ASKED)
SHOWN[1, 14:] = 0
BATCH = {"input_ids": ASKED, "attention_mask": SHOWN, "labels": ASKED[:, :9].masked_fill(SHOWN[:, 5:14] == 0, -100)}


def _base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = BASES[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = torch.randn_like(parameter) / 4
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + own if is_norm else own * (8 if "relative" in name else 1))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    return model.eval()


class Cached:
    """The graphs in `folder`, with the caches of the texts and tokens that they have read."""

    def __init__(self, folder: Path) -> None:
        encoder, self.decoder = (
            onnxruntime.InferenceSession(folder / f"{name}_model.onnx") for name in ("encoder", "decoder")
        )
        names = [each.name for each in encoder.get_outputs()]
        read = dict(
            zip(names, encoder.run(None, {"input_ids": ASKED.numpy(), "attention_mask": SHOWN.numpy()}), strict=True)
        )
        self.states = torch.from_numpy(read.pop("last_hidden_state"))
        self.read = {name.replace("present", "past_key_values"): values for name, values in read.items()}
        self.past = {
            each.name: np.zeros((len(ASKED), each.shape[1], 0, each.shape[3]), dtype=np.float32)
            for each in self.decoder.get_inputs()
            if ".decoder." in each.name
        }

    def __call__(self, new: Tensor) -> Tensor:
        fed = {"input_ids": new.numpy(), "encoder_attention_mask": SHOWN.numpy(), **self.read, **self.past}
        logits, *present = self.decoder.run(None, fed)
        self.past = dict(zip(self.past, present, strict=True))
        return torch.from_numpy(logits)


@torch.no_grad()
def _worst(model: nn.Module, folder: Path, steps: int = 20) -> float:
    """The largest difference from the model, reading four tokens at once and then one by one.

    The last of them is beyond T5's buckets, and has the last of BART's positions.
    """
    cached, ids = Cached(folder), torch.cat([torch.zeros(2, 1, dtype=torch.long), ASKED[:, :3]], dim=1)
    encoded = model.get_encoder()(input_ids=ASKED, attention_mask=SHOWN).last_hidden_state  # type: ignore[operator]
    worst = float((cached.states - encoded)[SHOWN.bool()].abs().max())
    new = ids
    for _ in range(steps):
        found = cached(new)
        expected = model(input_ids=ASKED, attention_mask=SHOWN, decoder_input_ids=ids).logits[:, -new.shape[1] :]
        worst = max(worst, float((found - expected).abs().max()))
        new = expected[:, -1].argmax(1, keepdim=True)
        ids = torch.cat([ids, new], dim=1)
    return worst


@pytest.mark.parametrize(
    ("kind", "method", "targets"),
    [
        ("t5", "lora", ALL),
        ("t5", "melora", ["q", "v"]),
        ("t5-gated", "blora", ["q", "wi_0", "wo"]),
        ("mt5", "lora", ["q"]),
        ("bart", "lora", ALL_OF_BART),
        ("bart-scaled", "blora", ["q_proj", "fc1"]),
        ("mbart", "melora", ["v_proj", "out_proj"]),
        ("pegasus", "lora", ["k_proj", "fc2"]),
    ],
)
def test_a_merged_model_writes_what_the_model_writes(
    kind: str, method: str, targets: list[str], tmp_path: Path
) -> None:
    model = get_peft_model(_base(kind), without_widths(method, targets, "SEQ_2_SEQ_LM")).eval()
    result = export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer(), batch=BATCH)
    assert result["rows"] == 2 and result["widened"] is None and result["changed"] == 0
    assert result["divergence"] < 1e-6 and "loss_after" in result
    assert result["file_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.onnx"))
    assert _worst(model, tmp_path) < 1e-4 * max(1.0, result["max_output"])
    if hasattr(model.config, "max_position_embeddings"):
        with pytest.raises(Exception, match="indices element out of data bounds"):
            Cached(tmp_path)(torch.zeros(2, POSITIONS + 1, dtype=torch.long))
    whole = OnnxEncoderDecoder(tmp_path)(ASKED, SHOWN, ASKED[:, :5]).logits
    with torch.no_grad():
        expected = model(input_ids=ASKED, attention_mask=SHOWN, decoder_input_ids=ASKED[:, :5]).logits
    torch.testing.assert_close(whole, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize(("kind", "targets"), [("t5", ALL), ("bart", ALL_OF_BART), ("mbart", ALL_OF_BART)])
def test_learned_widths_are_in_the_graphs(kind: str, targets: list[str], activations: bool, tmp_path: Path) -> None:
    config = BLoraConfig(
        r=RANK, target_modules=targets, task_type="SEQ_2_SEQ_LM", init_weights=False, quantize_input=activations
    )
    model = get_peft_model(_base(kind), config)
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(model):
        randomize(layer, generator, FROZEN)
        set_widths(layer, weight=8, A=8, E=8, B=8, **WIDE, **({"in": 16} if activations else {}))
    result = export(
        model.eval(), tmp_path, format="onnx", tokenizer=build_tiny_tokenizer(), batch=BATCH, unadapted="float32",
        allow_error=True,
    )  # fmt: skip
    assert result["file_bytes"] < 2 * result["float32_bytes"]
    # onnxruntime rounds the inputs of products with codes to 8 bits where no grid is learned.
    assert result["divergence"] < (0.05 if not activations else 1e-3)


def _written(folder: Path, text: str) -> str:
    """What the card's program writes, in an environment with neither this library nor torch."""
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    alone = "import sys\nfor name in ('bayeslora', 'torch', 'transformers', 'peft'):\n    sys.modules[name] = None\n"
    code = f"{alone}{program.replace('The film is long, and it is good.', text)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _likeliest(model: nn.Module, text: str, most: int) -> str:
    tokenizer = build_tiny_tokenizer()
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=POSITIONS)["input_ids"]
    plain = {"do_sample": False, "num_beams": 1, "no_repeat_ngram_size": 0}
    written = model.generate(input_ids=ids, max_new_tokens=most, use_cache=False, **plain)[0, 1:].tolist()  # type: ignore[operator]
    kept = written[: written.index(3)] if 3 in written else written
    return tokenizer.decode(kept, skip_special_tokens=True).strip()


def test_the_cards_program_writes_what_the_model_writes(tmp_path: Path) -> None:
    config = LoraConfig(r=RANK, target_modules=ALL, task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    model = get_peft_model(_base("t5"), config).eval()
    export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer(), batch=BATCH)
    assert _written(tmp_path, "the film was good") == _likeliest(model, "the film was good", 40)
    assert "positions" not in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["bart", "mbart", "pegasus"])
def test_the_cards_program_begins_and_ends_as_the_generation_config_says(kind: str, tmp_path: Path) -> None:
    """It cuts a text and an answer to the positions, and the card says which other settings it lacks."""
    config = LoraConfig(r=RANK, target_modules=ALL_OF_BART, task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    model = get_peft_model(_base(kind), config).eval()
    settings = {"forced_bos_token_id": 20, "num_beams": 4, "no_repeat_ngram_size": 3, "min_length": 0}
    model.get_base_model().generation_config.update(**settings)
    export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer(), batch=BATCH)
    text, card = " ".join(["the film was good"] * 8), (tmp_path / "README.md").read_text(encoding="utf-8")
    found = _written(tmp_path, text)
    assert found == _likeliest(model, text, POSITIONS) and found.startswith(build_tiny_tokenizer().decode([20]))
    assert "`generation_config`: `no_repeat_ngram_size=3`, `num_beams=4`." in card
    assert f"knows {POSITIONS} positions" in card


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_graphs_generate_as_the_model_does_one_token_a_step(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = ALL if kind == "t5" else ALL_OF_BART
    config = LoraConfig(r=RANK, target_modules=targets, task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    model = get_peft_model(_base(kind), config).eval()
    model.get_base_model().generation_config.update(forced_bos_token_id=20)
    export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer(), batch=BATCH)
    graph = bayeslora.load(tmp_path).model
    asked = {"input_ids": ASKED, "attention_mask": SHOWN}
    for options in (
        {"do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": False, "use_cache": False},
    ):
        # Without a cache: Transformers makes one of too few layers for a T5 with more of them in the decoder.
        expected = model.generate(**asked, max_new_tokens=9, **{**options, "use_cache": False})  # type: ignore[operator]
        assert torch.equal(graph.generate(**asked, max_new_tokens=9, **options), expected)  # type: ignore[operator]
    session, read = graph.session, []

    def noted(outputs: Any, feeds: dict[str, Any]) -> Any:
        past = next(values for name, values in feeds.items() if ".decoder." in name)
        read.append((feeds["input_ids"].shape[1], past.shape[2]))
        return session.run(outputs, feeds)  # type: ignore[union-attr, operator]

    monkeypatch.setattr(graph, "session", SimpleNamespace(run=noted))
    graph.generate(**asked, max_new_tokens=4, min_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert read == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_a_run_of_the_graphs_answers_texts_as_the_merged_model_does(tmp_path: Path) -> None:
    config = LoraConfig(r=RANK, target_modules=ALL_OF_BART, task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    model = get_peft_model(_base("bart"), config).eval()
    export(model, tmp_path / "onnx", format="onnx", tokenizer=build_tiny_tokenizer(), batch=BATCH)
    export(model, tmp_path / "merged", format="merged")
    build_tiny_tokenizer().save_pretrained(tmp_path / "merged")
    texts = ["the film was good", "a bad one", "good good good the plot was a bad one"]
    graphs, merged = (bayeslora.load(tmp_path / name).generate(texts, max_new_tokens=6) for name in ("onnx", "merged"))
    assert [answer.text for answer in graphs] == [answer.text for answer in merged]
    for one, other in zip(graphs, merged, strict=True):
        torch.testing.assert_close(one.entropy, other.entropy, atol=1e-3, rtol=1e-3)
    with pytest.raises(BayesLoraError, match="samples"):
        bayeslora.load(tmp_path / "onnx").generate(texts, samples=2)


def test_what_has_no_graph_is_refused(tmp_path: Path) -> None:
    config = LoraConfig(r=RANK, target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(_base("t5"), config)
    options: dict[str, Any] = {"format": "onnx", "tokenizer": build_tiny_tokenizer()}
    with pytest.raises(BayesLoraError, match="lacks labels, but an encoder-decoder is compared on its answers"):
        export(model, tmp_path, batch={"input_ids": ASKED}, **options)
    model.get_base_model().config.dense_act_fn = "tanh"
    with pytest.raises(BayesLoraError, match="activation is 'tanh', but format 'onnx' is for silu, gelu"):
        export(model, tmp_path, batch=BATCH, **options)
    model.get_base_model().config.dense_act_fn = "relu"
    model.get_base_model().generation_config.decoder_start_token_id = None
    with pytest.raises(BayesLoraError, match="decoder_start_token_id is None, but an answer begins with it"):
        export(model, tmp_path, batch=BATCH, **options)


def test_two_word_embeddings_are_refused(tmp_path: Path) -> None:
    untied = BartForConditionalGeneration(BartConfig(**BART, tie_word_embeddings=False))
    model = get_peft_model(untied, LoraConfig(target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(BayesLoraError, match="word embeddings of their own, but format 'onnx' is for one that"):
        export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer(), batch=BATCH)
    assert not list(tmp_path.iterdir())


def test_without_rows_the_models_own_are_measured(tmp_path: Path) -> None:
    config = LoraConfig(r=RANK, target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    model = get_peft_model(_base("bart"), config)
    result = export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer())
    assert result["rows"] == 2 and result["divergence"] < 1e-6
