"""Multiple choice by cloze: tokens at the boundary, likelihoods, and that a row's choices share one draw."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

import bayeslora
from bayeslora.data import Cloze
from bayeslora.data.choices import fill_gap
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation import ClozeLogits, choice_scoring, encode_choices, encode_cloze, predict_dataset
from bayeslora.evaluation.cloze import can_share_context
from bayeslora.evaluation.items import targets
from bayeslora.methods.melora import MeLoraModel
from bayeslora.methods.tuner import TrainingSetup, tuner_of
from bayeslora.prediction.batched_sampling import repeat_rows
from bayeslora.runs.rows import asked
from tests.conftest import VOCABULARY, build_tiny_gpt2, build_tiny_llama, build_tiny_tokenizer
from tests.evaluation.choice_items import split
from tests.evaluation.test_choice_trainer import make_trainer
from tests.oracles import cloze as oracle

CONTEXT = "Question: {question}\nAnswer:"


def worded(count: int, seed: int = 0, most: int = 5) -> Dataset:
    """Items whose choices are texts of one to six words."""
    generator = random.Random(seed)
    words = "good bad fine dull warm cold".split()

    def longer(choice: str) -> str:
        return " ".join([choice, *generator.choices(words, k=generator.randint(0, 5))])

    rows = [{**row, "choices": [longer(choice) for choice in row["choices"]]} for row in split(count, seed, most)]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tiny_tokenizer(causal=True)


def batch_of(data: Dataset, tokenizer: Any) -> dict[str, torch.Tensor]:
    return choice_scoring(data, tokenizer).collate(list(data))


def adapted(config: Any = None) -> Any:
    torch.manual_seed(0)
    default = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(build_tiny_llama(), config or default)


def melora(**options: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM", "prior_std": 1.0}
    model = adapted(bayeslora.MeLoraConfig(**{**settings, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "melora_B" in name:
                parameter.normal_(std=0.5)
    return model


@pytest.mark.parametrize("build", [build_tiny_llama, build_tiny_gpt2])
@pytest.mark.parametrize("normalization", ["none", "tokens", "bytes"])
def test_logits_are_those_of_each_choice_alone(build: Any, normalization: Any, tokenizer: Any) -> None:
    model, rows = build(), worded(9, seed=1).select([0, 1, 2, 4])
    assert {len(row["choices"]) for row in rows} == {2, 3, 4, 5}
    data = encode_cloze(rows, tokenizer, classes=5, cloze=Cloze(CONTEXT, normalization))
    batch = batch_of(data, tokenizer)
    assert can_share_context(model, 100)
    for share in (True, False):
        logits = ClozeLogits(share)(model, batch)
        assert logits.shape == (4, 5) and logits.dtype == torch.float32
        for row, found in zip(rows, logits, strict=True):
            there = len(row["choices"])
            context = CONTEXT.format(question=row["question"])
            expected = oracle.scores(model, tokenizer, context, row["choices"], normalization)
            torch.testing.assert_close(found[:there], torch.tensor(expected), atol=1e-5, rtol=0)
            assert torch.isneginf(found[there:]).all()


def test_examples_and_a_subject_come_before_the_question(tokenizer: Any) -> None:
    rows = Dataset.from_list([{**row, "subject": "moral_law"} for row in worded(6)])
    data = encode_cloze(rows.select([3]), tokenizer, classes=5, few_shot=2, pool=rows)
    shown = [f"Question: {row['question']}\nAnswer: {row['choices'][row['label']]}" for row in rows.select([0, 1])]
    whole = ["The following are questions about moral law.", *shown, CONTEXT.format(question=rows[3]["question"])]
    assert data[0]["input_ids"] == tokenizer("\n\n".join(whole))["input_ids"]
    longest = len(data[0]["input_ids"]) + max(map(len, data[0]["choice_ids"]))
    with pytest.warns(UserWarning, match="1 of 1 prompts lost few-shot examples"):
        cut = encode_cloze(rows.select([3]), tokenizer, classes=5, few_shot=2, pool=rows, max_length=longest - 1)
    assert len(cut[0]["input_ids"]) < len(data[0]["input_ids"])
    with pytest.raises(BayesLoraError, match="has 2[0-9] tokens, but max_length is 6 and questions are not cut"):
        encode_cloze(rows.select([3]), tokenizer, classes=5, max_length=6)


def bytes_tokenizer(merges: list[tuple[str, str]], bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that merges over the whole text: Ġ is a space."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    joined = ["".join(pair) for pair in merges]
    vocabulary = {word: place for place, word in enumerate(["<s>", "</s>", *alphabet, *joined])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("bos", [True, False])
def test_context_and_choice_are_the_tokens_of_running_text(bos: bool) -> None:
    """A merge across the boundary (":Ġ") belongs to the choices, and all of an item's begin with it."""
    tokenizer = bytes_tokenizer([("Ġ", "t"), (":", "Ġ"), ("a", "t")], bos)
    row = {"question": "who", "choices": ["tat", "bat", "at"], "label": 0}
    item = encode_cloze(Dataset.from_list([row]), tokenizer, classes=3)[0]
    for choice, ids in zip(row["choices"], item["choice_ids"], strict=True):
        whole = [*item["input_ids"], *ids]
        expected = tokenizer(f"Question: who\nAnswer: {choice}")["input_ids"]
        assert whole == (expected[:-1] if bos else expected)
        assert whole.count(0) == bos
        # " t" merges first, so that the first choice begins after the colon, the others with it.
        assert tokenizer.decode(ids) == f": {choice}"
    assert item["choice_scored"] == list(map(len, item["choice_ids"]))
    assert tokenizer.decode(item["input_ids"]).removeprefix("<s>") == "Question: who\nAnswer"


def test_without_a_context_the_first_token_follows_the_one_that_opens_texts() -> None:
    row = {"question": "", "choices": ["tat", "bat"], "label": 0}
    for bos in (True, False):
        data = encode_cloze(Dataset.from_list([row]), bytes_tokenizer([], bos), classes=2, cloze=Cloze("{question}"))
        assert data[0]["input_ids"] == [0]
        assert data[0]["choice_scored"] == [3, 3]


def test_a_sentence_with_a_gap_is_scored_by_its_common_ending(tokenizer: Any) -> None:
    before, choices = fill_gap("the cat sat with the dog because the _ was cold .", ["cat", "red dog"])
    row = {"question": before, "choices": choices, "label": 0, "ending": " was cold ."}
    data = encode_cloze(Dataset.from_list([row]), tokenizer, classes=2, cloze=Cloze("{question}"))
    assert data[0]["choice_scored"] == [3, 3]
    expected = oracle.scores(build_tiny_llama(), tokenizer, before, choices, "none", " was cold .")
    assert expected[0] != expected[1]
    for share in (True, False):
        logits = ClozeLogits(share)(build_tiny_llama(), batch_of(data, tokenizer))
        torch.testing.assert_close(logits[0], torch.tensor(expected), atol=1e-5, rtol=0)


def test_gradients_do_not_depend_on_sharing_the_context(tokenizer: Any) -> None:
    data = encode_cloze(worded(5), tokenizer, classes=5)
    batch = batch_of(data, tokenizer)
    gradients = []
    for share in (True, False):
        model = build_tiny_llama()
        nn.functional.cross_entropy(ClozeLogits(share)(model, batch), batch["labels"]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_the_context_is_read_once_and_only_the_choices_reach_the_language_models_head(tokenizer: Any) -> None:
    model = build_tiny_llama()
    data = encode_cloze(worded(4), tokenizer, classes=5)
    rows, read = [], []
    model.get_input_embeddings().register_forward_hook(lambda module, given, out: read.append(given[0].shape))
    model.lm_head.register_forward_hook(lambda module, given, out: rows.append(out.shape[:2]))
    batch = batch_of(data, tokenizer)
    ClozeLogits()(model, batch)
    contexts = max(map(len, data["input_ids"]))
    choices = max(sum(map(len, ids)) for ids in data["choice_ids"])
    assert read == [(4, contexts + choices)] and rows == [(4, choices + 1)]


def windowed() -> nn.Module:
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48, sliding_window=4, max_position_embeddings=128,
        )
    )  # fmt: skip


def recurrent() -> nn.Module:
    return MambaForCausalLM(MambaConfig(vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=1))


def alibi() -> nn.Module:
    return BloomForCausalLM(BloomConfig(vocab_size=len(VOCABULARY), hidden_size=32, n_layer=1, n_head=4))


@pytest.mark.parametrize("build", [windowed, recurrent, alibi])
def test_models_that_cannot_share_a_context_read_copies(build: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model, rows = build().eval(), worded(4)
    data = encode_cloze(rows, tokenizer, classes=5)
    logits = ClozeLogits()(model, batch_of(data, tokenizer))
    for row, found in zip(rows, logits, strict=True):
        context = CONTEXT.format(question=row["question"])
        expected = oracle.scores(model, tokenizer, context, row["choices"], "none")
        torch.testing.assert_close(found[: len(expected)], torch.tensor(expected), atol=2e-5, rtol=0)


def test_an_adapter_that_counts_rows_is_not_trained_on_copies(tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = bayeslora.MeLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(windowed(), config)
    batch = batch_of(encode_cloze(worded(4), tokenizer, classes=5), tokenizer)
    assert torch.isfinite(ClozeLogits()(model.eval(), batch)[:, :2]).all()
    with pytest.raises(BayesLoraError, match="MistralForCausalLM has to read each choice as a row of its own"):
        ClozeLogits()(model.train(), batch)


@pytest.mark.parametrize("variance", ["closed_form", "learned"])
def test_the_choices_of_a_row_see_one_draw_in_training(variance: str, tokenizer: Any) -> None:
    """A choice that is there twice has one score, though rows that are alike differ; a row is one term of the loss."""
    choices = ["cat good", "dog", "cat good"]
    rows = Dataset.from_list([{"question": "who sat", "choices": choices, "label": 0}] * 4)
    batch = batch_of(encode_cloze(rows, tokenizer, classes=3), tokenizer)
    model = melora(variance=variance).train()
    logits = ClozeLogits()(model, batch)
    torch.testing.assert_close(logits[:, 0], logits[:, 2], atol=1e-5, rtol=0)
    assert (logits[1:] - logits[0]).abs().amin() > 1e-3
    if variance == "closed_form":
        tuner = tuner_of(model)
        assert isinstance(tuner, MeLoraModel)
        tuner.begin(TrainingSetup(total_steps=1, num_examples=4))
        tuner.step_begin(0, 0)
        ClozeLogits()(model, batch)
        assert float(tuner.run_state().terms.sum()) == len(rows)


def test_each_sample_is_one_set_of_weights(tokenizer: Any) -> None:
    model = melora().eval()
    data = encode_cloze(worded(5), tokenizer, classes=5)
    found = predict_dataset(model, data, tokenizer, batch_size=3, samples=4, seed=7)
    expected = []
    batch = batch_of(data, tokenizer)
    with torch.no_grad():
        for draw in range(4):
            with bayeslora.sampling(model, "batch", 7, [draw]):
                expected.append(ClozeLogits(share_context=False)(model, batch).double().softmax(-1))
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    torch.testing.assert_close(found.probabilities, torch.stack(expected).mean(0), atol=1e-5, rtol=0)
    assert (found.mutual_information > 0).all()


def test_rows_repeated_for_samples_give_repeated_logits(tokenizer: Any) -> None:
    model, batch = build_tiny_llama(), batch_of(encode_cloze(worded(3), tokenizer, classes=5), tokenizer)
    expected = ClozeLogits()(model, batch).repeat(4, 1)
    torch.testing.assert_close(ClozeLogits()(model, repeat_rows(batch, 3, 4)), expected, atol=1e-5, rtol=0)


def test_micro_batches_give_the_step_of_one_batch(tokenizer: Any, tmp_path: Path) -> None:
    data = encode_cloze(worded(16), tokenizer, classes=5)
    weights = []
    for size, count in ((8, 1), (2, 4)):
        model = adapted()
        trainer = make_trainer(
            model, data, tokenizer, tmp_path, max_steps=2, per_device_train_batch_size=size, max_grad_norm=0.1,
            gradient_accumulation_steps=count, optim="sgd", learning_rate=1.0, gradient_checkpointing=count == 4,
        )  # fmt: skip
        bayeslora.attach(trainer, num_examples=len(data)).train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert any(value.abs().max() > 0 for name, value in weights[0].items() if "lora_B" in name)
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=1e-4)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("blora", "blob", "dylora", "bayes_adalora")]


@pytest.mark.parametrize("method", ["lora", "melora", *SLOW])
def test_a_model_learns_to_prefer_the_right_text(method: str, tokenizer: Any, tmp_path: Path) -> None:
    data = encode_cloze(worded(16, most=3), tokenizer, classes=3)
    options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "o_proj"], "task_type": "CAUSAL_LM"}
    ranks = {"init_r": 8, "target_r": 4, "importance": "sensitivity"}
    options |= ranks if method == "bayes_adalora" else {"r": 8}
    configs = {"lora": LoraConfig, **bayeslora.METHODS}
    model = adapted(configs[method](**options))
    steps = 12 if method in ("lora", "melora") else 40
    trainer = make_trainer(
        model, data, tokenizer, tmp_path, max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-2
    )
    bayeslora.attach(trainer, num_examples=10_000)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.05


def test_a_temperature_is_fitted_on_scores_by_cloze(tokenizer: Any) -> None:
    data = encode_cloze(worded(24, most=3), tokenizer, classes=3)
    scoring = choice_scoring(data, tokenizer)
    model = adapted()
    wanted = bayeslora.predict(model, batch_of(data, tokenizer), logits=scoring.logits).labels
    labels = torch.where(torch.arange(24) % 3 == 0, (wanted + 1) % 2, wanted)
    data = data.remove_columns("label").add_column("label", labels.tolist())
    loader: Any = DataLoader(data, 8, collate_fn=scoring.collate)  # type: ignore[arg-type]
    scaled = bayeslora.TemperatureScaling(model).fit(loader, logits=scoring.logits)
    found = bayeslora.predict(scaled, loader, logits=scoring.logits)
    present = targets(list(data))["choice_mask"].bool()
    assert (found.probabilities[~present] == 0).all()
    torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(24, dtype=torch.float64))


def test_a_task_says_how_it_is_encoded(tokenizer: Any) -> None:
    task = bayeslora.data.Task(
        "made", "multiple_choice", ("question", "choices"), "label", list("ABCDE"), "accuracy", {}, scoring="cloze",
        cloze=Cloze("{question}", "tokens"),
    )  # fmt: skip
    data = encode_choices(worded(4), task, tokenizer)
    for lengths, scored, present in zip(
        data["choice_length"], data["choice_scored"], data["choice_mask"], strict=True
    ):
        there = sum(present)
        assert lengths[:there] == scored[:there] and min(scored[:there]) > 0
    assert "choice_ids" not in encode_choices(worded(4), asked(task, "letters", None), tokenizer).column_names


def test_what_cannot_be_scored_is_refused(tokenizer: Any) -> None:
    row = {"question": "who", "choices": ["cat", " "], "label": 0}
    with pytest.raises(BayesLoraError, match="choice 2 of the question 'who'… has no tokens"):
        encode_cloze(Dataset.from_list([row]), tokenizer, classes=2)
    with pytest.raises(BayesLoraError, match="classes is 2 and an item has"):
        encode_cloze(worded(4), tokenizer, classes=2)
    with pytest.raises(BayesLoraError, match="must not end in white space"):
        Cloze("Answer: ")
    with pytest.raises(BayesLoraError, match="normalization is 'letters', but must be none, tokens, bytes"):
        Cloze(normalization="letters")  # type: ignore[arg-type]
