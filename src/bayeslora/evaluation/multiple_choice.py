r"""Multiple choice: prompts and few-shot examples, and class logits of shape (n, C) from either kind of model.

A **causal language model** reads the question and its lettered choices and is asked for the next token. The class
logits of an item with choices $1, \dots, m$ are the logits of the tokens " A", " B", … at the last position of its
prompt, and those of absent choices are $-\infty$:

$$ p(y = k \mid x) = \frac{\exp z_{t_k}}{\sum_{j \le m} \exp z_{t_j}}. $$

An **encoder** with a one-logit head (`AutoModelForMultipleChoice`) scores each pair of question and choice; the same
softmax runs over the scores of an item's choices.

    task = load_task("arc_easy", "data")
    data = encode_prompts(task.splits["validation"], tokenizer, classes=len(task.labels))
    scoring = choice_scoring(data, tokenizer)
    prediction = bayeslora.predict(model, DataLoader(data, 16, collate_fn=scoring.collate), logits=scoring.logits)

Fine-tuning minimises the cross entropy of these same restricted probabilities (`ChoiceTrainer`), not that of the whole
vocabulary: what is trained is what is scored, and no example is spent on teaching that the answer is a letter.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from bayeslora.data.choices import CHOICES, LABEL, LETTERS, QUESTION, SUBJECT
from bayeslora.data.encode import Collate
from bayeslora.data.few_shot import Row, examples_for
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.prefix_sharing import cache_of, split_at_common_start

PRESENT = "choice_mask"
"""Column and batch key: (C,) or (B, C), which of the C choices an item has."""
CACHE = "past_key_values"
DEFAULT_PROMPT_LENGTH = 2048
DEFAULT_PAIR_LENGTH = 128

Batch = Mapping[str, Tensor]
ClassLogits = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class ChoicePrompt:
    """The form of an item as text, in parts that are `str.format` templates.

    Attributes:
        question: of `question`; left out where the question is empty.
        choice: a line a choice, of `letter` and `choice`.
        answer: the last line. The answer's letter follows it after one space, so it must not end in white space.
        subject: the first paragraph for items with a subject, of `subject`.
    """

    question: str = "Question: {question}"
    choice: str = "{letter}. {choice}"
    answer: str = "Answer:"
    subject: str = "The following are multiple choice questions about {subject}."

    def __post_init__(self) -> None:
        if not self.answer or self.answer[-1].isspace():
            raise BayesLoraError(
                f"the prompt's last line is {self.answer!r}, but must not end in white space: "
                "the space before the letter belongs to the letter's token"
            )

    def item(self, row: Row) -> str:
        """Return one item as text, without its answer."""
        lines = [self.question.format(question=row[QUESTION])] if row[QUESTION] else []
        lines += [
            self.choice.format(letter=letter, choice=choice)
            for letter, choice in zip(LETTERS, row[CHOICES], strict=False)
        ]
        return "\n".join([*lines, self.answer])

    def render(self, row: Row, examples: Iterable[Row] = ()) -> str:
        """Return the whole prompt: the subject's paragraph, the examples with their answers, the item."""
        parts = [self.subject.format(subject=row[SUBJECT].replace("_", " "))] if row.get(SUBJECT) else []
        parts += [f"{self.item(example)} {LETTERS[example[LABEL]]}" for example in examples]
        return "\n\n".join([*parts, self.item(row)])


def encode_prompts(
    split: Dataset,
    tokenizer: Any,
    *,
    classes: int,
    max_length: int = DEFAULT_PROMPT_LENGTH,
    prompt: ChoicePrompt | None = None,
    few_shot: int = 0,
    pool: Dataset | None = None,
    seed: int | None = None,
) -> Dataset:
    """Encode prompts for a language model: `input_ids`, `attention_mask`, `choice_mask` and, where known, `label`.

    Few-shot examples are the first `few_shot` rows of `pool` (of the item's subject, where items have one), in the
    file's order or in one drawn with `seed`. An item is never an example of itself, so `pool` may be the training
    split that is encoded.

    Args:
        split: rows with `question` and `choices`, and maybe `label` and `subject`.
        tokenizer: of the model.
        classes: C, at least the number of choices of any row.
        max_length: tokens of a prompt. Of a longer one examples are dropped from the front, with one warning for all.
        prompt: the form of an item.
        few_shot: examples before each item.
        pool: where examples come from; needed when there are any.
        seed: None takes the file's order.

    Raises:
        BayesLoraError: an item that is longer than `max_length` without any example (questions are never cut), more
            choices than `classes`, or too few rows in `pool`.
    """
    form = prompt or ChoicePrompt()
    rows = list(split)
    _check_classes(rows, classes)
    examples = examples_for(rows, pool, few_shot, seed)
    texts = [form.render(row, shown) for row, shown in zip(rows, examples, strict=True)]
    ids = _tokenize(texts, tokenizer)
    shortened = 0
    for index, row in enumerate(rows):
        shown = examples[index]
        shortened += len(ids[index]) > max_length
        while len(ids[index]) > max_length:
            if not shown:
                raise BayesLoraError(
                    f"question {index + 1} ({row[QUESTION][:40]!r}…) has {len(ids[index])} tokens, max_length is "
                    f"{max_length}: questions are not cut, raise max_length to at least {len(ids[index])}"
                )
            shown = shown[1:]
            ids[index] = _tokenize([form.render(row, shown)], tokenizer)[0]
    if shortened:
        warnings.warn(
            f"{shortened} of {len(rows)} prompts lost few-shot examples to fit in {max_length} tokens: "
            "raise max_length to keep them all",
            stacklevel=2,
        )
    columns: dict[str, list[Any]] = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    return _with_labels(columns, split, rows, classes)


def encode_pairs(split: Dataset, tokenizer: Any, *, classes: int, max_length: int = DEFAULT_PAIR_LENGTH) -> Dataset:
    """Encode pairs (question, choice) for an encoder: C lists a row in each tokenizer output, and `choice_mask`.

    An absent choice is a copy of the first one, which `choice_mask` takes out: a row of nothing but padding would have
    no token to attend to. Of a pair that is too long, the longer text is cut.

    Raises:
        BayesLoraError: more choices than `classes`, or a `max_length` that holds no pair.
    """
    rows = list(split)
    _check_classes(rows, classes)
    least = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if max_length < least:
        raise BayesLoraError(f"max_length is {max_length}, a pair of texts needs at least {least}")
    padded = [list(row[CHOICES]) + row[CHOICES][:1] * (classes - len(row[CHOICES])) for row in rows]
    questions = [row[QUESTION] for row in rows for _ in range(classes)]
    choices = [choice for options in padded for choice in options]
    encoded = tokenizer(questions, choices, truncation=True, max_length=max_length)
    columns = {
        name: [values[start : start + classes] for start in range(0, len(values), classes)]
        for name, values in encoded.items()
    }
    return _with_labels(columns, split, rows, classes)


def letter_ids(tokenizer: Any, classes: int) -> list[int]:
    """Return the token ids of " A", " B", … after the colon of "Answer:", one a class.

    Raises:
        BayesLoraError: a tokenizer that does not write each letter as a separate token.
    """
    start = list(tokenizer("Answer:", add_special_tokens=False)["input_ids"])
    found = []
    for letter in LETTERS[:classes]:
        ids = list(tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"])
        if ids[: len(start)] != start or len(ids) != len(start) + 1 or ids[-1] in found:
            raise BayesLoraError(
                f'the tokenizer does not write " {letter}" after "Answer:" as one separate token, which scoring '
                "by letters needs: use a model with another tokenizer"
            )
        found.append(int(ids[-1]))
    return found


@dataclass(frozen=True)
class LetterLogits:
    """Class logits of a causal language model: `LetterLogits(letter_ids)(model, batch)` is (B, C) in float32.

    Rows may be padded on either side. Positions count from a row's first token, so that padding changes nothing for
    models with absolute positions, and logits are computed for the last positions only where the model can leave the
    others out (`logits_to_keep`).

    Args:
        letter_ids: of the C letters, from the function of that name.
        share_prefix: run the tokens that all rows of a batch begin with only once (where they are at least half of the
            longest row and the model has a cache). Only for models that are deterministic: for samples of the weights
            each pass would be another one.
    """

    letter_ids: tuple[int, ...]
    share_prefix: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """`batch` holds `input_ids` and `attention_mask` (B, T), and `choice_mask` (B, C); other keys are ignored."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        present = batch[PRESENT].bool()
        if present.shape[1] != len(self.letter_ids):
            raise BayesLoraError(f"the batch has {present.shape[1]} choices, but {len(self.letter_ids)} letters")
        accepted = _forward_names(model)
        inputs = self._after_shared_start(model, ids, mask, accepted) if self.share_prefix else None
        if inputs is None:
            inputs = {"input_ids": ids, "attention_mask": mask}
            if "use_cache" in accepted:
                inputs["use_cache"] = False
        mask, width = inputs["attention_mask"], inputs["input_ids"].shape[1]
        if "position_ids" in accepted:
            inputs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
        last = (mask[:, -width:] * torch.arange(width, device=mask.device)).argmax(dim=1)
        column = last
        if "logits_to_keep" in accepted:
            kept = last.unique()
            inputs["logits_to_keep"] = kept
            column = torch.searchsorted(kept, last)
        logits = model(**inputs).logits
        rows = torch.arange(len(last), device=logits.device)
        letters = torch.tensor(self.letter_ids, device=logits.device)
        chosen = logits[rows, column.to(logits.device)].index_select(-1, letters).float()
        return chosen.masked_fill(~present.to(logits.device), -torch.inf)

    @staticmethod
    def _after_shared_start(
        model: nn.Module, ids: Tensor, mask: Tensor, accepted: frozenset[str]
    ) -> dict[str, Any] | None:
        """The model's inputs after what all rows begin with, which is read here; None where nothing can be shared."""
        parts = split_at_common_start(ids, mask) if {"use_cache", CACHE} <= accepted else None
        if parts is None:
            return None
        start, rest, kept = parts
        cache = cache_of(model, start, len(rest), **({"logits_to_keep": 1} if "logits_to_keep" in accepted else {}))
        if cache is None:
            return None
        whole = torch.cat([kept.new_ones(len(kept), len(start)), kept], dim=1)
        return {"input_ids": rest, "attention_mask": whole, CACHE: cache, "use_cache": True}


class PairLogits:
    """Class logits of an encoder with a one-logit head: `PairLogits()(model, batch)` is (B, C) in float32."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """`batch` holds (B, C, T) inputs and `choice_mask` (B, C); labels are ignored."""
        present = batch[PRESENT].bool()
        inputs = {name: value for name, value in batch.items() if name not in (PRESENT, LABEL, "labels")}
        logits = model(**inputs).logits.float()
        return logits.masked_fill(~present.to(logits.device), -torch.inf)


@dataclass(frozen=True)
class PromptCollator:
    """Pads encoded prompts on the left, so that every prompt ends at the last position."""

    tokenizer: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: `input_ids`, `attention_mask` (B, T), `choice_mask` (B, C) and, where known, `labels` (B,)."""
        length = max(len(row["input_ids"]) for row in rows)
        pad = _pad_id(self.tokenizer)
        ids = [[pad] * (length - len(row["input_ids"])) + list(row["input_ids"]) for row in rows]
        mask = [[0] * (length - len(row["input_ids"])) + [1] * len(row["input_ids"]) for row in rows]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **_targets(rows)}


@dataclass(frozen=True)
class PairCollator:
    """Pads the pairs of all items of a batch to one length."""

    tokenizer: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch: (B, C, T) inputs, `choice_mask` (B, C) and, where known, `labels` (B,)."""
        targets = _targets(rows)
        batch, classes = targets[PRESENT].shape
        names = [name for name in rows[0] if name in self.tokenizer.model_input_names]
        flat = {name: [values for row in rows for values in row[name]] for name in names}
        padded = self.tokenizer.pad(flat, return_tensors="pt")
        return {**{name: value.view(batch, classes, -1) for name, value in padded.items()}, **targets}


@dataclass(frozen=True)
class ChoiceScoring:
    """Two functions to run a model over encoded items: `collate` rows into a batch, and `logits(model, batch)`."""

    collate: Collate
    logits: ClassLogits


def is_multiple_choice(dataset: Dataset) -> bool:
    """Return True for a data set that `encode_prompts` or `encode_pairs` made."""
    return PRESENT in dataset.column_names


def choice_scoring(dataset: Dataset, tokenizer: Any) -> ChoiceScoring:
    """Choose how to score an encoded data set: letters for prompts, pairs for pairs.

    Raises:
        BayesLoraError: a data set of another kind, or a tokenizer without letters of one token or without padding.
    """
    if not is_multiple_choice(dataset) or not len(dataset):
        raise BayesLoraError(
            f"the data set has {len(dataset)} rows and the columns {', '.join(dataset.column_names)}, encoded "
            "multiple-choice items are needed: use encode_prompts or encode_pairs"
        )
    first = dataset[0]
    if isinstance(first["input_ids"][0], list):
        return ChoiceScoring(PairCollator(tokenizer), PairLogits())
    _pad_id(tokenizer)
    return ChoiceScoring(PromptCollator(tokenizer), LetterLogits(tuple(letter_ids(tokenizer, len(first[PRESENT])))))


def row_lengths(dataset: Dataset) -> list[int]:
    """Return the number of tokens of each encoded row; for a row of pairs, that of its longest pair."""
    return [max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids) for ids in dataset["input_ids"]]


def _check_classes(rows: Sequence[Row], classes: int) -> None:
    most = max((len(row[CHOICES]) for row in rows), default=0)
    if not 2 <= classes <= len(LETTERS) or most > classes:
        raise BayesLoraError(
            f"classes is {classes} and an item has {most} choices: at least as many classes as choices are needed, "
            f"and 2 to {len(LETTERS)}"
        )


def _tokenize(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Tokenize without the special tokens at the end of a text, where the answer comes next."""
    encoded = tokenizer(texts, return_special_tokens_mask=True)
    result = []
    for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        end = len(ids)
        while end and special[end - 1]:
            end -= 1
        result.append(list(ids[:end]))
    return result


def _with_labels(columns: dict[str, list[Any]], split: Dataset, rows: Sequence[Row], classes: int) -> Dataset:
    columns[PRESENT] = [[1] * len(row[CHOICES]) + [0] * (classes - len(row[CHOICES])) for row in rows]
    if LABEL in split.column_names:
        columns[LABEL] = [row[LABEL] for row in rows]
    return Dataset.from_dict(columns)


def _targets(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    if PRESENT not in rows[0]:
        raise BayesLoraError(
            f"the rows lack column {PRESENT!r} (they have {', '.join(rows[0])}), so absent choices are unknown: "
            "encode with encode_prompts or encode_pairs, and train with remove_unused_columns=False"
        )
    found = {PRESENT: torch.tensor([row[PRESENT] for row in rows])}
    if LABEL in rows[0]:
        found["labels"] = torch.tensor([row[LABEL] for row in rows])
    return found


def _pad_id(tokenizer: Any) -> int:
    if tokenizer.pad_token_id is None:
        raise BayesLoraError(
            "the tokenizer lacks a padding token, which batches of texts need: "
            "set tokenizer.pad_token (its eos_token is the usual choice)"
        )
    return int(tokenizer.pad_token_id)


def _forward_names(model: nn.Module) -> frozenset[str]:
    """Return the arguments that the innermost model's forward takes; wrappers only declare `**kwargs`."""
    inner: Any = model
    while isinstance(inner, PeftModel) or isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.get_base_model() if isinstance(inner, PeftModel) else inner.module
    return frozenset(inspect.signature(inner.forward).parameters)
