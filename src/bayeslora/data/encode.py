"""Tokenize a task's rows, and pad them into batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.fingerprint import generate_random_fingerprint
from torch import Tensor

from bayeslora.data.tasks import LABEL, Task
from bayeslora.errors import BayesLoraError, counted

DEFAULT_MAX_LENGTH = 128
CHARACTERS = 64
"""Characters a token, from which on a text is looked at for a part that is enough."""
MOST_CHARACTERS = 2**20
"""Characters that are looked at; what a longer text has beyond them is left out."""
_LONGEST_WORD = 1000
"""Characters of what is still taken for a word. A longer one may be cut."""

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


def encode(task: Task, tokenizer: Any, max_length: int | None = None) -> dict[str, Dataset]:
    """Tokenize every split of a task with `encode_texts`; the labels go to the column `label`."""
    return {name: encode_texts(split, task.text_columns, tokenizer, max_length) for name, split in task.splits.items()}


def encode_texts(
    dataset: Dataset, text_columns: Sequence[str], tokenizer: Any, max_length: int | None = None
) -> Dataset:
    """Tokenize texts or pairs into the tokenizer's outputs, without padding, and keep `label` if there is one.

    Args:
        dataset: data set with the text columns; all other columns except the label are dropped.
        text_columns: one name, or two for pairs; the longer text of a pair is cut first.
        tokenizer: the model's tokenizer.
        max_length: maximum length of an example in tokens; by default 128, or the model's maximum if that is less.

    Raises:
        BayesLoraError: `max_length` leaves no room for text, or exceeds the model's maximum.
    """
    length = allowed_length(tokenizer, max_length, pair=len(text_columns) == 2)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [batch[name] for name in text_columns]
        least = 2 * CHARACTERS * length if len(texts) == 1 else MOST_CHARACTERS  # a pair is cut by both lengths
        texts = [[_enough(t, tokenizer, length) if len(t) > least else t for t in column] for column in texts]
        encoded = tokenizer(*texts, truncation=True, max_length=length)
        return _never_empty(dict(encoded), tokenizer)

    dropped = [column for column in dataset.column_names if column != LABEL]
    # In memory, so that nothing is written to the user's cache.
    return dataset.map(
        tokenize, batched=True, remove_columns=dropped, keep_in_memory=True, load_from_cache_file=False,
        new_fingerprint=generate_random_fingerprint(), desc="Tokenizing",
    )  # fmt: skip


def collated(
    dataset: Dataset, order: np.ndarray, tokenizer: Any, batch_size: int, collate: Collate | None
) -> Iterator[dict[str, Any]]:
    """Yield padded batches of an encoded split's inputs, in this order; `collate` is that of multiple choice."""
    pad_id(tokenizer)
    inputs = [name for name in dataset.column_names if name in tokenizer.model_input_names or collate]
    data = dataset.select_columns(inputs)
    for start in range(0, len(order), batch_size):
        columns = data[order[start : start + batch_size].tolist()]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        yield dict(collate(rows) if collate else right_padded(tokenizer, rows))


def right_padded(tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    """Return a batch of rows, padded on the right whatever side the tokenizer pads.

    Padding on the left moves the positions that many models count from the first token on, so that the answer to a row
    would depend on the longest row of its batch.
    """
    from transformers import DataCollatorWithPadding

    side, tokenizer.padding_side = tokenizer.padding_side, "right"
    try:
        return DataCollatorWithPadding(tokenizer)(rows)
    finally:
        tokenizer.padding_side = side


def pad_id(tokenizer: Any) -> int:
    """Return the id of the padding token; raise `BayesLoraError` if the tokenizer lacks one."""
    if tokenizer.pad_token_id is None:
        raise BayesLoraError(
            "the tokenizer lacks a padding token, but batches of texts need one: "
            "set tokenizer.pad_token (its eos_token is the usual choice)"
        )
    return int(tokenizer.pad_token_id)


def _enough(text: str, tokenizer: Any, length: int) -> str:
    """Return the part of a very long text that has the `length` tokens which truncation keeps, or the text itself.

    Tokenizing megabytes takes minutes and gigabytes. The part ends at white space and has twice as many tokens as are
    kept, so that its end has no effect on them. One that has fewer, such as of blanks, is made longer.
    """
    keeps_end = tokenizer.truncation_side == "left"
    size = CHARACTERS * length
    while size < min(len(text), MOST_CHARACTERS):
        part = _whole_words(text[-size:] if keeps_end else text[:size], keeps_end)
        if len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) > 2 * length:
            return part
        size *= 2
    if len(text) <= MOST_CHARACTERS:
        return text
    warnings.warn(
        f"a text has {counted(len(text), 'character')}, of which {MOST_CHARACTERS:,} give too few tokens to fill a "
        "row: the others are left out",
        stacklevel=2,
    )
    return text[-MOST_CHARACTERS:] if keeps_end else text[:MOST_CHARACTERS]


def _whole_words(part: str, keeps_end: bool) -> str:
    """Return a part of a text without the word that it was cut in, unless that is too long for one."""
    words = part.split(maxsplit=1)[1:] if keeps_end else part.rsplit(maxsplit=1)[:-1]
    rest = words[0] if words else ""
    return rest if len(part) - len(rest) <= _LONGEST_WORD else part


def allowed_length(tokenizer: Any, max_length: int | None, pair: bool = False) -> int:
    """Return the maximum length of a row in tokens; raise `BayesLoraError` for one that the model does not allow."""
    # Tokenizers that do not know the model's limit have 1e30 here.
    limit = int(min(tokenizer.model_max_length, 10**9))
    length = min(limit, DEFAULT_MAX_LENGTH) if max_length is None else max_length
    least = tokenizer.num_special_tokens_to_add(pair=pair) + (2 if pair else 1)
    if not least <= length <= limit:
        raise BayesLoraError(
            f"max_length is {length}, but must be {least} to {limit} for this model and task: give another one"
        )
    return length


def _never_empty(encoded: dict[str, list[Any]], tokenizer: Any) -> dict[str, list[Any]]:
    """Give an empty text one token if the tokenizer adds none, because a model cannot run on zero tokens."""
    fillers = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0)
    filler = next(token for token in fillers if token is not None)
    values = {"input_ids": filler, "attention_mask": 1}
    for row, ids in enumerate(encoded["input_ids"]):
        if not ids:
            for name in encoded:
                encoded[name][row] = [values.get(name, 0)]
    return encoded
