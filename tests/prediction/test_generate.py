"""Generation under one draw of the weights: what a model that holds the draw generates by hand, token by token."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, T5Config, T5ForConditionalGeneration

from bayeslora import TemperatureScaling, WeightPosterior
from bayeslora.errors import BayesLoraError
from bayeslora.prediction import Generation, generate
from bayeslora.prediction.generate import _Run, generate_tokens
from tests.conftest import build_tiny_gpt2, build_tiny_llama
from tests.prediction.models import merged_draw, noisy

SAMPLES, SEED, NEW = 3, 5, 6
PROMPTS = torch.tensor([[0, 0, 7, 8, 9], [4, 5, 6, 7, 8]])
MASK = (PROMPTS != 0).long()
TINY = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def causal(family: str, method: str = "melora", **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    base = build_tiny_llama() if family == "llama" else build_tiny_gpt2(embd_pdrop=0.0)
    for parameter in base.parameters():
        parameter.data.mul_(4)  # sharper outputs, so that draws disagree about tokens
    return noisy(base, ["q_proj", "v_proj"] if family == "llama" else ["c_attn"], method, **settings)


def by_hand(model: nn.Module, prompt: Tensor, steps: int) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens of one prompt without padding or cache, and the log-probabilities they were taken from."""
    ids, log_p = prompt.tolist(), []
    for _ in range(steps):
        log_p.append(model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1))
        ids.append(int(log_p[-1].argmax()))
        if ids[-1] == 3:
            break
    return ids[len(prompt) :], log_p


@torch.no_grad()
@pytest.mark.parametrize("method", ["melora", "blob"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_sequence_is_what_the_merged_draw_generates_by_hand(family: str, use_cache: bool, method: str) -> None:
    model = causal(family, method)
    found = generate(model, PROMPTS, MASK, samples=SAMPLES, seed=SEED, max_new_tokens=NEW, use_cache=use_cache)
    merged = [merged_draw(model, SEED, draw) for draw in range(SAMPLES)]
    seen = set()
    for draw in range(SAMPLES):
        for row in range(2):
            prompt = PROMPTS[row][MASK[row].bool()]
            tokens, log_p = by_hand(merged[draw], prompt, NEW)
            valid = found.mask[draw, row]
            assert found.tokens[draw, row][valid].tolist() == tokens
            entropy = torch.stack([torch.special.entr(each.exp()).sum() for each in log_p])
            torch.testing.assert_close(found.token_entropy[draw, row][valid], entropy, rtol=1e-3, atol=1e-4)
            total = sum(each[token] for each, token in zip(log_p, tokens, strict=True))
            torch.testing.assert_close(found.log_probability[draw, row], total, rtol=1e-3, atol=1e-4)
            check_mixture(found, merged, prompt, tokens, draw, row)
            seen.add((row, *tokens))
    assert len(seen) > 2  # draws do disagree


def check_mixture(
    found: Generation, merged: list[nn.Module], prompt: Tensor, tokens: list[int], draw: int, row: int
) -> None:
    """The sequence scored under every merged draw, one full pass each."""
    assert found.predictive_entropy is not None and found.mutual_information is not None
    assert found.mixture_log_probability is not None and found.log_probability_std is not None
    ids = torch.cat([prompt, torch.tensor(tokens)])[None, :-1]
    log_p = torch.stack([m(input_ids=ids).logits[0, len(prompt) - 1 :].log_softmax(-1) for m in merged])
    p, valid = log_p.exp(), found.mask[draw, row]
    total = torch.special.entr(p.mean(0)).sum(-1)
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(found.predictive_entropy[draw, row][valid], total, **close)
    information = total - torch.special.entr(p).sum(-1).mean(0)
    torch.testing.assert_close(found.mutual_information[draw, row][valid], information, **close)
    chosen = log_p[:, torch.arange(len(tokens)), tokens].sum(-1)
    torch.testing.assert_close(found.mixture_log_probability[draw, row], chosen.exp().mean().log(), **close)
    torch.testing.assert_close(found.log_probability_std[draw, row], chosen.std(correction=0), **close)


@torch.no_grad()
def test_the_answer_of_the_mean_is_scored_by_every_draw() -> None:
    model = causal("llama")
    found = generate(model, PROMPTS, MASK, samples=SAMPLES, seed=SEED, answers="mean", max_new_tokens=NEW)
    merged = [merged_draw(model, SEED, draw) for draw in range(SAMPLES)]
    assert found.sequences.shape[:2] == (1, 2) and found.draw_log_probabilities is not None
    assert found.draw_log_probabilities.shape == (SAMPLES, 1, 2)
    for row in range(2):
        prompt = PROMPTS[row][MASK[row].bool()]
        tokens, log_p = by_hand(model, prompt, NEW)
        assert found.tokens[0, row][found.mask[0, row]].tolist() == tokens
        entropy = torch.stack([torch.special.entr(each.exp()).sum() for each in log_p])
        torch.testing.assert_close(found.token_entropy[0, row][found.mask[0, row]], entropy, rtol=1e-3, atol=1e-4)
        total = sum(each[token] for each, token in zip(log_p, tokens, strict=True))
        torch.testing.assert_close(found.log_probability[0, row], total, rtol=1e-3, atol=1e-4)
        check_mixture(found, merged, prompt, tokens, 0, row)
        ids = torch.cat([prompt, torch.tensor(tokens)])[None, :-1]
        for draw, each in enumerate(merged):
            each_p = each(input_ids=ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
            chosen = each_p[torch.arange(len(tokens)), tokens].sum()
            torch.testing.assert_close(found.draw_log_probabilities[draw, 0, row], chosen, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_saved_posterior_draws_all_of_its_weights() -> None:
    model = get_peft_model(build_tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {name: name.replace(".default", "") for name in trained}
    deviations = {names[name]: torch.full_like(p, 0.5) for name, p in trained.items()}
    posterior = WeightPosterior(model, [(names[n], p.numel()) for n, p in trained.items()], deviations)
    found = generate(posterior, PROMPTS, MASK, samples=2, seed=SEED, max_new_tokens=NEW)
    for draw in range(2):
        with posterior.sampled(SEED, draw):
            alone = generate(model, PROMPTS, MASK, samples=0, max_new_tokens=NEW)
        width = alone.tokens.shape[2]
        assert torch.equal(found.tokens[draw, :, :width][alone.mask[0]], alone.tokens[0][alone.mask[0]])
        torch.testing.assert_close(found.log_probability[draw], alone.log_probability[0], rtol=1e-4, atol=1e-4)
    assert not torch.equal(found.log_probability[0], found.log_probability[1])
    with pytest.raises(
        BayesLoraError, match="TemperatureScaling was given, but text is generated under draws of one model"
    ):
        generate(TemperatureScaling(model), PROMPTS, samples=2)


@torch.no_grad()
def test_beams_stay_with_their_draw() -> None:
    model = causal("llama")
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}
    found = generate(model, PROMPTS, MASK, samples=SAMPLES, seed=SEED, **options)
    assert found.sequences.shape[:2] == (SAMPLES, 4)
    for draw in range(SAMPLES):
        alone = merged_draw(model, SEED, draw).generate(input_ids=PROMPTS, attention_mask=MASK, **options)
        length = alone.shape[1]
        assert torch.equal(found.sequences[draw, :, :length], alone)
        assert not found.mask[draw, :, length - PROMPTS.shape[1] :].any()


def test_the_seed_decides_the_draws_and_the_sampled_tokens() -> None:
    model = causal("llama")
    options: dict[str, Any] = {"samples": 2, "max_new_tokens": NEW, "do_sample": True, "uncertainty": False}
    first = generate(model, PROMPTS, MASK, seed=1, **options)
    state = torch.get_rng_state()
    again = generate(model, PROMPTS, MASK, seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.sequences, again.sequences) and torch.equal(first.token_entropy, again.token_entropy)
    assert not torch.equal(first.sequences, generate(model, PROMPTS, MASK, seed=2, **options).sequences)
    assert first.mutual_information is None and first.mixture_log_probability is None


@torch.no_grad()
@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "sliding"])
def test_a_prompt_with_several_answers_is_read_once(
    family: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "sliding":
        torch.manual_seed(0)
        model = noisy(MistralForCausalLM(MistralConfig(**TINY, sliding_window=3)), ["q_proj", "v_proj"])
    else:
        model = causal(family)
    options: dict[str, Any] = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": NEW}
    options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": 3, "pad_token_id": 0}
    read: list[int] = []
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda _module, _args, output: read.append(output[..., 0].numel()))
    tokens, mask = generate_tokens(model, PROMPTS, MASK, samples=samples, seed=SEED, **options)
    handle.remove()
    draws, length = max(1, samples), PROMPTS.shape[1]
    assert read[:2] == [draws * 2 * (length - 1), draws * 2 * 4]
    found = generate(model, PROMPTS, MASK, samples=samples, seed=SEED, uncertainty=False, **options)
    assert torch.equal(found.tokens, tokens) and torch.equal(found.mask, mask)
    monkeypatch.setattr(_Run, "_read_prompts", lambda *_: None)
    apart, _ = generate_tokens(model, PROMPTS, MASK, samples=samples, seed=SEED, **options)
    assert torch.equal(apart, tokens) and tokens.shape[:2] == (draws, 8)


def test_answers_are_scored_without_the_logits_of_their_prompts() -> None:
    model = causal("llama")
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    widths: list[int] = []
    handle = head.register_forward_hook(lambda _module, _args, output: widths.append(output.shape[1]))
    found = generate(model, PROMPTS, MASK, samples=SAMPLES, seed=SEED, max_new_tokens=NEW)
    handle.remove()
    assert max(widths) == found.tokens.shape[-1] and 1 in widths


def test_without_samples_the_mean_weights_generate_once() -> None:
    model = causal("llama").train()
    found = generate(model, PROMPTS, MASK, samples=0, max_new_tokens=NEW)
    assert model.training
    alone = model.eval().generate(input_ids=PROMPTS, attention_mask=MASK, max_new_tokens=NEW)
    assert torch.equal(found.sequences[0], alone)
    assert found.mutual_information is not None and found.mutual_information.abs().max() == 0
    torch.testing.assert_close(found.mixture_log_probability, found.log_probability)


@torch.no_grad()
def test_an_encoder_decoder_encodes_and_decodes_under_the_same_draw() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 60}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=3))
    base.generation_config.decoder_start_token_id = 0
    for parameter in base.parameters():
        parameter.data.mul_(2)
    model = noisy(base.eval(), ["q", "v"])
    ids, mask = PROMPTS.flip(1), MASK.flip(1)
    for beams in (1, 2):
        found = generate(model, ids, mask, samples=SAMPLES, seed=SEED, max_new_tokens=NEW, num_beams=beams)
        for draw in range(SAMPLES):
            merged = merged_draw(model, SEED, draw)
            alone = merged.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, num_beams=beams)
            assert torch.equal(found.sequences[draw, :, : alone.shape[1]], alone)
            log_p = merged(input_ids=ids, attention_mask=mask, decoder_input_ids=alone[:, :-1]).logits.log_softmax(-1)
            valid = found.mask[draw, :, : alone.shape[1] - 1]
            chosen = log_p.gather(-1, alone[:, 1:, None])[..., 0] * valid
            torch.testing.assert_close(found.log_probability[draw], chosen.sum(-1), rtol=1e-3, atol=1e-4)


def test_sequences_scored_in_pieces_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal("llama")
    whole = generate(model, PROMPTS, MASK, samples=SAMPLES, max_new_tokens=NEW)
    monkeypatch.setattr(sys.modules["bayeslora.prediction.generate"], "_MAX_NUMBERS", 1)
    pieces = generate(model, PROMPTS, MASK, samples=SAMPLES, max_new_tokens=NEW)
    for name in ("token_entropy", "mutual_information", "mixture_log_probability", "log_probability_std"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), rtol=1e-4, atol=1e-4)


def test_what_cannot_work_is_refused() -> None:
    deterministic = get_peft_model(build_tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(BayesLoraError, match="LORA.* is deterministic"):
        generate(deterministic, PROMPTS, samples=2)
    model = causal("llama")
    with pytest.raises(BayesLoraError, match=r"shape \(5,\), but must be \(prompts, tokens\)"):
        generate(model, PROMPTS[0], samples=2)
    with pytest.raises(BayesLoraError, match="answers is 'best', but must be"):
        generate(model, PROMPTS, samples=2, answers="best")
    with pytest.raises(BayesLoraError, match="return_dict_in_generate is True"):
        generate(model, PROMPTS, samples=2, return_dict_in_generate=True)
