"""`train --goal`: it chooses what the advice of docs/choose.md recommends, and says so."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from bayeslora.cli.arguments import build_plan, parse
from bayeslora.cli.commands import COMMANDS
from bayeslora.cli.goals import GOALS
from tests.cli.conftest import Setting


def _given(setting: Setting, *more: str) -> dict[str, str]:
    options = [item.removeprefix("--").replace("-", "_") for item in setting.options[::2]]
    return {
        **dict(zip(options, setting.options[1::2], strict=True)),
        "output_dir": "out",
        **dict(zip(more[::2], more[1::2], strict=True)),
    }


@pytest.mark.parametrize("name", GOALS)
def test_a_goal_is_a_method_with_its_options_and_says_why(name: str, setting: Setting) -> None:
    goal = GOALS[name]
    with pytest.warns(UserWarning, match=f"--goal {name}: .*; afterwards `bayeslora"):
        plan = build_plan(_given(setting, "goal", name))
    assert "goal" not in plan.record()
    found = {**plan.record(), "method": plan.options.method}
    assert {key: found[key] for key in goal.options} == goal.options


@pytest.mark.parametrize("name", GOALS)
def test_what_comes_afterwards_is_a_command(name: str) -> None:
    command, *words = shlex.split(GOALS[name].then)[1:]
    given, problems = parse(command, words)
    assert not problems and given.keys() <= {item.name for item in COMMANDS[command].options} | {"folder"}


def test_options_that_are_given_win(setting: Setting) -> None:
    with pytest.warns(UserWarning, match="--goal small"):
        plan = build_plan(_given(setting, "goal", "small", "target_bops", "0.05"))
    assert plan.method_options["target_bops"] == 0.05 and plan.method_options["per_channel"] is True


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--goal", "smal"],
            "must be small, calibrated, both, ranks, draws: choose one of them, did you mean small",
        ),
        (["--goal", "small", "--method", "lora"], "--goal is given with --method, but it chooses the method"),
    ],
    ids=str,
)
def test_a_wrong_goal_is_one_line(
    more: list[str], sentence: str, setting: Setting, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert sentence in refused("train", *setting.options, *more, "--output-dir", tmp_path / "out")
