"""Prompts and completions to fine-tune a language model on, with the loss over the completion only."""

from __future__ import annotations

from typing import Any

from bayeslora.errors import BayesLoraError, counted

IGNORED = -100
"""Label of a token that the loss ignores."""


def prompt_masked(prompt: str, completion: str, tokenizer: Any, max_length: int | None = None) -> dict[str, list[int]]:
    """Return a prompt and its completion as one sequence, labelled so that only the completion is learned.

    Prompt and completion are tokenized separately and then joined, so that the prompt has the same tokens here as in
    `generate`. A completion that begins a new word should begin with a space. The end-of-text token follows the
    completion and is learned with it, so that the model learns to stop.

    To pad batches, labels included, use `transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)`.
    TRL's `SFTTrainer` accepts these rows unchanged and packs them with `packing=True`.

    Args:
        prompt: text to complete; may be empty.
        completion: text to learn.
        tokenizer: the model's tokenizer.
        max_length: maximum length of the sequence in tokens. A longer prompt is cut at its beginning (the text nearest
            to the completion matters most), but keeps the tokens that open every text. The completion is never cut.

    Returns:
        `input_ids`, `attention_mask` and `labels`, of equal length; `labels` is -100 over the prompt.

    Raises:
        BayesLoraError: the completion is empty, or longer than `max_length` by itself.
    """
    written = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if not written:
        raise BayesLoraError("the completion is empty, but at least one token is needed to learn from: drop the row")
    if tokenizer.eos_token_id is not None:
        written.append(int(tokenizer.eos_token_id))
    given = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    start = opening(tokenizer)
    if max_length is not None:
        room = max_length - len(start) - len(written)
        if room < 0:
            raise BayesLoraError(
                f"the completion {completion[:40]!r} needs {counted(len(start) + len(written), 'token')}, but "
                f"max_length is {max_length} and completions are not cut: raise max_length or drop the row"
            )
        given = given[len(given) - min(room, len(given)) :]
    ids = [*start, *given, *written]
    masked = len(ids) - len(written)
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * masked + written}


def opening(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before every text, such as a beginning-of-text token."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    opening: list[int] = []
    for token, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        if not special:
            break
        opening.append(int(token))
    return opening
