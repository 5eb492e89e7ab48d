"""Files of conversations and of completions: which are read, what is held out, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bayeslora.data import load_generation
from bayeslora.data.generation import rows_to_answer
from bayeslora.errors import BayesLoraError
from bayeslora.files import first_columns
from bayeslora.vocabulary import text_form

ASK, TELL = {"role": "user", "content": "who ?"}, {"role": "assistant", "content": "the cat"}
CHAT = {"messages": [ASK, TELL]}
PAIR = {"prompt": "who ?", "completion": " the cat"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_conversations_keep_roles_and_contents_alone(tmp_path: Path) -> None:
    row = {"messages": [{**ASK, "name": "x"}, {"role": "assistant", "content": "no", "weight": 1}], "id": 3}
    file = write(tmp_path / "chat.jsonl", [CHAT, row, row])
    with pytest.warns(UserWarning, match=r"name in messages of 2 of 3 rows \(first line 2\), which are left out"):
        task = load_generation(file, [CHAT], test_file=[CHAT])
    assert (task.name, task.kind, task.text_columns, task.metric) == (
        "chat.jsonl",
        "generation",
        ("messages",),
        "perplexity",
    )
    assert task.train_split[1] == {"messages": [ASK, {"role": "assistant", "content": "no"}]}
    assert task.eval_split[0] == CHAT and len(task.splits["test"]) == 1


def test_a_tenth_is_held_out_where_there_is_nothing_to_score() -> None:
    rows = [{"prompt": str(number), "completion": "x"} for number in range(40)]
    first, again = load_generation(rows), load_generation(rows)
    held = first.eval_split["prompt"][:]
    assert len(held) == 4 and sorted([*held, *first.train_split["prompt"]], key=int) == [row["prompt"] for row in rows]
    assert again.eval_split["prompt"][:] == held
    with pytest.raises(BayesLoraError, match="both parts need at least 1"):
        load_generation([PAIR])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": "who?"}, r"line 2 has 'who\?' in column 'messages', but a list"),
        ({"messages": []}, "but a list of messages"),
        ({"messages": [ASK]}, "line 2 has no answer of the assistant"),
        ({"messages": [ASK, {"role": "assistant", "content": " "}]}, "no answer of the assistant"),
        ({"messages": [TELL]}, "no answer of the assistant after its first message"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "line 2: message 2 is .*a role and a content"),
        ({"messages": [ASK, {"role": "assistant", "tool_calls": [1]}]}, "message 2 calls tools"),
        ({"messages": ["who?", TELL]}, "message 1 is who"),
        ({"text": "who?"}, "line 2 has 'None' in column 'messages'"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_refused_with_its_line(
    row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(BayesLoraError, match=said):
        load_generation(write(tmp_path / "chat.jsonl", [CHAT, row]), [CHAT])


def test_completions_that_cannot_be_learned_are_refused_with_their_line(tmp_path: Path) -> None:
    with pytest.raises(BayesLoraError, match="line 2 has an empty completion"):
        load_generation(write(tmp_path / "pairs.jsonl", [PAIR, {**PAIR, "completion": " "}]), [PAIR])
    with pytest.raises(BayesLoraError, match="line 1 has .* of type list in column 'prompt'"):
        load_generation(write(tmp_path / "lists.jsonl", [{**PAIR, "prompt": [ASK]}]), [PAIR])
    with pytest.raises(BayesLoraError, match="the validation rows have messages, but the training rows have prompt"):
        load_generation([PAIR], [CHAT])
    with pytest.raises(BayesLoraError, match="needs messages, or prompt and completion"):
        load_generation([{"text": "who ?"}])


def test_rows_to_answer_need_no_answer() -> None:
    assert rows_to_answer([{"messages": [ASK]}, CHAT]) == [{"messages": [ASK]}, CHAT]
    assert rows_to_answer([{"prompt": "who ?", "id": 1}]) == [{"prompt": "who ?", "id": 1}]
    assert rows_to_answer([PAIR]) == [PAIR]
    assert rows_to_answer([{"prompt": "who ?", "completion": None}, PAIR]) == [{"prompt": "who ?"}, PAIR]
    with pytest.raises(BayesLoraError, match="row 2 has 42 of type int in column 'completion'"):
        rows_to_answer([PAIR, {"prompt": "how many ?", "completion": 42}])
    with pytest.raises(BayesLoraError, match="only messages of the assistant"):
        rows_to_answer([{"messages": [TELL]}])
    with pytest.raises(BayesLoraError, match="lacks messages and prompt"):
        rows_to_answer([{"text": "who ?"}])


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_prompts_are_told(text: str) -> None:
    with pytest.warns(UserWarning, match="1 of 2 rows with an empty text in column 'prompt'"):
        assert rows_to_answer([{"prompt": text}, PAIR])[0] == {"prompt": text}
    with pytest.warns(UserWarning, match="1 of 1 rows with an empty text in column 'messages'"):
        rows_to_answer([{"messages": [{**ASK, "content": text}, TELL]}])


def test_the_form_of_a_file_shows_in_its_first_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    assert first_columns(write(tmp_path / "a.jsonl", [CHAT, CHAT])) == ["messages"]
    (tmp_path / "a.json").write_text(json.dumps([PAIR, PAIR], indent=2), encoding="utf-8")
    assert first_columns(tmp_path / "a.json") == ["prompt", "completion"]
    (tmp_path / "a.csv").write_text("\ufeffprompt,label\nx,1\n", encoding="utf-8")
    assert first_columns(tmp_path / "a.csv") == ["prompt", "label"]
    for name, delimiter in (("b.csv", ";"), ("b.csv", "|"), ("b.tsv", "\t")):
        (tmp_path / name).write_text(f'prompt{delimiter}"completion"\n')
        assert first_columns(tmp_path / name) == ["prompt", "completion"]
    for encoding in ("utf-16", "utf-32", "utf-16-le"):
        (tmp_path / "c.csv").write_bytes("prompt,completion \nx,1\n".encode(encoding))
        (tmp_path / "c.jsonl").write_bytes(json.dumps(PAIR).encode(encoding))
        assert first_columns(tmp_path / "c.csv") == first_columns(tmp_path / "c.jsonl") == ["prompt", "completion"]
    (tmp_path / "d.csv").write_text("sep=;\r\nprompt;completion\nx;1\n")
    assert first_columns(tmp_path / "d.csv") == ["prompt", "completion"]
    (tmp_path / "d.jsonl").write_text("[" * 100_000)
    pyarrow.parquet.write_table(pyarrow.table({"messages": [[ASK, TELL]]}), tmp_path / "a.parquet")
    assert first_columns(tmp_path / "a.parquet") == ["messages"]
    (tmp_path / "a.txt").write_text("no rows", encoding="utf-8")
    (tmp_path / "b.parquet").write_text("no rows", encoding="utf-8")
    for name in ("a.txt", "b.parquet", "d.jsonl", "missing.jsonl", ""):
        assert first_columns(tmp_path / name) == []
    assert text_form(["id", "messages"]) == ("messages",) and text_form(["prompt", "label"]) is None
    assert text_form(["completion", "prompt"]) == ("prompt", "completion")


def test_a_message_that_calls_tools_is_refused_whatever_it_says_besides() -> None:
    call = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    for content in ("", "the cat", None):
        rows = [{"messages": [ASK, {"role": "assistant", "content": content, "tool_calls": call}, ASK, TELL]}]
        with pytest.raises(BayesLoraError, match="row 1: message 2 calls tools, but needs"):
            load_generation(rows, rows)
    quiet = [{"messages": [ASK, {**TELL, "tool_calls": [], "name": None, "weight": 1}]}]
    assert load_generation(quiet, quiet).train_split[0] == CHAT  # without a warning
    with pytest.warns(UserWarning, match="weight in messages of 1 of 1 rows"):
        load_generation([{"messages": [ASK, TELL, ASK, {**TELL, "weight": 0}]}], quiet)
