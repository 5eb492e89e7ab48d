"""`bayeslora inspect FILE`: say what `train` would read, without torch unless tokens are counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bayeslora.cli.inputs import print_json
from bayeslora.data.guessing import DELIMITERS
from bayeslora.data.inspection import CountTokens, Inspection, Lengths, Part, Texts, inspect_file
from bayeslora.data.split import HoldOut
from bayeslora.errors import BayesLoraError, counted

_MOST_CLASSES = 20


def run(given: dict[str, Any]) -> int:
    """Run the command with the options `given` on the command line."""
    share = given.get("eval_fraction")
    count, length = _tokenizer(given) if "model" in given else (None, 128)
    found = inspect_file(
        given["file"],
        given.get("text_column"),
        given.get("label_column"),
        eval_file=given.get("eval_file"),
        held_out=None if share is None else HoldOut(share, given.get("group_column"), given.get("split_seed", 0)),
        labels=given.get("labels"),
        kind=given.get("kind"),
        count_tokens=count,
        max_length=length,
    )
    if given.get("json"):
        print_json(dataclasses.asdict(found))
    else:
        print("\n".join(lines(found, length)))
    if found.problems:
        raise BayesLoraError(*found.problems)
    return 0


def lines(found: Inspection, length: int) -> Iterator[str]:
    """Yield the lines that the command prints."""
    delimiter = f", {DELIMITERS.get(found.delimiter, found.delimiter)} between fields" if found.delimiter else ""
    yield f"{found.file}: {counted(found.rows, 'row')}{f', {found.encoding}' if found.encoding else ''}{delimiter}"
    yield "columns"
    width = max(len(column.name) for column in found.columns)
    for column in found.columns:
        empty = f", {column.empty:,} empty" if column.empty else ""
        yield f"  {column.name:<{width}}  {column.different:,} different{empty}  {column.example}"
    guess = {name: " (guessed)" if name in found.guessed else "" for name in (*found.text_columns, found.label_column)}
    yield f"text: {', '.join(name + guess[name] for name in found.text_columns) or 'none'}"
    if found.kind == "generation":
        yield "text to generate: the answers"
    elif found.label_column is None:
        yield "label: none; name it with --label-column"
    else:
        yield f"label: {found.label_column}{guess[found.label_column]}, {found.kind or 'unreadable'}"
    yield from _part("training", found.training)
    if found.evaluation is not None:
        where = f" ({found.evaluation.file})" if found.evaluation.file else ""
        yield from _part(f"evaluation{where}", found.evaluation)
        yield f"  {found.evaluation.shared:,} have a text of the training rows"
    yield from _labels(found)
    if found.texts is not None:
        yield from _texts(found.texts, length)
    yield from (f"note: {note}" for note in found.notes)


def _part(name: str, part: Part) -> Iterator[str]:
    left_out = f", {part.unlabelled:,} more without a label" if part.unlabelled else ""
    empty = f", {part.empty_texts:,} with an empty text" if part.empty_texts else ""
    yield f"{name}: {counted(part.rows, 'row')}{left_out}{empty}"


def _labels(found: Inspection) -> Iterator[str]:
    if found.numbers:
        yield "numbers: " + ", ".join(f"{name} {value:.4g}" for name, value in found.numbers.items())
    counts = found.training.labels
    if not counts:
        return
    yield f"labels: {len(counts):,}"
    shown = dict(list(counts.items())[:_MOST_CLASSES])
    width = max(map(len, shown))
    total = max(1, sum(counts.values()))
    for name, count in shown.items():
        scored = f"  {found.evaluation.labels.get(name, 0):>7,} to score" if found.evaluation is not None else ""
        yield f"  {name:<{width}}  {count:>7,}  {count / total:>6.1%}{scored}"
    if len(counts) > len(shown):
        yield f"  and {len(counts) - len(shown):,} more"
    most = max(counts, key=counts.__getitem__)
    of = "words of the training rows" if found.kind == "token_classification" else "training rows"
    yield f"always saying {most} is right for {counts[most] / total:.1%} of the {of}"


def _texts(texts: Texts, length: int) -> Iterator[str]:
    yield f"characters: {_lengths(texts.characters)}"
    if texts.tokens is not None:
        yield f"tokens: {_lengths(texts.tokens)}"
        yield f"  {counted(texts.too_long or 0, 'row')} longer than {length} tokens, and would be cut"
    if texts.repeated:
        yield f"{counted(texts.repeated, 'row')} with the text of an earlier row"
        yield f"  {counted(texts.contradicting, 'row')} with a text that has several labels"


def _lengths(lengths: Lengths) -> str:
    return f"median {lengths.median:,}, 95% up to {lengths.most:,}, longest {lengths.longest:,}"


def _tokenizer(given: dict[str, Any]) -> tuple[CountTokens, int]:
    """Return a function that counts the tokens of rows, and the length at which they are cut."""
    from bayeslora.runs.base import load_tokenizer, resolve_model  # which import torch

    tokenizer = load_tokenizer(resolve_model(given["model"], tokenizer_only=True), given["model"])

    def count(rows: list[tuple[str, ...]]) -> list[int]:
        return [len(ids) for ids in tokenizer(*map(list, zip(*rows, strict=True)))["input_ids"]]

    return count, int(given.get("max_length", min(128, tokenizer.model_max_length)))
