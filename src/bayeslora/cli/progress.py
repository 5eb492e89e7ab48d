"""Show one progress bar during training and write the report at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm
from transformers.utils import logging

from bayeslora.errors import counted
from bayeslora.runs.train import Reporter


def disable_progress_bars() -> None:
    """Turn off other libraries' progress bars, so that only that of training is shown."""
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


class ProgressBar(Reporter):
    """Show a bar on a terminal, ten lines in a log file, nothing if `quiet`; then write report and model card."""

    def __init__(self, label: str, quiet: bool = False) -> None:
        self._label, self._quiet = label, quiet
        self._bar: Any = None
        self._latest: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty() and not self._quiet:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self._label, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        shown = {"loss": "loss", "mean_bits": "bits", "mean_rank": "rank", "relative_bops": "bops"}
        learns = "mean_bits" in (logs or {}) or "mean_rank" in (logs or {})  # else the operations never change
        of_run = shown if learns else {"loss": "loss"}
        self._latest.update({short: logs[name] for name, short in of_run.items() if name in (logs or {})})  # type: ignore[index]
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in self._latest.items()}, refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(1)
        elif not self._quiet and state.global_step % max(1, state.max_steps // 10) == 0:
            values = "  ".join(f"{name} {value:.3g}" for name, value in self._latest.items())
            print(f"{self._label}: step {state.global_step}/{state.max_steps}  {values}".rstrip(), file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_scoring(self, rows: int, samples: int) -> None:
        """Announce the scoring, which can take as long as training when weights are sampled."""
        if not self._quiet:
            drawn = f" with {counted(samples, 'sample')} of the weights" if samples else ""
            print(f"{self._label}: scoring {counted(rows, 'row')}{drawn}", file=sys.stderr)

    def on_finished(self, folder: Path) -> None:
        """Write the report and the model card."""
        from bayeslora.report import write_model_card, write_report

        write_report(folder)
        write_model_card(folder)
