"""Conversations and completions as tokens: what is learned, what is cut, and that a prompt reads as it was learned."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bayeslora.data import encode_generation, labelled_tokens, prompt_masked
from bayeslora.data.chat import answer_of, asked_of, end_tokens, prompt_tokens
from bayeslora.errors import BayesLoraError
from tests.conftest import build_tiny_llama, build_tiny_tokenizer

TURNS = [("user", "who sat ?"), ("assistant", "the cat"), ("user", "why ?"), ("assistant", "on the mat")]
# As many models: markers round each turn, and text after the end of an answer.
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}answer ! {{ m.content }} [MASK] ."
    "{% else %}question ! {{ m.content }} [MASK] .{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}answer !{% endif %}"
)


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def tokenizer_with(template: str | None) -> Any:
    tokenizer = build_tiny_tokenizer(causal=True)
    tokenizer.chat_template = template
    return tokenizer


def encoded(tokenizer: Any, turns: list[tuple[str, str]], max_length: int = 99) -> tuple[list[str], list[str]]:
    """The words of a conversation, and those of them that are learned."""
    row = encode_generation(Dataset.from_list([{"messages": messages(turns)}]), tokenizer, max_length)[0]
    assert row["attention_mask"] == [1] * len(row["input_ids"])
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    learned = [label for label in row["labels"] if label != -100]
    return tokenizer.convert_ids_to_tokens(row["input_ids"]), tokenizer.convert_ids_to_tokens(learned)


def test_every_answer_is_learned_with_the_token_that_ends_it_and_nothing_else() -> None:
    words, learned = encoded(tokenizer_with(MARKED), TURNS)
    whole = "[CLS] question ! who sat ? [MASK] . answer ! the cat [MASK] . "
    assert words == (whole + "question ! why ? [MASK] . answer ! on the mat [MASK] .").split()
    assert learned == "the cat [MASK] on the mat [MASK]".split()


def test_without_a_template_turns_are_named_and_answers_end_with_the_end_of_text() -> None:
    words, learned = encoded(tokenizer_with(None), [("system", "warm, honest"), *TURNS])
    named = "[UNK] [UNK]"  # a role and a colon, which the vocabulary lacks
    whole = f"{named} warm , honest {named} who sat ? {named} the cat [SEP] {named} why ? {named} on the mat [SEP]"
    assert words == whole.split()
    assert learned == "the cat [SEP] on the mat [SEP]".split()


def test_a_template_that_never_ends_answers_gets_an_end_for_the_last() -> None:
    endless = MARKED.replace(" [MASK] .", " ,")
    assert encoded(tokenizer_with(endless), TURNS)[1] == "the cat , on the mat , [SEP]".split()


def test_text_after_the_last_answer_is_left_out() -> None:
    words, learned = encoded(tokenizer_with(MARKED), [*TURNS, ("user", "how ?")])
    assert words == encoded(tokenizer_with(MARKED), TURNS)[0] and learned[-2] == "mat"


def test_an_answer_that_the_template_rewrites_is_left_out_with_a_warning() -> None:
    forgetful = MARKED.replace("answer ! {{ m.content }}", "answer ! {{ m.content if loop.last else 'very' }}")
    with pytest.warns(UserWarning, match="1 of the answers cannot be learned"):
        assert encoded(tokenizer_with(forgetful), TURNS)[1] == "on the mat [MASK]".split()
    # As Qwen 3: the thought before the last answer alone makes a conversation that ends earlier longer.
    thoughtful = MARKED.replace("answer ! {{ m.content }}", "answer ! {{ 'why why why ' * loop.last }}{{ m.content }}")
    with pytest.warns(UserWarning, match="1 of the answers cannot be learned"):
        assert encoded(tokenizer_with(thoughtful), TURNS)[1] == "why why why on the mat [MASK]".split()
    with pytest.warns(UserWarning, match="1 of the answers cannot be learned"):
        greeting = encoded(tokenizer_with(MARKED), [("assistant", "hello"), *TURNS])[1]
    assert greeting == "the cat [MASK] on the mat [MASK]".split()


def test_an_answer_is_learned_after_the_prefix_that_the_template_would_have_a_model_continue() -> None:
    """Some templates let the model begin with a thought, which finished turns do not have."""
    thinking = MARKED.replace("%}answer !{% endif", "%}answer ! why{% endif")
    assert encoded(tokenizer_with(thinking), TURNS)[1] == "the cat [MASK] on the mat [MASK]".split()


def test_what_a_template_refuses_is_told_with_the_row() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + MARKED
    with pytest.raises(BayesLoraError, match=r"row 1: the roles are system, user.*no system role"):
        encoded(tokenizer_with(strict), [("system", "be fine"), *TURNS])


@pytest.mark.parametrize("template", [MARKED, None], ids=["template", "plain"])
def test_a_prompt_has_the_tokens_that_it_had_in_training(template: str | None) -> None:
    tokenizer = tokenizer_with(template)
    for turns in (TURNS[:2], TURNS, [("system", "be warm"), *TURNS]):
        row = {"messages": messages(turns)}
        learned = encode_generation(Dataset.from_list([row]), tokenizer, 99)[0]
        start = len(learned["labels"]) - 1
        while learned["labels"][start] == -100:
            start -= 1
        while learned["labels"][start - 1] != -100:
            start -= 1
        assert prompt_tokens(row, tokenizer) == learned["input_ids"][:start]
        assert answer_of(row) == turns[-1][1] and asked_of(row["messages"]) == messages(turns[:-1])


def test_earlier_answers_of_a_prompt_are_tokenized_apart_as_in_training() -> None:
    """A token may span the boundary: here line breaks and the letter after them."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["x", "q!a", "q!", "a"])}, "x"))
    core.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    template = "{% for m in messages %}{{ m.content }}{{ '!' if m.role == 'user' else '|' }}{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, unk_token="x", eos_token="x")
    row = {"messages": messages([("user", "q"), ("assistant", "a"), ("user", "q"), ("assistant", "a")])}
    ids = encode_generation(Dataset.from_list([row]), tokenizer, 99)[0]["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["q!", "a", "q!", "a", "x"]
    assert prompt_tokens(row, tokenizer) == ids[:3]


def test_completions_are_those_of_prompt_masked_and_their_prompts_too(tiny_tokenizer: Any) -> None:
    row = {"prompt": "who sat ?", "completion": " the cat"}
    for tokenizer in (tokenizer_with(MARKED), tiny_tokenizer):
        assert encode_generation(Dataset.from_list([row]), tokenizer, 99)[0] == prompt_masked(*row.values(), tokenizer)
        ids = prompt_masked(*row.values(), tokenizer)["input_ids"]
        prompt = prompt_tokens(row, tokenizer)
        assert ids[: len(prompt)] == prompt and answer_of(row) == " the cat"


def test_an_empty_prompt_begins_with_a_token_that_the_answer_is_predicted_from() -> None:
    tokenizer = tokenizer_with(None)
    row = encode_generation(Dataset.from_list([{"prompt": "", "completion": "cat"}]), tokenizer, 9)[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["[CLS]", "cat", "[SEP]"]
    assert row["labels"] == [-100, *row["input_ids"][1:]]
    assert prompt_tokens({"prompt": ""}, tokenizer) == row["input_ids"][:1]


def test_no_row_is_longer_than_asked_for_and_none_is_without_an_answer() -> None:
    tokenizer = tokenizer_with(MARKED)
    whole = encode_generation(Dataset.from_list([{"messages": messages(TURNS)}]), tokenizer, 99)[0]
    for length in range(2, len(whole["input_ids"])):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            row = encode_generation(Dataset.from_list([{"messages": messages(TURNS)}]), tokenizer, length)[0]
        assert 2 <= len(row["input_ids"]) <= length
        assert row["labels"][0] == -100 and any(label != -100 for label in row["labels"])
        assert row["input_ids"][0] == whole["input_ids"][0], "what begins every text stays"
        text = tokenizer.convert_ids_to_tokens(row["input_ids"])
        if length >= 7:  # room for the answer, its end and a token before
            assert text[-4:] == ["on", "the", "mat", "[MASK]"], "the prompt is cut, not the answer"
        # What follows the last answer is cut without a word.
        assert len(told) == (length < len(whole["input_ids"]) - 1), [str(each.message) for each in told]


@pytest.mark.parametrize("long", ["prompt", "answer"])
@pytest.mark.parametrize("form", ["messages", "completion"])
def test_of_megabytes_the_part_that_is_kept_is_tokenized(
    long: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same tokens and the same warning as if all of it were."""
    question, answer = ("why ? " * 999 if long == "prompt" else "why ?"), ("mat " * 999 if long == "answer" else "mat")
    turns = messages([("user", question), ("assistant", answer)])
    row: dict[str, Any] = {"messages": turns} if form == "messages" else {"prompt": question, "completion": answer}
    tokenizer = tokenizer_with(MARKED)
    seen: list[int] = []

    def spied(text: str, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(text))
        return type(tokenizer).__call__(tokenizer, text, *args, **kwargs)

    class Spy:
        __call__ = staticmethod(spied)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    found, longest = [], []
    for most in (10**9, 1):
        monkeypatch.setattr("bayeslora.data.chat.MOST_CHARACTERS", most)
        with pytest.warns(UserWarning, match=r"1 of 1 rows .* 12 tokens") as told:
            found.append(encode_generation(Dataset.from_list([row]), Spy(), 12)[0])
        assert len(told) == 1
        longest.append(max(seen))
        seen.clear()
    assert found[0] == found[1]
    assert longest[0] > 3000 and longest[1] < 1000


def test_the_labelled_tokens_are_counted() -> None:
    rows = [{"messages": messages(TURNS)}, {"messages": messages(TURNS[:2])}]
    assert labelled_tokens(encode_generation(Dataset.from_list(rows), tokenizer_with(MARKED), 99)) == 7 + 3


def test_answers_end_where_the_text_or_the_template_ends_them() -> None:
    tokenizer = tokenizer_with(MARKED)
    assert tokenizer.convert_ids_to_tokens(end_tokens(tokenizer)) == ["[SEP]", "[MASK]"]
    assert tokenizer.convert_ids_to_tokens(end_tokens(tokenizer_with(None))) == ["[SEP]"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["messages", "completion"])
def test_ids_and_labels_are_those_that_trl_trains_on(form: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    # TRL learns what stands between these two marks, which other readers of the template skip.
    marked = MARKED.replace(
        "answer ! {{ m.content }} [MASK] .", "answer ! {% generation %}{{ m.content }} [MASK]{% endgeneration %} ."
    )
    tokenizer = tokenizer_with(marked)
    rows: list[dict[str, Any]] = [{"messages": messages(TURNS)}, {"messages": messages(TURNS[:2])}]
    if form == "completion":
        rows = [{"prompt": "who sat ?", "completion": " the cat"}, {"prompt": "why ?", "completion": " no"}]
    ours = encode_generation(Dataset.from_list(rows), tokenizer, 99)
    options = {"assistant_only_loss": True} if form == "messages" else {"completion_only_loss": True}
    arguments = trl.SFTConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True, max_length=99, **options)
    trainer = trl.SFTTrainer(
        build_tiny_llama(), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    for number, row in enumerate(ours):
        length = len(row["input_ids"])
        assert batch["input_ids"][number, :length].tolist() == row["input_ids"]
        assert batch["labels"][number, :length].tolist() == row["labels"]
        assert (batch["labels"][number, length:] == -100).all()
