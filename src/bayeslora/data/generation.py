"""Tasks of generation from files: conversations, or prompts with completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from bayeslora.data.chat import asked_of
from bayeslora.data.conversations import answered_columns, conversations
from bayeslora.data.tables import read_table, tell_empty
from bayeslora.data.tasks import Source, Task, hold_out
from bayeslora.errors import BayesLoraError
from bayeslora.vocabulary import COMPLETION, MESSAGES, PROMPT

METRIC = "perplexity"
HELD_OUT = 0.1
"""Share of the training rows that are scored where there is no file for that."""
_COLUMNS = (MESSAGES, PROMPT, COMPLETION)


def load_generation(train_file: Source, eval_file: Source | None = None, *, test_file: Source | None = None) -> Task:
    """Load conversations (`messages`), or prompts with completions, as a task for training a language model.

    Args:
        train_file: a data file, or rows: `{"messages": [{"role": "user", "content": "…"}, …]}` with at least one
            assistant turn, or `{"prompt": "…", "completion": "…"}`.
        eval_file: file or rows of the split `validation`; by default a tenth of the training rows, always the same.
        test_file: file or rows of the split `test`.

    Raises:
        BayesLoraError: a file cannot be used, has other columns, or is too small to hold out a row.
    """
    files = {"train": train_file, "validation": eval_file, "test": test_file}
    splits = {name: answered_rows(file) for name, file in files.items() if file is not None}
    columns = tuple(splits["train"].column_names)
    for name, split in splits.items():
        if tuple(split.column_names) != columns:
            raise BayesLoraError(
                f"the {name} rows have {' and '.join(split.column_names)}, but the training rows have "
                f"{' and '.join(columns)}: give rows of one form"
            )
    name = Path(train_file).name if isinstance(train_file, (str, Path)) else "text"
    task = text_task(name, columns, splits)
    if eval_file is not None:
        return task
    divided = hold_out(task, HELD_OUT)
    held = {"train": divided.splits["train"], "validation": divided.splits["selection"]}
    return text_task(task.name, columns, {**splits, **held})


def text_task(name: str, columns: tuple[str, ...], splits: dict[str, Dataset]) -> Task:
    """Return a task of generation with these splits."""
    return Task(name, "generation", columns, "", [], METRIC, splits)


def answered_rows(file: Source) -> Dataset:
    """Read rows to learn from or to score: conversations with an answer, or prompts with completions.

    Raises:
        BayesLoraError: as `load_generation`.
    """
    table = read_table(file, (), _COLUMNS)
    return Dataset.from_dict(answered_columns(table))


def rows_to_answer(file: Source) -> list[dict[str, Any]]:
    """Read rows to answer, each with `messages` or `prompt`, and maybe the known answer; they keep other columns.

    Raises:
        BayesLoraError: a file cannot be used, or a row has neither column.
    """
    table = read_table(file, (), None)
    others = {name: values for name, values in table.columns.items() if name not in _COLUMNS}
    rows = [{name: values[number] for name, values in others.items()} for number in range(len(table))]
    if MESSAGES in table.columns:
        asked = conversations(table, needs_answer=False)
        tell_empty(table, [asked_of(messages)[-1]["content"] for messages in asked], MESSAGES)
        return [{**row, MESSAGES: messages} for row, messages in zip(rows, asked, strict=True)]
    if PROMPT not in table.columns:
        raise BayesLoraError(f"{table.path} lacks messages and prompt, but needs one of them: rename a column")
    known = table.columns.get(COMPLETION, [None] * len(table))
    if answered := [row for row, answer in enumerate(known) if answer is not None]:
        table.select(answered).strings(COMPLETION)
    tell_empty(table, table.strings(PROMPT), PROMPT)
    return [
        {**row, PROMPT: prompt, **({} if answer is None else {COMPLETION: answer})}
        for row, prompt, answer in zip(rows, table.strings(PROMPT), known, strict=True)
    ]
