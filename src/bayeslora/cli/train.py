"""`bayeslora train`: train one method on one model and one task into a new folder."""

from __future__ import annotations

import math
import shlex

from bayeslora.cli.arguments import fields_as_options
from bayeslora.cli.progress import ProgressBar, disable_progress_bars
from bayeslora.errors import counted
from bayeslora.report import check_installed
from bayeslora.report.page import REPORT_NAME
from bayeslora.report.verdict import ENOUGH_STEPS, has_diverged, is_undertrained, verdict
from bayeslora.runs import train as runs
from bayeslora.runs.partial import CONFIG_FILE
from bayeslora.runs.plan import TrainPlan
from bayeslora.runs.record import IN_BRACKETS


def _longer(plan: TrainPlan, steps: int) -> str:
    """Return the option that makes training as long as it may need to be."""
    if plan.training_options.get("max_steps", -1) > 0:
        return f"try --max-steps {ENOUGH_STEPS}"
    return f"try --num-train-epochs {math.ceil(plan.training_options['num_train_epochs'] * ENOUGH_STEPS / steps)}"


def run(plan: TrainPlan) -> int:
    """Train as planned and print the scores; return 0."""
    check_installed()
    disable_progress_bars()
    try:
        with fields_as_options(plan.options.method):
            bar = ProgressBar(plan.options.method, bool(plan.training_options.get("disable_tqdm")))
            record = runs.train(plan, bar)
    except runs.TrainingInterrupted as error:
        folders = ["--config", str(error.partial / CONFIG_FILE), "--output-dir", str(error.output_dir)]
        command = shlex.join(["bayeslora", "train", *folders, "--resume"])
        hint = f"continue with `{command}`" if error.resumable else "nothing was saved"
        raise KeyboardInterrupt(f"interrupted; {hint}") from error
    if record is None:  # not the first process of several
        return 0
    print(f"{plan.output_dir}: {'  '.join(record.score_lines)}")
    if record.baseline:
        print(f"  {IN_BRACKETS}")
    headings = [found.heading for found in verdict(record)[:-1]]
    if headings:
        print(f"  {'; '.join([headings[0], *(text[0].lower() + text[1:] for text in headings[1:])])}")
    if has_diverged(record):
        rate = plan.training_options["learning_rate"] / 10
        print(f"  its NLL is far above that of a constant answer: try --learning-rate {rate:g} before more steps")
    if is_undertrained(record):
        print(f"  {counted(record.steps or 0, 'step')} of training are few: {_longer(plan, record.steps or 1)}")
    print(f"  what they mean, with figures: {plan.output_dir / REPORT_NAME}")
    return 0
