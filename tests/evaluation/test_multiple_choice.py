"""Prompts, letters and class logits of multiple choice, with causal models and encoders."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from bayeslora.data.few_shot import examples_for
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.multiple_choice import (
    ChoicePrompt,
    LetterLogits,
    choice_scoring,
    encode_pairs,
    encode_prompts,
    letter_ids,
)
from bayeslora.evaluation.prefix_sharing import LEAST_ROWS, rows_that_begin_alike
from tests.conftest import VOCABULARY, build_tiny_gpt2, build_tiny_llama, build_tiny_tokenizer
from tests.evaluation.choice_items import items, split

ROW = {"question": "who sat?", "choices": ["cat", "dog", "tree"], "label": 1}


@pytest.fixture(scope="module")
def causal_tokenizer() -> PreTrainedTokenizerFast:
    return build_tiny_tokenizer(causal=True)


def build_tiny_bert_for_choices() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=128, pad_token_id=0,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return BertForMultipleChoice(config).eval()


def test_a_prompt_is_the_question_its_lettered_choices_and_the_answer_line() -> None:
    assert ChoicePrompt().render(ROW) == "Question: who sat?\nA. cat\nB. dog\nC. tree\nAnswer:"
    example = {"question": "", "choices": ["red", "blue"], "label": 0}
    assert ChoicePrompt().render({**ROW, "subject": "high_school_biology"}, [example]) == (
        "The following are multiple choice questions about high school biology.\n\n"
        "A. red\nB. blue\nAnswer: A\n\n"
        "Question: who sat?\nA. cat\nB. dog\nC. tree\nAnswer:"
    )
    own = ChoicePrompt(question="{question}", choice="({letter}) {choice}", answer="The answer is")
    assert own.render(ROW) == "who sat?\n(A) cat\n(B) dog\n(C) tree\nThe answer is"
    # Braces in a row are text, not fields of a template.
    assert "{x}" in ChoicePrompt().render({**ROW, "question": "{x}"})
    with pytest.raises(BayesLoraError, match="must not end in white space"):
        ChoicePrompt(answer="Answer: ")


def test_examples_are_the_first_rows_that_are_not_the_item_itself() -> None:
    pool = split(6)
    shown = examples_for(list(pool), pool, 3)
    rows = list(pool)
    assert shown[5] == rows[:3]
    assert shown[0] == rows[1:4] and shown[2] == [rows[0], rows[1], rows[3]]
    seeded = examples_for(rows, pool, 3, seed=1)
    assert seeded == examples_for(rows, pool, 3, seed=1) != shown
    assert all(row not in examples for row, examples in zip(rows, seeded, strict=True))
    assert examples_for(rows, None, 0) == [[]] * 6
    with pytest.raises(BayesLoraError, match="few_shot is 7, but the pool has only 6 rows"):
        examples_for(rows, pool, 7)
    with pytest.warns(UserWarning, match="6 of 6 rows get fewer than 6 examples"):
        assert examples_for(rows, pool, 6)[1] == [rows[0], *rows[2:]]
    with pytest.warns(UserWarning, match="1 of 1 rows get fewer than 3 examples"):
        twice = Dataset.from_list([rows[0], rows[0], rows[1]])
        assert examples_for([{**ROW, "question": "another"}], twice, 3) == [rows[:2]]
    with pytest.raises(BayesLoraError, match="a pool without answers"):
        examples_for(rows, pool.remove_columns("label"), 1)
    with pytest.raises(BayesLoraError, match="few_shot is -1"):
        examples_for(rows, pool, -1)


def test_the_twin_of_an_item_is_no_example_for_it() -> None:
    rows = [{**row, "group": str(index // 2)} for index, row in enumerate(items(6))]
    shown = examples_for(rows, Dataset.from_list(rows), 2)
    assert shown[0] == shown[1] == [rows[2], rows[4]]
    assert shown[5] == [rows[0], rows[2]]


def test_examples_have_the_items_subject() -> None:
    rows = [{**row, "subject": ("law", "art")[index % 2]} for index, row in enumerate(items(8))]
    shown = examples_for(rows[:2], Dataset.from_list(rows), 2)
    assert shown == [[rows[2], rows[4]], [rows[3], rows[5]]]
    with pytest.raises(BayesLoraError, match="only 4 rows of the subject 'law'"):
        examples_for(rows[:1], Dataset.from_list(rows), 5)


def test_long_prompts_lose_examples_from_the_front_and_say_so_once(causal_tokenizer: Any) -> None:
    rows, pool = split(4, seed=1), split(20, seed=2)
    options: dict[str, Any] = {"classes": 5, "pool": pool, "few_shot": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = encode_prompts(rows, causal_tokenizer, max_length=500, **options)
    longest = max(len(ids) for ids in full["input_ids"])
    alone = encode_prompts(rows, causal_tokenizer, classes=5)
    with pytest.warns(
        UserWarning, match=rf"\d of 4 prompts lost few-shot examples, to fit in {longest - 20} tokens"
    ) as w:
        cut = encode_prompts(rows, causal_tokenizer, max_length=longest - 20, **options)
    assert len(w) == 1
    for short, whole, bare in zip(cut["input_ids"], full["input_ids"], alone["input_ids"], strict=True):
        assert len(bare) <= len(short) <= longest - 20
        assert short == whole[len(whole) - len(short) :]  # the end of the prompt stands
        assert short[-len(bare) :] == bare
    assert min(len(s) / len(f) for s, f in zip(cut["input_ids"], full["input_ids"], strict=True)) < 1
    with pytest.raises(BayesLoraError, match="and questions are not cut: raise max_length to at least"):
        encode_prompts(rows, causal_tokenizer, classes=5, max_length=5)


def test_a_prompt_ends_with_its_last_word_even_if_the_tokenizer_ends_texts(tiny_tokenizer: Any) -> None:
    ids = encode_prompts(Dataset.from_list([ROW]), tiny_tokenizer, classes=3)["input_ids"][0]
    assert ids[0] == tiny_tokenizer.cls_token_id and tiny_tokenizer.sep_token_id not in ids
    assert tiny_tokenizer.convert_ids_to_tokens(ids)[-2:] == ["answer", "[UNK]"]


def test_letters_are_tokens_of_their_own(causal_tokenizer: Any) -> None:
    words = causal_tokenizer.convert_ids_to_tokens(letter_ids(causal_tokenizer, 5))
    assert words == list("abcde")
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "answer": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    with pytest.raises(BayesLoraError, match='does not write " B" after "Answer:" as one separate token'):
        letter_ids(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]"), 2)


@pytest.mark.parametrize("build", [build_tiny_llama, build_tiny_gpt2])
def test_letter_logits_are_the_models_next_token_logits(build: Any, causal_tokenizer: Any) -> None:
    model, rows = build(), split(6)
    data = encode_prompts(rows, causal_tokenizer, classes=5)
    scoring = choice_scoring(data, causal_tokenizer)
    logits = scoring.logits(model, scoring.collate(list(data)))
    assert logits.shape == (6, 5) and logits.dtype == torch.float32
    letters = letter_ids(causal_tokenizer, 5)
    for row, item, found in zip(data, rows, logits, strict=True):
        alone = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, -1, letters]
        there = len(item["choices"])
        torch.testing.assert_close(found[:there], alone[:there], atol=1e-5, rtol=0)
        assert torch.isneginf(found[there:]).all() and row["choice_mask"] == [1] * there + [0] * (5 - there)


@pytest.mark.parametrize("build", [build_tiny_llama, build_tiny_gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_either_side_changes_neither_logits_nor_gradients(
    build: Any, attention: str, causal_tokenizer: Any
) -> None:
    model = build(attn_implementation=attention)
    data = encode_prompts(split(6), causal_tokenizer, classes=5)
    scoring = choice_scoring(data, causal_tokenizer)
    left = scoring.collate(list(data))
    assert (left["attention_mask"][:, 0] == 0).any() and (left["attention_mask"][:, -1] == 1).all()
    right = dict(left)
    lengths = left["attention_mask"].sum(dim=1)
    for name in ("input_ids", "attention_mask"):
        right[name] = torch.stack(
            [torch.roll(row, int(n)) for row, n in zip(left[name], lengths - left[name].shape[1], strict=True)]
        )
    assert (right["attention_mask"][:, 0] == 1).all()
    gradients = []
    for batch in (left, right):
        model.zero_grad()
        logits = scoring.logits(model, batch)
        nn.functional.cross_entropy(logits, batch["labels"]).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(scoring.logits(model, left), scoring.logits(model, right), atol=1e-5, rtol=0)
    assert all(torch.isfinite(g).all() for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_only_the_last_positions_reach_the_language_models_head(causal_tokenizer: Any) -> None:
    model = build_tiny_llama()
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    data = encode_prompts(split(6), causal_tokenizer, classes=5)
    scoring = choice_scoring(data, causal_tokenizer)
    scoring.logits(model, scoring.collate(list(data)))
    assert seen == [(6, 1, model.config.vocab_size)]


def test_rows_repeated_for_samples_give_repeated_logits(causal_tokenizer: Any) -> None:
    model = build_tiny_llama()
    data = encode_prompts(split(3), causal_tokenizer, classes=5)
    scoring = choice_scoring(data, causal_tokenizer)
    batch = scoring.collate(list(data))
    folded = {name: value.repeat(4, *[1] * (value.ndim - 1)) for name, value in batch.items()}
    assert all(isinstance(value, torch.Tensor) for value in batch.values())
    expected = scoring.logits(model, batch).repeat(4, 1)
    torch.testing.assert_close(scoring.logits(model, folded), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("build", [build_tiny_llama, build_tiny_gpt2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_common_beginning_is_read_once(build: Any, side: str, causal_tokenizer: Any) -> None:
    model, rows = build(), split(6)
    data = encode_prompts(rows, causal_tokenizer, classes=5, few_shot=2, pool=split(8).select([6, 7]))
    scoring = choice_scoring(data, causal_tokenizer)
    batch = scoring.collate(list(data))
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths.unique().numel() > 1
    if side == "right":
        shifts = (lengths - lengths.max()).tolist()
        for name in ("input_ids", "attention_mask"):
            moved = [torch.roll(row, shift) for row, shift in zip(batch[name], shifts, strict=True)]
            batch[name] = torch.stack(moved)
    read: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    expected = scoring.logits(model, batch)
    shared = LetterLogits(tuple(letter_ids(causal_tokenizer, 5)), share_prefix=True)(model, batch)
    torch.testing.assert_close(shared, expected, atol=1e-5, rtol=0)
    assert len(read) == 3 and sum(read[1:]) < read[0] / 2


def test_layers_with_a_window_read_every_prompt_in_full(causal_tokenizer: Any) -> None:
    config = MistralConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, sliding_window=8, max_position_embeddings=128,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    data = encode_prompts(split(6), causal_tokenizer, classes=5, few_shot=2, pool=split(8).select([6, 7]))
    scoring = choice_scoring(data, causal_tokenizer)
    batch = scoring.collate(list(data))
    shared = LetterLogits(tuple(letter_ids(causal_tokenizer, 5)), share_prefix=True)(model, batch)
    torch.testing.assert_close(shared, scoring.logits(model, batch), atol=1e-6, rtol=0)


def test_prompts_that_begin_alike_are_grouped() -> None:
    shared, other = list(range(100, 110)), list(range(200, 220))
    rows = [[*(shared if index % 2 else other), index] for index in range(20)] + [[1, 2], [1, 2, *shared, *other]]
    odd, even, rest = sorted(rows_that_begin_alike(rows), key=lambda group: group[0] % 2 == 0)
    assert sorted(odd) == list(range(1, 20, 2)) and sorted(even) == list(range(0, 20, 2)) and sorted(rest) == [20, 21]
    assert rows_that_begin_alike([[1, 2, 3]] * (LEAST_ROWS - 1))[0] == list(range(LEAST_ROWS - 1))
    assert rows_that_begin_alike([]) == [[]]


def test_an_encoder_scores_each_pair_and_ignores_absent_choices(tiny_tokenizer: Any) -> None:
    model, rows = build_tiny_bert_for_choices(), split(5)
    data = encode_pairs(rows, tiny_tokenizer, classes=5)
    scoring = choice_scoring(data, tiny_tokenizer)
    batch = scoring.collate(list(data))
    assert batch["input_ids"].shape[:2] == (5, 5) and batch["attention_mask"].shape == batch["input_ids"].shape
    logits = scoring.logits(model, batch)
    for item, found in zip(rows, logits, strict=True):
        there = len(item["choices"])
        assert torch.isneginf(found[there:]).all()
        for choice, logit in zip(item["choices"], found[:there], strict=True):
            alone = tiny_tokenizer(item["question"], choice, return_tensors="pt")
            expected = model(**{name: value[None] for name, value in alone.items()}).logits[0, 0]
            torch.testing.assert_close(logit, expected, atol=1e-5, rtol=0)
    nn.functional.cross_entropy(logits, batch["labels"]).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_of_a_long_pair_the_longer_text_is_cut(tiny_tokenizer: Any) -> None:
    rows = Dataset.from_list([{"question": "good " * 50, "choices": ["cat", "red dog"], "label": 0}])
    data = encode_pairs(rows, tiny_tokenizer, classes=2, max_length=12)
    for ids, choice in zip(data["input_ids"][0], ["cat", "red dog"], strict=True):
        assert len(ids) == 12
        assert tiny_tokenizer.decode(ids).endswith(f"[SEP] {choice} [SEP]")
    with pytest.raises(BayesLoraError, match="max_length is 4, but must be at least 5 for a pair of texts"):
        encode_pairs(rows, tiny_tokenizer, classes=2, max_length=4)


def test_items_without_answers_are_encoded_and_scored(causal_tokenizer: Any, tiny_tokenizer: Any) -> None:
    rows = split(3).remove_columns("label")
    for data in (encode_prompts(rows, causal_tokenizer, classes=5), encode_pairs(rows, tiny_tokenizer, classes=5)):
        assert "label" not in data.column_names
    batch = choice_scoring(data, tiny_tokenizer).collate(list(data))
    assert "labels" not in batch


def test_what_cannot_be_scored_is_refused(causal_tokenizer: Any) -> None:
    rows = split(4)
    with pytest.raises(BayesLoraError, match="classes is 2 and an item has [345] choices"):
        encode_prompts(rows, causal_tokenizer, classes=2)
    with pytest.raises(BayesLoraError, match="classes is 6"):
        encode_prompts(rows, causal_tokenizer, classes=6)
    data = encode_prompts(rows, causal_tokenizer, classes=5)
    scoring = choice_scoring(data, causal_tokenizer)
    with pytest.raises(BayesLoraError, match="train with remove_unused_columns=False"):
        scoring.collate(list(data.remove_columns("choice_mask")))
    with pytest.raises(BayesLoraError, match="but must have encoded multiple-choice items"):
        choice_scoring(rows, causal_tokenizer)
    with pytest.raises(BayesLoraError, match="the batch has 5 choices, but 4 letters"):
        LetterLogits((1, 2, 3, 4))(build_tiny_llama(), scoring.collate(list(data)))
    bare = build_tiny_tokenizer(causal=True)
    bare.pad_token = None
    with pytest.raises(BayesLoraError, match="lacks a padding token"):
        choice_scoring(data, bare)


def test_scorers_look_through_wrappers(causal_tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    data = encode_prompts(split(3), causal_tokenizer, classes=5)
    scoring = choice_scoring(data, causal_tokenizer)
    batch = scoring.collate(list(data))
    expected = scoring.logits(build_tiny_llama(), batch)
    adapted = get_peft_model(build_tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    torch.testing.assert_close(scoring.logits(adapted, batch), expected)

    class Wrapped(nn.Module):  # as distributed wrappers are
        def __init__(self) -> None:
            super().__init__()
            self.module = adapted

        def forward(self, **inputs: Any) -> Any:
            seen.append(set(inputs))
            return self.module(**inputs)

    seen: list[set[str]] = []
    torch.testing.assert_close(scoring.logits(Wrapped(), batch), expected)
    assert "logits_to_keep" in seen[0]
