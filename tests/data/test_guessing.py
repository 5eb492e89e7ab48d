"""Files as strangers write them: encodings, delimiters and layouts are read, and what was guessed is said."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bayeslora.data.guessing import guess_delimiter
from bayeslora.data.tables import Table, read_table
from bayeslora.errors import BayesLoraError

ROWS = [
    {"id": "1", "text": "Prüfen, bitte; schnell | gern\tdanke", "label": "billing"},
    {"id": "2", "text": 'zwei\nZeilen "hier"', "label": "login"},
    {"id": "3", "text": "", "label": "café"},
]


def separated(rows: list[dict[str, str]], delimiter: str, end: str = "\r\n") -> str:
    """Rows as CSV, each field in quotes."""
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    return "".join(delimiter.join('"{}"'.format(field.replace('"', '""')) for field in line) + end for line in lines)


def rows_of(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, values, strict=True)) for values in zip(*table.columns.values(), strict=True)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_every_encoding_and_delimiter_gives_the_same_rows(tmp_path: Path, encoding: str, delimiter: str) -> None:
    file = tmp_path / "data.csv"
    file.write_bytes(separated(ROWS, delimiter).encode(encoding))
    said = {"cp1252": "windows-1252", "utf-8": "", "utf-8-sig": ""}.get(encoding, encoding)
    named = {",": "", ";": "with semicolons", "\t": "with tabs", "|": "with vertical bars"}[delimiter]
    if said or named:
        with pytest.warns(UserWarning, match=f"data.csv is read as a file .*{said}.*{named}") as found:
            table = read_table(file, ["text", "label"], None)
        assert len(found) == 1
    else:
        table = read_table(file, ["text", "label"], None)
    assert rows_of(table) == ROWS
    assert (table.encoding, table.delimiter) == (said or encoding, delimiter)
    # Which columns are wanted is not known to `inspect`.
    assert guess_delimiter(separated(ROWS, delimiter)) == delimiter


def test_the_wanted_columns_decide_where_texts_hold_other_delimiters() -> None:
    text = "a;b,c\n1;2,3\n4;5,6\n"
    assert guess_delimiter(text, ["a", "b,c"]) == ";" and guess_delimiter(text, ["a;b", "c"]) == ","
    # Semicolons in unquoted texts are in some rows only.
    assert guess_delimiter("id,text\n1,a; b; c\n2,d\n3,e; f\n") == ","
    assert guess_delimiter("text\none, two\nthree\n") == ","
    assert guess_delimiter("") == ","


def test_excel_says_its_delimiter_and_tsv_has_tabs(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("sep=^\r\ntext^label\r\na,b^1\r\n")
    with pytest.warns(UserWarning, match=r"with '\^'s between its fields"):
        assert rows_of(read_table(file, ["text", "label"])) == [{"text": "a,b", "label": "1"}]
    tabs = tmp_path / "data.tsv"
    tabs.write_text("text\tlabel\na,b,c\t1\n")
    assert rows_of(read_table(tabs, ["text", "label"])) == [{"text": "a,b,c", "label": "1"}]


def test_a_row_too_long_is_told_in_the_words_of_its_delimiter(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("text;label\na;1\nb;c;2\n")
    message = "line 3 has 3 fields, but the header has 2: quote fields that hold semicolons"
    with pytest.raises(BayesLoraError, match=message):
        read_table(file, ["text", "label"])
    # A column that no delimiter gives: the columns of the likeliest are named.
    with pytest.raises(BayesLoraError, match="lacks column 'body', but has columns text, label"):
        read_table(file, ["body"])


def test_long_fields_and_blanks_around_names_are_read(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text(f"text, label\n{'a' * 300_000},1\n")
    assert rows_of(read_table(file, ["text", "label"])) == [{"text": "a" * 300_000, "label": "1"}]


def test_a_header_in_the_middle_is_left_out_and_told(tmp_path: Path) -> None:
    """Of files that were put one behind the other; a file of one column may have its name as a text."""
    file = tmp_path / "data.csv"
    file.write_text("text,label\ngood,1\ntext , label\nbad,0\ntext,label\ntext,0\n")
    with pytest.warns(UserWarning, match=r"data.csv repeats its header in 2 lines \(first line 3\), which are left"):
        table = read_table(file, ["text", "label"])
    assert table.columns == {"text": ["good", "bad", "text"], "label": ["1", "0", "0"]}
    assert table.places[1] == "line 4"
    file.write_text("text\ngood\ntext\n")
    assert read_table(file, ["text"]).columns == {"text": ["good", "text"]}


def test_bytes_that_fit_no_encoding_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_bytes(b"text,label\n\x81\x8d,0\n")  # not in Windows-1252 either
    with pytest.raises(BayesLoraError, match="data.csv is not UTF-8 at byte 11"):
        read_table(file, ["text"])
    file.write_bytes("text,label\nab,0\n".encode("utf-16")[:-1])
    with pytest.raises(BayesLoraError, match="is not UTF-16 at byte"):
        read_table(file, ["text"])


def test_json_that_repeats_a_key_or_nests_without_end_is_refused(tmp_path: Path) -> None:
    twice, deep = '{"text": "good", "label": 0, "label": 1}', '{"text": "good", "label": ' + "[" * 100_000
    for name, start in (("a.jsonl", ""), ("a.json", "["), ("b.json", "")):
        for content, reason in ((twice, "repeats the key 'label'"), (deep, "nested too deeply")):
            (tmp_path / name).write_text(start + content + ("]" if start else ""))
            with pytest.raises(BayesLoraError, match=rf"{name}, line 1 is not valid JSON \({reason}"):
                read_table(tmp_path / name, ["text"])


LAYOUTS = {
    "records": ROWS,
    "columns": {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]},
    "index": {str(i): row for i, row in enumerate(ROWS)},
    "list": {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "split": {"columns": [*ROWS[0]], "index": [0, 1, 2], "data": [[*row.values()] for row in ROWS]},
    "table": {"schema": {"fields": []}, "data": ROWS},
    "data": {"version": 1, "data": ROWS},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_in_every_layout_of_pandas_gives_the_same_rows(tmp_path: Path, layout: str, indent: int | None) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps(LAYOUTS[layout], indent=indent))
    assert rows_of(read_table(file, ["text", "label"], None)) == ROWS
    assert rows_of(read_table(file, [], None)) == ROWS


def test_json_lines_and_single_rows_stay_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert rows_of(read_table(file, ["text"], None)) == ROWS
    for row in (
        {"text": "one", "label": 1},
        {"question": "q", "choices": ["a", "b"]},
        {"messages": [{"role": "user"}]},
    ):
        file.write_text(json.dumps(row, indent=1))
        assert rows_of(read_table(file, [], None)) == [row]
    file.write_text('{"text": "one",\n "label" 1}')
    with pytest.raises(BayesLoraError, match="data.json, line 2 is not valid JSON"):
        read_table(file, ["text"])
    file.write_text('{"text": "one"}\n{"text"\n')
    with pytest.raises(BayesLoraError, match="data.json, line 2 is not valid JSON"):
        read_table(file, ["text"])


def test_half_an_emoji_becomes_a_mark_and_is_told(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "good \\ud83d", "more": ["\\ude00"]}\n{"text": "whole \\ud83d\\ude00", "more": []}\n')
    with pytest.warns(UserWarning, match=r"half an emoji, in 1 row \(first line 1\), which are replaced by U\+FFFD"):
        table = read_table(file, ["text"], None)
    assert table.columns == {"text": ["good \ufffd", "whole \U0001f600"], "more": [["\ufffd"], []]}
    with pytest.warns(UserWarning, match="the input has half characters"):
        assert read_table([{"text": "\udc80"}], ["text"]).columns == {"text": ["\ufffd"]}


def test_a_table_that_was_read_is_a_source_too(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"id": 1, "text": "a"}\n{"text": "b", "late": true}\n')
    table = read_table(file, ["text"], None)
    assert table.columns == {"text": ["a", "b"], "id": [1, None], "late": [None, True]}
    assert read_table(table, ["text"]).columns == {"text": ["a", "b"]}
    assert table.select([1]).columns["late"] == [True] and table.select([1]).where(0).endswith("line 2")
    with pytest.raises(BayesLoraError, match="lacks column 'body'"):
        read_table(table, ["body"])


def test_tables_need_neither_torch_nor_numpy(tmp_path: Path) -> None:
    code = "import sys, bayeslora.data.inspection; print(*{'torch', 'numpy', 'datasets', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == ""


def test_random_rows_survive_every_way_of_writing_them(tmp_path: Path) -> None:
    generator = random.Random(0)
    letters = "ab ,;|\t\"\n\r'é€ß0"
    for trial in range(40):
        rows = [
            {name: "".join(generator.choices(letters, k=generator.randrange(1, 9))) for name in ("text", "label", "n")}
            for _ in range(generator.randrange(1, 6))
        ]
        delimiter, encoding = generator.choice(",;\t|"), generator.choice(["utf-8", "utf-16", "cp1252"])
        file = tmp_path / f"{trial}.csv"
        file.write_bytes(separated(rows, delimiter).encode(encoding))
        with pytest.warns(UserWarning) if encoding != "utf-8" or delimiter != "," else contextlib.nullcontext():
            assert rows_of(read_table(file, ["text", "label"], None)) == rows
