"""The commands in the notebooks exist and take these options."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bayeslora.cli.arguments import method_field_hints, parse, training_field_hints
from bayeslora.cli.commands import COMMANDS
from tests.examples.test_notebooks import NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_commands_have_these_options(notebook: Path) -> None:
    code = [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    text = "\n".join("".join(cell["source"]) for cell in code)
    options = re.search(r"^OPTIONS = (\(\n.*?\n\))$", text, flags=re.MULTILINE | re.DOTALL)
    assert options is not None
    more = eval(options[1], {"MODEL": "m", "STEPS": 30})
    lines = re.findall(r"^!bayeslora (.+)$", text, flags=re.MULTILINE)
    assert lines
    for line in lines:
        name, *words = line.replace("{OPTIONS}", more).split()
        given, problems = parse(name, words)
        assert not problems, line
        argument = COMMANDS[name].argument
        known = {item.name for item in COMMANDS[name].options} | ({argument[0]} if argument else set())
        if name == "train":
            known |= training_field_hints().keys() | method_field_hints(given["method"]).keys()
        assert given.keys() <= known, line
