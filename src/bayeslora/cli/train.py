"""`bayeslora train`: one method, one model, one task, one new folder."""

from __future__ import annotations

import shlex
from typing import Any

from bayeslora.cli.arguments import build_plan
from bayeslora.cli.listing import list_options
from bayeslora.report import check_installed
from bayeslora.runs.plan import TrainPlan


def run(given: dict[str, Any]) -> int:
    """Run the command; `given` are the options on the command line."""
    if given.pop("list_options", False):
        print(list_options(given.get("method", "blora")))
        return 0
    return train(build_plan(given))


def train(plan: TrainPlan) -> int:
    """Train as planned and print the scores; returns 0."""
    check_installed()
    from bayeslora.cli.progress import ProgressBar, disable_progress_bars
    from bayeslora.runs import train as runs

    disable_progress_bars()
    try:
        record = runs.train(plan, ProgressBar(plan.options.method, bool(plan.training_options.get("disable_tqdm"))))
    except runs.TrainingInterrupted as error:
        options = [
            "--config",
            str(error.partial / runs.CONFIG_FILE),
            "--output-dir",
            str(error.output_dir),
            "--resume",
        ]
        command = shlex.join(["bayeslora", "train", *options])
        hint = f"continue with `{command}`" if error.resumable else "nothing was kept"
        raise KeyboardInterrupt(f"interrupted; {hint}.") from error
    scores = "  ".join(f"{name} {value:.4f}" for name, value in record.scores.items())
    print(f"{plan.output_dir}: {scores}")
    return 0
