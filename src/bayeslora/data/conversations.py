"""Check rows to generate text from: conversations, or prompts with completions; imports the standard library."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from bayeslora.data.tables import Table
from bayeslora.errors import BayesLoraError
from bayeslora.vocabulary import COMPLETION, MESSAGES, text_form

ASSISTANT = "assistant"
_ROLE, _CONTENT = "role", "content"


def answered_columns(table: Table) -> dict[str, list[Any]]:
    """Return the columns of rows to learn from: `messages` with an answer in each, or `prompt` and `completion`.

    Raises:
        BayesLoraError: the table has other columns, or a row has no answer or another form.
    """
    form = text_form(table.columns)
    if form is None:
        raise BayesLoraError(
            f"{table.path} has columns {', '.join(table.columns) or 'of other names'}, but needs messages, or prompt "
            "and completion: rename them"
        )
    if form == (MESSAGES,):
        return {MESSAGES: conversations(table, needs_answer=True)}
    for row, completion in enumerate(table.strings(COMPLETION)):
        if not completion.strip():
            raise BayesLoraError(f"{table.where(row)} has an empty completion, but a text is needed: drop the row")
    return {column: table.strings(column) for column in form}


def conversations(table: Table, *, needs_answer: bool) -> list[list[dict[str, str]]]:
    """Return the role and the content of each message of each row; a warning names what else messages have.

    Rows to learn from need an answer (`needs_answer`); others need something to answer.

    Raises:
        BayesLoraError: a row has another form, calls tools, or lacks what it needs.
    """
    found = [_messages(table, row, needs_answer=needs_answer) for row in range(len(table))]
    others = [_others(messages) for messages in table.columns[MESSAGES]]
    count = sum(map(bool, others))
    if count:
        first = next(row for row, names in enumerate(others) if names)
        warnings.warn(
            f"{table.path} has {', '.join(sorted(set().union(*others)))} in messages of {count:,} of {len(found):,} "
            f"rows (first {table.places[first]}), which are left out: only role and content are read",
            stacklevel=3,
        )
    return found


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
    answered = any(each[_ROLE] == ASSISTANT and each[_CONTENT].strip() for each in found[1:])
    if needs_answer and not answered:
        raise BayesLoraError(f"{where} has no answer of the assistant after its first message, but needs one: drop it")
    if not needs_answer and all(each[_ROLE] == ASSISTANT for each in found):
        raise BayesLoraError(f"{where} has only messages of the assistant, but something to answer is needed: add it")
    return found


def _message(message: Any, where: str, number: int) -> dict[str, str]:
    given = message if isinstance(message, Mapping) else {}
    role, content = given.get(_ROLE), given.get(_CONTENT)
    if not isinstance(role, str) or not isinstance(content, str) or given.get("tool_calls"):
        seen = "calls tools" if given.get("tool_calls") else f"is {str(message)[:60]}"
        raise BayesLoraError(
            f"{where}: message {number} {seen}, but needs a role and a content that are texts: correct the row"
        )
    return {_ROLE: role, _CONTENT: content}


def _others(messages: list[Mapping[str, Any]]) -> set[str]:
    """Return the names of what messages have beside role and content."""
    return {
        str(name)
        for message in messages
        for name, value in message.items()
        if name not in (_ROLE, _CONTENT) and value is not None and value not in ("", [], {})
        if (name, value) != ("weight", 1)  # which is the usual one
    }
