"""Modules that give their layers (tokens, rows, features), or that read their weights past them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import bayeslora
from bayeslora.errors import BayesLoraError
from bayeslora.vocabulary import ACTIVATIONS
from tests.methods.reference import seeded

SIZES: dict[str, Any] = {"vocab_size": 50, "initializer_range": 0.5}
TOKENS = 8


class Plain(nn.Module):
    """Layers of torch, which have the tokens first unless they are told otherwise."""

    def __init__(self, rows_first: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.rows_first = nn.Embedding(50, 32), rows_first
        self.block = nn.TransformerEncoderLayer(32, 4, 64, dropout=dropout, batch_first=rows_first)
        self.head = nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        x = self.block(x) if self.rows_first else self.block(x.transpose(0, 1)).transpose(0, 1)
        logits = self.head(x.mean(1))
        return logits if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


def longformer() -> nn.Module:
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    places: dict[str, Any] = {"attention_window": 4, "max_position_embeddings": 34, "intermediate_size": 64}
    return LongformerForSequenceClassification(LongformerConfig(**SIZES, **size, **dropout, **places))


def xlnet() -> nn.Module:
    size: dict[str, Any] = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "dropout": 0.0}
    return XLNetForSequenceClassification(XLNetConfig(**SIZES, **size, summary_last_dropout=0.0))


def encoder_decoder(kind: str) -> nn.Module:
    sides: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64), ("layerdrop", 0.0))
    }
    shared: dict[str, Any] = {"d_model": 32, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    if kind == "led":
        places: dict[str, Any] = {"attention_window": 4, "max_encoder_position_embeddings": 32, "init_std": 0.5}
        config = LEDConfig(vocab_size=50, **sides, **shared, **places, max_decoder_position_embeddings=32)
        return LEDForConditionalGeneration(config)
    fsmt = FSMTConfig(src_vocab_size=50, tgt_vocab_size=50, init_std=0.1, langs=["a", "b"], **sides, **shared)
    return FSMTForConditionalGeneration(fsmt)


MODELS: dict[str, tuple[Any, list[str]]] = {
    "longformer": (longformer, ["query", "value", "query_global", "value_global", "dense"]),
    "xlnet": (xlnet, ["layer_1", "layer_2"]),
    "led": (lambda: encoder_decoder("led"), ["query", "value", "value_global", "fc1"]),
    "fsmt": (lambda: encoder_decoder("fsmt"), ["q_proj", "v_proj", "fc1", "out_proj"]),
    "torch": (Plain, ["linear1", "linear2"]),
}


def adapted(name: str, method: Any, **options: Any) -> Any:
    build, targets = MODELS[name]
    config = method(r=2, target_modules=targets, init_weights=False, **options)
    return seeded(lambda: get_peft_model(build(), config)).train()


def batch(name: str, rows: int) -> dict[str, Tensor]:
    """Rows of as many tokens as rows, where the two are easily taken for each other, or of twice as many."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 50, (rows, TOKENS), generator=generator)
    labels = tokens if name in ("led", "fsmt") else tokens[:, 0] % 2
    return {"input_ids": tokens, "labels": labels}


def step(name: str, model: Any, rows: int, size: int) -> None:
    """The passes of one optimizer step over `rows` rows, in micro-batches of `size`, where evidence is gathered."""
    optimizer = torch.optim.SGD(bayeslora.parameter_groups(model, lr=0.0), lr=0.0)
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=600, num_examples=100)
    schedule = getattr(model.base_model.run_state(), "schedule", None)
    loop.step = 0 if schedule is None else min(schedule.passes)
    loop.step_begin()
    whole = batch(name, rows)
    for start in range(0, rows, size):
        part = {key: value[start : start + size] for key, value in whole.items()}
        output = model(**part)
        loss = output[0] if isinstance(output, tuple) else output.loss
        (loss * size / rows).backward()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [TOKENS, TOKENS // 2])
def test_squared_gradients_of_rows_are_those_of_one_row_at_a_time(name: str, rows: int) -> None:
    found = []
    for size in (rows, 1):
        model = adapted(name, bayeslora.MeLoraConfig, variance="closed_form", noise_fade_in=[0.5, 0.6])
        tuner = model.base_model
        step(name, model, rows, size)
        found.append(torch.cat([layer.take_row_gradients("default").flatten() for layer in tuner.adapted_layers()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6 * float(found[1].max()))
    assert float(found[1].max()) > 0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rows", [TOKENS, TOKENS // 2])
def test_evidence_of_rows_is_that_of_one_row_at_a_time(name: str, rows: int) -> None:
    found = []
    for size in (rows, 1):
        model = adapted(name, bayeslora.BLoraConfig)
        tuner = model.base_model
        for layer in tuner.adapted_layers():
            layer.start_learning("default")
        step(name, model, rows, size)
        state = tuner.run_state()
        evidence = [sums["rank_sums"] for sums in state.found.values()]
        for path, layer in tuner.named_layers().items():  # without the activations, whose ranges are of a batch
            kinds = layer.quantizers("default").kinds
            evidence += [
                sums
                for kind, sums in zip(kinds, state.found[path]["width_sums"], strict=True)
                if kind not in ACTIVATIONS
            ]
        watched = [watch.sketch.flatten() for watch in state.watches.values()]
        assert evidence and watched
        found.append((torch.cat(evidence), torch.cat(watched)))
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5 * float(alone.abs().max()))
        assert float(alone.abs().max()) > 0


@pytest.mark.parametrize("name", ["longformer", "xlnet", "torch"])
@pytest.mark.parametrize("scope", ["example", "batch"])
def test_a_row_has_its_own_draw(name: str, scope: Any) -> None:
    model = adapted(name, bayeslora.MeLoraConfig).eval()
    tokens = batch(name, TOKENS)["input_ids"]
    draws = TOKENS if scope == "batch" else 1
    with torch.no_grad(), bayeslora.sampling(model, scope, seed=0, draws=draws):
        drawn = model(input_ids=tokens)
        rows = [model(input_ids=tokens[:1].expand(TOKENS, -1))]
    together = getattr(drawn, "logits", drawn)
    with torch.no_grad(), bayeslora.sampling(model, scope, seed=0, draws=draws):
        other = tokens.clone()
        other[1:] = 7
        again = model(input_ids=other)
    torch.testing.assert_close(getattr(again, "logits", again)[0], together[0])  # other rows change nothing
    assert float(getattr(rows[0], "logits", rows[0]).std(0).max()) > 1e-3  # rows of one text differ by their draws


def test_an_adapter_acts_in_torchs_own_layers_without_gradients() -> None:
    config = bayeslora.MeLoraConfig(target_modules=["linear1"], init_weights=False)
    model = get_peft_model(Plain(rows_first=True), config)
    tokens = batch("torch", 3)["input_ids"]
    expected = model.eval()(tokens).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), expected)
        with model.disable_adapter():
            assert float((model(tokens) - expected).abs().max()) > 1e-3


def test_a_layer_whose_weight_is_read_past_the_adapter_is_refused() -> None:
    message = r"'block.self_attn.out_proj' is inside a MultiheadAttention, .*: name it in exclude_modules"
    with pytest.raises(BayesLoraError, match=message):
        get_peft_model(Plain(), bayeslora.MeLoraConfig(target_modules=["out_proj", "linear1"]))
