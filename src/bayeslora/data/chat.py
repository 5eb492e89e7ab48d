"""Conversations, and prompts with completions, as tokens: the loss is over the answers only.

A conversation is written by the tokenizer's chat template, or without one as `User: …`, `Assistant: …`. Every turn of
the assistant is learned, with the token that ends it; all else is what comes before. Text before an answer and the
answer are tokenized apart, so that in training a prompt has the tokens that it has when the model is to answer.
"""

from __future__ import annotations

import itertools
import os.path
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError

from bayeslora.data.completions import IGNORED, opening, prompt_masked
from bayeslora.data.conversations import ASSISTANT
from bayeslora.data.encode import CHARACTERS, MOST_CHARACTERS
from bayeslora.errors import BayesLoraError, one_line
from bayeslora.vocabulary import COMPLETION, MESSAGES, PROMPT

Message = Mapping[str, str]
"""One turn of a conversation: its `role` and its `content`."""
LABELS = "labels"


@dataclass
class _Counts:
    """Rows that lost something, for one warning a split."""

    cut: int = 0
    unfinished: int = 0
    rewritten: int = 0

    def warn(self, rows: int, max_length: int) -> None:
        """Warn once of each loss."""
        found = {
            f"{self.cut} of {rows} rows are longer than {max_length} tokens and lost the beginning of their prompt: "
            "raise max_length to keep it": self.cut,
            f"{self.unfinished} of {rows} rows have an answer that is too long for {max_length} tokens and is cut at "
            "its end: raise max_length to keep it": self.unfinished,
            f"{self.rewritten} of the answers cannot be learned, because they begin a conversation or the chat "
            "template changes them when it goes on: give each a row that ends with it": self.rewritten,
        }
        for sentence, count in found.items():
            if count:
                warnings.warn(sentence, stacklevel=4)


def encode_generation(split: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    """Encode conversations or completions as `input_ids`, `attention_mask` and `labels`.

    Labels are -100 for tokens without a loss. A row that is too long loses the beginning of its prompt; an answer that
    is too long by itself loses its end. A warning counts the rows of each kind.

    Args:
        split: rows with `messages`, or with `prompt` and `completion`.
        tokenizer: the model's tokenizer.
        max_length: maximum length of a row in tokens, at least 2.

    Raises:
        BayesLoraError: the chat template refuses a row, or an answer has no tokens.
    """
    if max_length < 2:
        raise BayesLoraError(
            f"max_length is {max_length}, but must be at least 2, for a prompt and an answer: raise it"
        )
    counts = _Counts()
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], LABELS: []}
    most = max(MOST_CHARACTERS, CHARACTERS * max_length)
    for number, whole in enumerate(split, start=1):
        row = _shortened(whole, most)
        try:
            ids, labels = _conversation(row[MESSAGES], tokenizer, counts) if MESSAGES in row else _pair(row, tokenizer)
        except BayesLoraError as error:
            raise BayesLoraError(f"row {number}: {error}") from error
        counts.cut += row != whole and len(ids) <= max_length  # of longer ones the next line counts the loss
        ids, labels = _fitted(ids, labels, tokenizer, max_length, counts)
        columns["input_ids"].append(ids)
        columns["attention_mask"].append([1] * len(ids))
        columns[LABELS].append(labels)
    counts.warn(len(split), max_length)
    return Dataset.from_dict(columns)


def _shortened(row: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Return a row whose turns have at most `most` characters: of an answer the first ones, of all else the last.

    Tokenizing megabytes takes minutes and gigabytes, and `_fitted` would cut what is left out here.
    """
    if MESSAGES not in row:
        return {**row, PROMPT: row[PROMPT][-most:], COMPLETION: row[COMPLETION][:most]}
    turns = [
        {**turn, "content": turn["content"][:most] if turn["role"] == ASSISTANT else turn["content"][-most:]}
        for turn in row[MESSAGES]
    ]
    return {**row, MESSAGES: turns}


def labelled_tokens(data: Dataset) -> int:
    """Return the number of tokens over which the loss of an encoded split is averaged."""
    return sum(sum(label != IGNORED for label in row) for row in data[LABELS])


def prompt_tokens(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """Return the tokens to answer: a conversation up to the last turn that is not the assistant's, or a prompt.

    Raises:
        BayesLoraError: the chat template refuses the conversation.
    """
    if MESSAGES not in row:
        return [*opening(tokenizer), *_tokens(row[PROMPT], tokenizer)] or [_beginning(tokenizer)]
    messages = asked_of(row[MESSAGES])
    whole = _written(messages, tokenizer, for_answer=True)
    # Earlier answers are tokenized apart, as in training.
    cuts = [0, *(cut for span in _answers(messages, whole, tokenizer) if span for cut in span), len(whole)]
    parts = [whole[start:end] for start, end in itertools.pairwise(cuts)]
    return [token for number, part in enumerate(parts) for token in _tokens(part, tokenizer, begins=number == 0)]


def asked_of(messages: Sequence[Message]) -> list[Message]:
    """Return the conversation without the assistant's last turns."""
    end = len(messages)
    while end and messages[end - 1]["role"] == ASSISTANT:
        end -= 1
    return list(messages[:end])


def answer_of(row: Mapping[str, Any]) -> str | None:
    """Return the answer that a row holds already: its completion, or the assistant's turn at its end."""
    if MESSAGES not in row:
        return row.get(COMPLETION)
    given = row[MESSAGES][len(asked_of(row[MESSAGES])) :]
    return given[0]["content"] if given else None


def end_tokens(tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the end-of-text token, and the one that the chat template writes."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    messages = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"}]
    try:
        ids, labels = _conversation(messages, tokenizer, _Counts())
    except BayesLoraError:  # a template for other roles
        return found
    last = next(token for token in reversed(labels) if token != IGNORED)
    return found if last in found or last not in tokenizer.all_special_ids else [*found, last]


def _conversation(messages: Sequence[Message], tokenizer: Any, counts: _Counts) -> tuple[list[int], list[int]]:
    """Return tokens and labels of a conversation up to the end of its last answer."""
    ids: list[int] = []
    labels: list[int] = []
    for text, is_learned in _pieces(messages, tokenizer, counts):
        found = _tokens(text, tokenizer, begins=not ids)
        ids += found
        labels += _up_to_its_end(found, tokenizer) if is_learned else [IGNORED] * len(found)
    # A template that does not end answers would teach the model never to stop.
    if labels[-1] != IGNORED and labels[-1] not in tokenizer.all_special_ids and tokenizer.eos_token_id is not None:
        ids.append(int(tokenizer.eos_token_id))
        labels.append(int(tokenizer.eos_token_id))
    return ids, _first_given(labels)


def _pieces(messages: Sequence[Message], tokenizer: Any, counts: _Counts) -> list[tuple[str, bool]]:
    """Return a conversation's text up to its last answer in pieces, each with whether it is learned."""
    last = max(place for place, message in enumerate(messages) if message["role"] == ASSISTANT)
    whole = _written(messages[: last + 1], tokenizer)
    pieces: list[tuple[str, bool]] = []
    at = 0
    for span in _answers(messages[: last + 1], whole, tokenizer):
        if span is None:
            counts.rewritten += 1
            continue
        pieces += [(whole[at : span[0]], False), (whole[span[0] : span[1]], True)]
        at = span[1]
    if not pieces:
        raise BayesLoraError("no answer follows a message of someone else, but one is needed to learn: drop the row")
    return pieces


def _answers(messages: Sequence[Message], whole: str, tokenizer: Any) -> Iterator[tuple[int, int] | None]:
    """Yield the beginning and the end of each answer in the text `whole` of a conversation.

    None stands for one that begins the conversation, or that the template writes otherwise at its end.
    """
    at = 0
    for place, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = _written(messages[:place], tokenizer, for_answer=True) if place else ""
        until = _written(messages[: place + 1], tokenizer)
        start, end = len(os.path.commonprefix([before, whole])), len(until)
        is_there = place > 0 and start >= at and whole.startswith(until)
        if is_there and message["content"].strip() in whole[start:end]:
            yield start, end
            at = end
        else:
            yield None


def _written(messages: Sequence[Message], tokenizer: Any, *, for_answer: bool = False) -> str:
    """Return the text of a conversation; `for_answer` adds what comes before the assistant's next turn."""
    if not tokenizer.chat_template:
        end = tokenizer.eos_token or ""
        turns = [
            f"{message['role'].capitalize()}: {message['content']}{end if message['role'] == ASSISTANT else ''}"
            for message in messages
        ]
        return "\n\n".join([*turns, "Assistant:"] if for_answer else turns)
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=for_answer
        )
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise BayesLoraError(
            f"the roles are {roles}, but the model's chat template refuses them ({one_line(error)}): change the roles"
        ) from error
    return text


def _tokens(text: str, tokenizer: Any, *, begins: bool = False) -> list[int]:
    """Tokenize a part of a text; what `begins` a text without a template gets the tokens that open every text."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [*opening(tokenizer), *ids] if begins and not tokenizer.chat_template else ids


def _up_to_its_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Return the labels of an answer: all of it up to its last special token, if it ends with one."""
    special = set(tokenizer.all_special_ids)
    last = max((place for place, token in enumerate(ids) if token in special), default=len(ids) - 1)
    return ids[: last + 1] + [IGNORED] * (len(ids) - last - 1)


def _pair(row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    found = prompt_masked(row[PROMPT], row[COMPLETION], tokenizer)
    if len(found["input_ids"]) == len([label for label in found[LABELS] if label != IGNORED]):
        first = _beginning(tokenizer)  # from which the first token is predicted
        return [first, *found["input_ids"]], [IGNORED, *found[LABELS]]
    return found["input_ids"], found[LABELS]


def _beginning(tokenizer: Any) -> int:
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise BayesLoraError("the prompt is empty, but its answer is predicted from something: write a prompt")
    return int(first)


def _first_given(labels: list[int]) -> list[int]:
    """Return the labels without that of the first token, which nothing predicts."""
    return [IGNORED, *labels[1:]]


def _fitted(
    ids: list[int], labels: list[int], tokenizer: Any, max_length: int, counts: _Counts
) -> tuple[list[int], list[int]]:
    """Return a row that is not longer than `max_length`: cut at its beginning, or in its last answer."""
    if len(ids) <= max_length:
        return ids, labels
    if labels[-1] == IGNORED:  # what the template writes after an answer
        end = len(ids) - next(back for back, label in enumerate(reversed(labels)) if label != IGNORED)
        return _fitted(ids[:end], labels[:end], tokenizer, max_length, counts)
    start = len(ids) - next(back for back, label in enumerate(reversed(labels)) if label == IGNORED)
    head = [ids[0]] if ids[0] == tokenizer.bos_token_id else []
    if len(head) + len(ids) - start < max_length:
        counts.cut += 1
        kept = max_length - len(head)
        return head + ids[-kept:], _first_given([IGNORED] * len(head) + [IGNORED] + labels[-kept + 1 :])
    counts.unfinished += 1
    before = min(start - len(head), max(1, max_length // 2) - len(head)) if start > len(head) else 0
    first = start - before
    return (head + ids[first:])[:max_length], _first_given((([IGNORED] * len(head)) + labels[first:])[:max_length])
