r"""Multiple choice: prompts and few-shot examples, and class logits of shape (n, C) from either kind of model.

A **causal language model** reads the question and its lettered choices and predicts the next token. The class logits
of an item with choices $1, \dots, m$ are the logits of the tokens " A", " B", … at the last position of its prompt,
and those of absent choices are $-\infty$:

$$ p(y = k \mid x) = \frac{\exp z_{t_k}}{\sum_{j \le m} \exp z_{t_j}}. $$

Or it answers by cloze: the logits are the log-likelihoods of the choices' texts (`evaluation.cloze`).

An **encoder** with a one-logit head (`AutoModelForMultipleChoice`) scores each pair of question and choice; the same
softmax runs over the scores of an item's choices.

    task = load_task("arc_easy", "data")
    data = encode_prompts(task.splits["validation"], tokenizer, classes=len(task.labels))
    scoring = choice_scoring(data, tokenizer)
    prediction = bayeslora.predict(model, DataLoader(data, 16, collate_fn=scoring.collate), logits=scoring.logits)

Fine-tuning minimises the cross entropy of the same restricted probabilities (`ChoiceTrainer`), not that of the whole
vocabulary: what is trained is what is scored, and examples need not teach that the answer is a letter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from bayeslora.data.choices import CHOICES, LABEL, LETTERS, QUESTION, SUBJECT
from bayeslora.data.encode import Collate, pad_id
from bayeslora.data.few_shot import Row, examples_for, few_shot_pool
from bayeslora.data.tasks import Task
from bayeslora.errors import BayesLoraError, counted
from bayeslora.evaluation.cloze import CHOICE_IDS, ClozeCollator, ClozeLogits, encode_cloze, is_cloze
from bayeslora.evaluation.items import (
    DEFAULT_PROMPT_LENGTH,
    PRESENT,
    Batch,
    ClassLogits,
    check_classes,
    fitted,
    forward_names,
    targets,
    tokenize,
    trained_logits,
    with_labels,
)
from bayeslora.evaluation.prefix_sharing import cache_of, split_at_common_start

CACHE = "past_key_values"
DEFAULT_PAIR_LENGTH = 128


@dataclass(frozen=True)
class ChoicePrompt:
    """Prompt for a multiple-choice item, in parts that are `str.format` templates.

    Attributes:
        question: first line, a template with `question`; left out if the question is empty.
        choice: line of each choice, a template with `letter` and `choice`.
        answer: last line. It must not end in whitespace, because the answer's letter follows after one space.
        subject: first paragraph for items with a subject, a template with `subject`.
    """

    question: str = "Question: {question}"
    choice: str = "{letter}. {choice}"
    answer: str = "Answer:"
    subject: str = "The following are multiple choice questions about {subject}."

    def __post_init__(self) -> None:
        if not self.answer or self.answer[-1].isspace():
            raise BayesLoraError(
                f"the prompt's last line is {self.answer!r}, but must not end in white space: "
                "leave the space before the letter out, which belongs to the letter's token"
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
        """Return the whole prompt: the paragraph about the subject, the examples with their answers, and the item."""
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
    """Encode prompts for a language model: `input_ids`, `attention_mask`, `choice_mask` and, if known, `label`.

    Few-shot examples are the first `few_shot` rows of `pool` (with the item's subject, if it has one), in the order of
    the pool or in a random order drawn with `seed`. An item is never its own example, so `pool` may be the training
    split that is encoded.

    Args:
        split: rows with `question` and `choices`, and maybe `label` and `subject`.
        tokenizer: the model's tokenizer.
        classes: C, at least the number of choices of any row.
        max_length: maximum length in tokens. Longer prompts lose their first few-shot examples, with a single warning.
        prompt: templates of the prompt; None takes the defaults of `ChoicePrompt`.
        few_shot: number of examples before each item.
        pool: rows to take examples from; required if `few_shot` is above 0.
        seed: seed of the order of the examples; None keeps the pool's order.

    Raises:
        BayesLoraError: an item is longer than `max_length` without examples (questions are never cut), has more
            choices than `classes`, or `pool` has too few rows.
    """
    form = prompt or ChoicePrompt()
    rows = list(split)
    check_classes(rows, classes)
    ids = fitted(
        rows,
        examples_for(rows, pool, few_shot, seed),
        lambda pairs: tokenize([form.render(row, shown) for row, shown in pairs], tokenizer),
        len,
        max_length,
    )
    columns: dict[str, list[Any]] = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    return with_labels(columns, split, rows, classes)


def encode_pairs(split: Dataset, tokenizer: Any, *, classes: int, max_length: int = DEFAULT_PAIR_LENGTH) -> Dataset:
    """Encode pairs (question, choice) for an encoder: C lists per row in each tokenizer output, and `choice_mask`.

    An absent choice is filled with a copy of the first one, which `choice_mask` removes: a row of nothing but padding
    would have no token to attend to. If a pair is too long, its longer text is cut.

    Raises:
        BayesLoraError: a row has more choices than `classes`, or `max_length` leaves no room for a pair.
    """
    rows = list(split)
    check_classes(rows, classes)
    least = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if max_length < least:
        raise BayesLoraError(f"max_length is {max_length}, but must be at least {least} for a pair of texts: raise it")
    padded = [list(row[CHOICES]) + row[CHOICES][:1] * (classes - len(row[CHOICES])) for row in rows]
    questions = [row[QUESTION] for row in rows for _ in range(classes)]
    choices = [choice for options in padded for choice in options]
    encoded = tokenizer(questions, choices, truncation=True, max_length=max_length)
    columns = {
        name: [values[start : start + classes] for start in range(0, len(values), classes)]
        for name, values in encoded.items()
    }
    return with_labels(columns, split, rows, classes)


def encode_choices(
    split: Dataset, task: Task, tokenizer: Any, *, max_length: int = DEFAULT_PROMPT_LENGTH, few_shot: int = 0
) -> Dataset:
    """Encode rows for a language model, for answers by letters or by cloze, as `task.scoring` says.

    Args:
        split: rows with the columns of the task.
        task: task with the number of classes, and with the rows from which few-shot examples are taken.
        tokenizer: the model's tokenizer.
        max_length: maximum length in tokens of a prompt, or of a context with its longest choice.
        few_shot: number of solved examples before each item.

    Raises:
        BayesLoraError: in the cases of `encode_prompts` and `encode_cloze`.
    """
    options: dict[str, Any] = {"classes": len(task.labels), "max_length": max_length, "few_shot": few_shot}
    options["pool"] = few_shot_pool(task) if few_shot else None
    if task.scoring == "cloze":
        return encode_cloze(split, tokenizer, cloze=task.cloze, **options)
    return encode_prompts(split, tokenizer, **options)


def letter_ids(tokenizer: Any, classes: int) -> list[int]:
    """Return the token ids of " A", " B", … after the colon of "Answer:", one for each class.

    Raises:
        BayesLoraError: the tokenizer does not encode each letter as a token of its own.
    """
    start = list(tokenizer("Answer:", add_special_tokens=False)["input_ids"])
    found = []
    for letter in LETTERS[:classes]:
        ids = list(tokenizer(f"Answer: {letter}", add_special_tokens=False)["input_ids"])
        if ids[: len(start)] != start or len(ids) != len(start) + 1 or ids[-1] in found:
            raise BayesLoraError(
                f'the tokenizer does not write " {letter}" after "Answer:" as one separate token, but scoring by '
                "letters needs that: use a model with another tokenizer"
            )
        found.append(int(ids[-1]))
    return found


@dataclass(frozen=True)
class LetterLogits:
    """Function to class logits of a language model, by letters: `LetterLogits(ids)(model, batch)` is (B, C), float32.

    Rows may be padded on either side. Positions count from a row's first token, so that padding changes nothing for
    models with absolute positions. Models that support `logits_to_keep` compute only the logits of the last positions.

    Args:
        letter_ids: token ids of the C letters, from the function `letter_ids`.
        share_prefix: process the common prefix of a batch's rows only once, if it is at least half as long as the
            longest row and the model has a cache. Not for models with samples, where each pass has other weights.
    """

    letter_ids: tuple[int, ...]
    share_prefix: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits for `input_ids`, `attention_mask` (B, T) and `choice_mask` (B, C); other keys are ignored."""
        return trained_logits(model, self._logits, batch)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        present = batch[PRESENT].bool()
        if present.shape[1] != len(self.letter_ids):
            raise BayesLoraError(
                f"the batch has {present.shape[1]} choices, but {len(self.letter_ids)} letters: give an id for each"
            )
        accepted = forward_names(model)
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
        """Read the common beginning of all rows, and return the inputs after it; None if nothing can be shared."""
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
    """Function to class logits of an encoder with one output: `PairLogits()(model, batch)` is (B, C), float32."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits for (B, C, T) inputs and `choice_mask` (B, C); labels are ignored."""
        return trained_logits(model, self._logits, batch)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name not in (PRESENT, LABEL, "labels")}
        logits = model(**inputs).logits.float()
        return logits.masked_fill(~batch[PRESENT].bool().to(logits.device), -torch.inf)


@dataclass(frozen=True)
class PromptCollator:
    """Pad encoded prompts on the left, so that every prompt ends at the last position."""

    tokenizer: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` (B, T), `choice_mask` (B, C) and, if known, `labels` (B,)."""
        columns = {name: [row[name] for row in rows] for name in ("input_ids", "attention_mask")}
        return {**self.tokenizer.pad(columns, padding_side="left", return_tensors="pt"), **targets(rows)}


@dataclass(frozen=True)
class PairCollator:
    """Pad the pairs of all items of a batch to one length."""

    tokenizer: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return (B, C, T) inputs, `choice_mask` (B, C) and, if known, `labels` (B,)."""
        found = targets(rows)
        batch, classes = found[PRESENT].shape
        names = [name for name in rows[0] if name in self.tokenizer.model_input_names]
        flat = {name: [values for row in rows for values in row[name]] for name in names}
        padded = self.tokenizer.pad(flat, return_tensors="pt", padding_side="right")
        return {**{name: value.view(batch, classes, -1) for name, value in padded.items()}, **found}


@dataclass(frozen=True)
class ChoiceScoring:
    """The collator for encoded items, `collate`, and the function to class logits, `logits(model, batch)`."""

    collate: Collate
    logits: ClassLogits


def is_multiple_choice(dataset: Dataset) -> bool:
    """Return True if `encode_prompts`, `encode_cloze` or `encode_pairs` made the data set."""
    return PRESENT in dataset.column_names


def choice_scoring(dataset: Dataset, tokenizer: Any) -> ChoiceScoring:
    """Return the logits function and the collator for an encoded data set.

    Data from `encode_prompts` are scored by letters, from `encode_cloze` by cloze, and from `encode_pairs` by pairs.

    Raises:
        BayesLoraError: the data set has another form, or the tokenizer lacks single-token letters or padding.
    """
    if not is_multiple_choice(dataset) or not len(dataset):
        raise BayesLoraError(
            f"the data set has {counted(len(dataset), 'row')} and the columns {', '.join(dataset.column_names)}, but "
            "must have encoded multiple-choice items: use encode_prompts, encode_cloze or encode_pairs"
        )
    first = dataset[0]
    if isinstance(first["input_ids"][0], list):
        return ChoiceScoring(PairCollator(tokenizer), PairLogits())
    pad_id(tokenizer)
    if is_cloze(dataset):
        return ChoiceScoring(ClozeCollator(tokenizer), ClozeLogits())
    return ChoiceScoring(PromptCollator(tokenizer), LetterLogits(tuple(letter_ids(tokenizer, len(first[PRESENT])))))


def row_lengths(dataset: Dataset) -> list[int]:
    """Return the number of tokens of each encoded row, or of the longest pair in a row of pairs."""
    if is_cloze(dataset):
        columns = zip(dataset["input_ids"], dataset[CHOICE_IDS], strict=True)
        return [len(context) + sum(map(len, choices)) for context, choices in columns]
    return [max(map(len, ids)) if ids and isinstance(ids[0], list) else len(ids) for ids in dataset["input_ids"]]
