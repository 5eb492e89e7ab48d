r"""Multiple choice by cloze: the class logits of an item are the log-likelihoods of its choices' texts.

For a context $c$ and a choice of tokens $t_1, \dots, t_n$ the logit is

$$ z = \frac{1}{L} \sum_i \log p(t_i \mid c, t_1, \dots, t_{i-1}), $$

with $L$ = 1, the number of tokens, or the number of UTF-8 bytes of the text (`Cloze.normalization`). A softmax over an
item's choices gives class probabilities, so everything for classifiers works on them. Small language models know an
answer by its text long before they can name its letter.
The calls are those in `evaluation.multiple_choice`, with `encode_cloze` instead of `encode_prompts`.

**Tokens.** Context and choice are tokenized as one text, so that special tokens and the boundary are those of running
text. A choice begins at the first token that differs from those of the context alone; a token across the boundary
belongs to the choice. All choices of an item begin at the same place.

**Sentences with a gap** (rows with the column `ending`) are scored by partial evaluation (Trinh and Le, 2018,
arXiv:1806.02847): the likelihood of the common ending after each choice, so that the choices' own frequency does not
count.

**One sequence per item.** The context is followed by all of the item's choices. Each choice sees the context and
itself, at the positions that it would have alone, so the context is read once, in training as well. A row of the batch
is an item: noise with one draw per row is the same for all of its choices. Models that cannot read such a sequence
(recurrent ones, relative positions by ALiBi, windows shorter than the text, flash attention) read every choice with
its own copy of the context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor, nn

from bayeslora.data.choices import CHOICES, ENDING, LABEL, QUESTION, SUBJECT, Cloze
from bayeslora.data.completions import opening
from bayeslora.data.encode import pad_id
from bayeslora.data.few_shot import Row, examples_for
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.items import (
    DEFAULT_PROMPT_LENGTH,
    PRESENT,
    Batch,
    check_classes,
    fitted,
    forward_names,
    innermost,
    targets,
    tokenize,
    trained_logits,
    with_labels,
)
from bayeslora.evaluation.prefix_sharing import common_start
from bayeslora.methods.tuner import tuner_of

CHOICE_IDS = "choice_ids"
"""Column of the C lists of tokens that follow the context, empty for absent choices."""
SCORED = "choice_scored"
"""Column of the number of tokens of each choice, counted from its end, whose likelihood is its score."""
LENGTH = "choice_length"
"""Column and batch key of the numbers (C,) that the log-likelihoods are divided by."""
OWNER, IS_SCORED = "token_choice", "token_is_scored"
_PADDING = -1
_FULL_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


class _Item(NamedTuple):
    context: list[int]
    choices: list[list[int]]
    scored: list[int]
    lengths: list[int]


def encode_cloze(
    split: Dataset,
    tokenizer: Any,
    *,
    classes: int,
    cloze: Cloze | None = None,
    max_length: int = DEFAULT_PROMPT_LENGTH,
    few_shot: int = 0,
    pool: Dataset | None = None,
    seed: int | None = None,
) -> Dataset:
    """Encode contexts and choices for a language model, so that `choice_scoring` can score them by likelihood.

    The arguments are those of `encode_prompts`, except for these:

    Args:
        split: rows with `question` and `choices`, and maybe `label`, `subject` and `ending`.
        cloze: text before a choice, and normalization; by default "Question: …", "Answer:" and the sum.
        max_length: maximum length in tokens of a context with its longest choice. Longer items lose their first
            few-shot examples, with a single warning.

    Returns:
        A data set with `input_ids` of the context; for each choice `choice_ids`, `choice_scored` (the number of its
        last tokens that are scored) and `choice_length` (the divisor); `choice_mask` and, if known, `label`.

    Raises:
        BayesLoraError: an item is longer than `max_length` without examples, has more choices than `classes` or a
            choice without text, or `pool` has too few rows.
    """
    form = cloze or Cloze()
    rows = list(split)
    check_classes(rows, classes)
    items = fitted(
        rows,
        examples_for(rows, pool, few_shot, seed),
        lambda pairs: _encoded(pairs, tokenizer, form),
        lambda item: len(item.context) + max(map(len, item.choices)),
        max_length,
    )
    absent = [[0] * (classes - len(row[CHOICES])) for row in rows]
    columns: dict[str, list[Any]] = {
        "input_ids": [item.context for item in items],
        CHOICE_IDS: [[*item.choices, *([] for _ in rest)] for item, rest in zip(items, absent, strict=True)],
        SCORED: [[*item.scored, *rest] for item, rest in zip(items, absent, strict=True)],
        LENGTH: [[*item.lengths, *(1 for _ in rest)] for item, rest in zip(items, absent, strict=True)],
    }
    return with_labels(columns, split, rows, classes)


def _encoded(pairs: Sequence[tuple[Row, list[Row]]], tokenizer: Any, form: Cloze) -> list[_Item]:
    texts = [_texts(row, shown, form) for row, shown in pairs]
    parts = list(chain.from_iterable(texts))
    contexts = list(dict.fromkeys(context for context, _ in parts))
    # Of an empty text, `tokenize` takes the tokens that open it for those that end it.
    alone = dict(zip(contexts, tokenize(contexts, tokenizer), strict=True)) | {"": opening(tokenizer)}
    whole = iter(tokenize([context + text for context, text in parts], tokenizer))
    return [
        _item(row, own, alone, list(islice(whole, len(own))), tokenizer, form)
        for (row, _), own in zip(pairs, texts, strict=True)
    ]


def _texts(row: Row, shown: Sequence[Row], form: Cloze) -> list[tuple[str, str]]:
    """Return for each choice the text before what is scored, and the scored text."""
    parts = [f"The following are questions about {row[SUBJECT].replace('_', ' ')}."] if row.get(SUBJECT) else []
    parts += [_joined(_context(each, form), each[CHOICES][each[LABEL]]) for each in shown]
    before = "\n\n".join([*parts, _context(row, form)])
    ending = row.get(ENDING) or ""
    texts = []
    for choice in row[CHOICES]:
        whole = _joined(before, choice)
        start = len(whole) - len(ending) if ending else len(before)
        texts.append((whole[:start], whole[start:]))
    return texts


def _context(row: Row, form: Cloze) -> str:
    return form.context.format(question=row[QUESTION].strip()).rstrip()


def _joined(before: str, choice: str) -> str:
    return f"{before} {choice.strip()}" if before else choice.strip()


def _item(
    row: Row,
    texts: Sequence[tuple[str, str]],
    alone: Mapping[str, list[int]],
    whole: Sequence[list[int]],
    tokenizer: Any,
    form: Cloze,
) -> _Item:
    ends = [common_start(alone[context], ids) for (context, _), ids in zip(texts, whole, strict=True)]
    if len({context for context, _ in texts}) == 1:
        ends = [min(ends)] * len(ends)
    scored = [len(ids) - end for ids, end in zip(whole, ends, strict=True)]
    if 0 in scored:
        raise BayesLoraError(
            f"choice {scored.index(0) + 1} of the question {row[QUESTION][:40]!r}… has no tokens, but its text is "
            "scored: correct the row, or score by letters"
        )
    shared = min(*ends, *(common_start(whole[0], ids) for ids in whole[1:]))
    lengths = {
        "none": [1] * len(whole),
        "tokens": scored,
        "bytes": [max(1, len(text.strip().encode())) for _, text in texts],
    }[form.normalization]
    # The first token of a text is predicted from the token that opens or ends texts.
    context = whole[0][:shared] or [_first(tokenizer)]
    return _Item(context, [ids[shared:] for ids in whole], scored, lengths)


def _first(tokenizer: Any) -> int:
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise BayesLoraError(
            "a context is empty and the tokenizer lacks a token that begins or ends texts, but the first token of a "
            "choice is predicted from one: give a context"
        )
    return int(found)


def is_cloze(dataset: Dataset) -> bool:
    """Return True if `encode_cloze` made the data set."""
    return CHOICE_IDS in dataset.column_names


@dataclass(frozen=True)
class ClozeCollator:
    """Write each item as one sequence, its context and then its choices; contexts end in the same column."""

    tokenizer: Any

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of `ClozeLogits` and, if known, `labels` (B,).

        `input_ids`, `position_ids` and `attention_mask` (B, T), 0 for padding; `token_choice` (B, T), 0 for the
        context, 1, 2, … for the choices and -1 for padding; `token_is_scored` (B, T); `choice_length` and
        `choice_mask` (B, C).
        """
        before = max(len(row["input_ids"]) for row in rows)
        after = max(sum(map(len, row[CHOICE_IDS])) for row in rows)
        empty = {"input_ids": pad_id(self.tokenizer), "position_ids": 0, OWNER: _PADDING, IS_SCORED: 0}
        columns: dict[str, list[list[int]]] = {name: [] for name in empty}
        for row in rows:
            laid = _laid_out(row)
            left, right = before - len(row["input_ids"]), after - sum(map(len, row[CHOICE_IDS]))
            for name, value in empty.items():
                columns[name].append([value] * left + laid[name] + [value] * right)
        batch = {name: torch.tensor(values) for name, values in columns.items()}
        batch["attention_mask"] = (batch[OWNER] != _PADDING).long()
        return {**batch, LENGTH: torch.tensor([row[LENGTH] for row in rows]), **targets(rows)}


def _laid_out(row: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the tokens of a row with their positions and owners, context first."""
    context: list[int] = list(row["input_ids"])
    count = len(context)
    laid = {"input_ids": context, "position_ids": list(range(count)), OWNER: [0] * count, IS_SCORED: [0] * count}
    for number, (ids, scored) in enumerate(zip(row[CHOICE_IDS], row[SCORED], strict=True), start=1):
        laid["input_ids"] += ids
        laid["position_ids"] += range(count, count + len(ids))
        laid[OWNER] += [number] * len(ids)
        laid[IS_SCORED] += [0] * (len(ids) - scored) + [1] * scored
    return laid


@dataclass(frozen=True)
class ClozeLogits:
    """Function to class logits of a language model, by cloze: `ClozeLogits()(model, batch)` is (B, C), float32.

    Args:
        share_context: read the context of an item only once, if the model can. False reads a copy of it with every
            choice, which gives the same logits up to rounding.
    """

    share_context: bool = True

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return class logits for a batch from `ClozeCollator`; other keys are ignored.

        Raises:
            BayesLoraError: a model with an adapter of this library is in training, but does not share the context.
        """
        return trained_logits(model, self._logits, batch)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.share_context and can_share_context(model, int(batch["position_ids"].max()) + 1):
            scores = _of_trees(model, batch)
        else:
            if model.training and torch.is_grad_enabled() and tuner_of(model) is not None:
                raise BayesLoraError(
                    f"{type(innermost(model)).__name__} has to read each choice as a row of its own, but an adapter's "
                    "noise and statistics count rows as items: use a model with full attention, in sdpa or eager form"
                )
            scores = _of_copies(model, batch)
        return (scores / batch[LENGTH].to(scores)).masked_fill(~batch[PRESENT].bool().to(scores.device), -torch.inf)


def can_share_context(model: nn.Module, longest: int) -> bool:
    """Return whether the model accepts attention masks and positions as given, for texts of `longest` tokens."""
    inner = innermost(model)
    config = inner.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return (
        "position_ids" in forward_names(model)
        and not getattr(inner, "_is_stateful", False)
        and not getattr(config, "alibi", False)
        and getattr(inner.config, "_attn_implementation", None) in ("sdpa", "eager")
        and set(getattr(config, "layer_types", None) or ()) <= _FULL_ATTENTION
        and all(window is None or window >= longest for window in windows)
    )


def _of_trees(model: nn.Module, batch: Batch) -> Tensor:
    """Return the sums (B, C) of log-likelihoods, from one sequence per item."""
    ids, owner = batch["input_ids"], batch[OWNER]
    start = int((owner > 0).any(dim=0).nonzero()[0])
    tokens, own, before = ids[:, start:], owner[:, start:], owner[:, start - 1 : -1]
    columns = torch.arange(tokens.shape[1], device=ids.device)
    # Counted from the context's last column: a choice's first token comes after it, the others after one another.
    source = torch.where(own == before, columns, 0)
    mask = _tree_mask(owner, innermost(model).dtype)
    logits = _last_logits(model, ids, mask, batch["position_ids"], tokens.shape[1] + 1)
    found = _log_likelihoods(logits, tokens, source) * batch[IS_SCORED][:, start:].to(logits.device)
    sums = found.new_zeros(len(ids), batch[PRESENT].shape[1] + 1)
    return sums.scatter_add(1, own.clamp(min=0).to(sums.device), found)[:, 1:]


def _tree_mask(owner: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (B, 1, T, T): a token sees the context and its own choice, up to itself."""
    seen = (owner == 0)[:, None, :] | (owner[:, None, :] == owner[:, :, None])
    seen &= (owner != _PADDING)[:, None, :]
    seen = seen.tril() | torch.eye(owner.shape[1], dtype=torch.bool, device=owner.device)
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _of_copies(model: nn.Module, batch: Batch) -> Tensor:
    """Return the sums (B, C) of log-likelihoods, from one sequence per choice."""
    ids, kept, scored, places = copies(batch)
    width = int(scored.sum(dim=1).max())
    positions = (kept.cumsum(dim=1) - 1).clamp(min=0)
    logits = _last_logits(model, ids, kept, positions, width + 1)
    source = torch.arange(width, device=ids.device).expand(len(ids), -1)
    found = _log_likelihoods(logits, ids[:, -width:], source) * scored[:, -width:].to(logits.device)
    sums = found.new_zeros(batch[PRESENT].shape)
    rows, choices = places.to(sums.device).unbind(dim=1)
    return sums.index_put((rows, choices), found.sum(dim=1))


def copies(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return one sequence for each choice that is there: ids, attention mask and scored tokens (R, L), left-padded.

    The fourth tensor (R, 2) has the item and the choice of each sequence.
    """
    ids, owner = batch["input_ids"], batch[OWNER]
    places = batch[PRESENT].nonzero().to(ids.device)
    kept = (owner[places[:, 0]] == 0) | (owner[places[:, 0]] == places[:, 1:] + 1)
    length = int(kept.sum(dim=1).max())
    # Stable, so that the tokens of a sequence stay in order, and are its last ones.
    order = kept.long().argsort(dim=1, stable=True)[:, -length:]
    chosen = ids[places[:, 0]], kept.long(), batch[IS_SCORED][places[:, 0]] * kept
    tokens, mask, scored = (values.gather(1, order) for values in chosen)
    return tokens, mask, scored, places


def _last_logits(model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, count: int) -> Tensor:
    """Return the logits (R, count, vocabulary) of the last `count` columns."""
    accepted = forward_names(model)
    more: dict[str, Any] = {"position_ids": positions, "use_cache": False, "logits_to_keep": count}
    inputs = {name: value for name, value in more.items() if name in accepted}
    logits: Tensor = model(input_ids=ids, attention_mask=mask, **inputs).logits
    return logits[:, -count:]


def _log_likelihoods(logits: Tensor, tokens: Tensor, source: Tensor) -> Tensor:
    """Return log-likelihoods (R, W) of `tokens`, each from the logits (R, K, vocabulary) at its column in `source`."""
    logits, tokens, source = logits.float(), tokens.to(logits.device), source.to(logits.device)
    rows = torch.arange(len(tokens), device=logits.device)[:, None]
    return logits[rows, source, tokens] - logits.logsumexp(dim=-1).gather(1, source)
