"""Encoder-decoders that a Trainer has adapted load in one line and write answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
)

import bayeslora
from bayeslora import BayesLoraError, MeLoraConfig
from tests.conftest import build_tiny_tokenizer

POSITIONS = 24
TEXTS = ["the film was good", "a bad one", "good good good the plot was a bad one and the film was good"]


def build(kind: str) -> PreTrainedModel:
    tokenizer = build_tiny_tokenizer()
    torch.manual_seed(0)
    shared = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": 3, "decoder_start_token_id": 2}
    if kind == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **shared))
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=POSITIONS,
            bos_token_id=2, forced_eos_token_id=None, init_std=1.0, **shared,
        )
    )  # fmt: skip


@pytest.fixture(params=["t5", "bart"])
def adapted(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A base and an adapter, as scripts leave them: two folders that `save_pretrained` wrote."""
    base = tmp_path / "base"
    build(request.param).save_pretrained(base)
    build_tiny_tokenizer().save_pretrained(base)
    targets = ["q", "v"] if request.param == "t5" else ["q_proj", "v_proj"]
    config = MeLoraConfig(r=2, target_modules=targets, task_type="SEQ_2_SEQ_LM", init_weights=False)
    model = get_peft_model(type(build(request.param)).from_pretrained(base), config)
    model.save_pretrained(tmp_path / "out")
    return tmp_path / "out"


def test_an_adapter_writes_what_its_model_writes_and_draws_score_it(adapted: Path) -> None:
    run = bayeslora.load(adapted)
    assert (run.info.kind, run.info.head) == ("generation", "seq2seq")
    answers = run.generate(TEXTS, samples=3, max_new_tokens=6)
    for text, answer in zip(TEXTS, answers, strict=True):
        asked = run.tokenizer(text, return_tensors="pt")
        with torch.no_grad(), bayeslora.posterior_mean(run.model):
            ids = run.model.generate(  # type: ignore[operator]
                input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], max_new_tokens=6, do_sample=False
            )
        assert answer.text == run.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
        assert len(answer.draws) == len(answer.draw_log_probabilities) == 3
        assert answer.tokens and all(value >= 0 for value in answer.mutual_information)
    (alone,) = run.generate(TEXTS[1], samples=3, max_new_tokens=6)
    torch.testing.assert_close(torch.tensor(alone.entropy), torch.tensor(answers[1].entropy), atol=1e-5, rtol=1e-5)


def test_known_answers_say_which_answers_a_human_should_give(adapted: Path) -> None:
    run = bayeslora.load(adapted)
    rows = [{"prompt": text, "completion": "good"} for text in TEXTS * 5]
    run.calibrate_answers(rows, samples=2, max_new_tokens=3)
    assert all(answer.ask_a_human is not None for answer in run.generate(TEXTS, risk=0.5))


def test_a_merged_one_loads_without_an_adapter(adapted: Path, tmp_path: Path) -> None:
    run = bayeslora.load(adapted)
    bayeslora.export(run.model, tmp_path / "merged", format="merged")
    run.tokenizer.save_pretrained(tmp_path / "merged")
    merged = bayeslora.load(tmp_path / "merged")
    expected = [answer.text for answer in run.generate(TEXTS, max_new_tokens=6)]
    assert [answer.text for answer in merged.generate(TEXTS, max_new_tokens=6)] == expected


def test_what_an_encoder_decoder_cannot_do_is_one_sentence(adapted: Path, tmp_path: Path) -> None:
    run = bayeslora.load(adapted)
    with pytest.raises(BayesLoraError, match="row 1 is a conversation, but an encoder-decoder reads a text"):
        run.generate([[{"role": "user", "content": "good"}]])
    if run.model.config.model_type == "bart":
        with pytest.raises(
            BayesLoraError, match=f"prompt 1 has 28 tokens and the answer 1, but the model reads {POSITIONS}"
        ):
            run.generate(" ".join(["good"] * 26))
        with pytest.raises(BayesLoraError, match=f"and the answer 30, but the model reads {POSITIONS} of each"):
            run.generate("good", max_new_tokens=30)
        assert run.generate(" ".join(["good"] * 20))[0].tokens  # an encoder's positions are not the answer's


def test_a_model_of_speech_is_not_taken_for_one_of_text(tmp_path: Path) -> None:
    WhisperConfig(architectures=["WhisperForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(BayesLoraError, match="is for the task WhisperForConditionalGeneration, but load accepts"):
        bayeslora.load(tmp_path)
