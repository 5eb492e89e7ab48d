"""Tasks of generation from files: conversations, or prompts with completions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from bayeslora.data.chat import ASSISTANT
from bayeslora.data.tables import Table, read_table
from bayeslora.data.tasks import Source, Task, hold_out
from bayeslora.errors import BayesLoraError
from bayeslora.vocabulary import COMPLETION, MESSAGES, PROMPT, text_form

METRIC = "perplexity"
HELD_OUT = 0.1
"""Share of the training rows that are scored where there is no file for that."""
_COLUMNS = (MESSAGES, PROMPT, COMPLETION)


def load_generation(train_file: Source, eval_file: Source | None = None, *, test_file: Source | None = None) -> Task:
    """Load conversations (`messages`), or prompts with completions, for a language model to learn the answers.

    Args:
        train_file: a data file, or rows: `{"messages": [{"role": "user", "content": "…"}, …]}` with at least one turn
            of the assistant, or `{"prompt": "…", "completion": "…"}`.
        eval_file: becomes the split `validation`. Without it a tenth of the training rows does, always the same ones.
        test_file: becomes the split `test`.

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
    task = text_task(_name(train_file), columns, splits)
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
    form = text_form(table.columns)
    if form is None:
        raise BayesLoraError(
            f"{table.path} has columns {', '.join(table.columns) or 'of other names'}, but needs messages, or prompt "
            "and completion: rename them"
        )
    if form != (MESSAGES,):
        for row, completion in enumerate(table.strings(COMPLETION)):
            if not completion.strip():
                raise BayesLoraError(f"{table.where(row)} has an empty completion, but a text is needed: drop the row")
        return Dataset.from_dict({column: table.strings(column) for column in form})
    found = [_messages(table, row, needs_answer=True) for row in range(len(table))]
    return Dataset.from_dict({MESSAGES: found})


def rows_to_answer(file: Source) -> list[dict[str, Any]]:
    """Read rows to answer, each with `messages` or `prompt`, and maybe the known answer.

    Raises:
        BayesLoraError: a file cannot be used, or a row has neither column.
    """
    table = read_table(file, (), _COLUMNS)
    if MESSAGES in table.columns:
        return [{MESSAGES: _messages(table, row, needs_answer=False)} for row in range(len(table))]
    if PROMPT not in table.columns:
        raise BayesLoraError(f"{table.path} lacks messages and prompt, but needs one of them: rename a column")
    known = table.columns.get(COMPLETION, [None] * len(table))
    return [
        {PROMPT: prompt, **({COMPLETION: answer} if isinstance(answer, str) else {})}
        for prompt, answer in zip(table.strings(PROMPT), known, strict=True)
    ]


def _messages(table: Table, row: int, *, needs_answer: bool) -> list[dict[str, str]]:
    """Return the role and the content of each message of a row."""
    given = table.columns[MESSAGES][row]
    where = table.where(row)
    if not isinstance(given, list) or not given:
        raise BayesLoraError(
            f"{where} has {str(given)[:40]!r} in column {MESSAGES!r}, but a list of messages with role and content is "
            "needed: write one"
        )
    found = [_message(message, where, number) for number, message in enumerate(given, start=1)]
    answered = any(each["role"] == ASSISTANT and each["content"].strip() for each in found[1:])
    if needs_answer and not answered:
        raise BayesLoraError(f"{where} has no answer of the assistant after its first message, but needs one: drop it")
    if not needs_answer and all(each["role"] == ASSISTANT for each in found):
        raise BayesLoraError(f"{where} has only messages of the assistant, but something to answer is needed: add it")
    return found


def _message(message: Any, where: str, number: int) -> dict[str, str]:
    given = message if isinstance(message, Mapping) else {}
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        seen = "calls tools" if given.get("tool_calls") else f"is {str(message)[:60]}"
        raise BayesLoraError(
            f"{where}: message {number} {seen}, but needs a role and a content that are texts: correct the row"
        )
    return {"role": role, "content": content}


def _name(file: Source) -> str:
    return Path(file).stem if isinstance(file, (str, Path)) else "text"
