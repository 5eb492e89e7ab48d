"""What a user sees and can do while a model trains: one progress bar, and Ctrl-C that leaves a checkpoint."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

_CLOCK_FILE = "seconds.json"


class ProgressBar(TrainerCallback):
    """One bar on a terminal; ten lines in a log file."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None
        self._latest: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self._label, unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        shown = {"loss": "loss", "mean_bits": "bits", "mean_rank": "rank", "relative_bops": "bops"}
        self._latest.update({short: logs[name] for name, short in shown.items() if name in (logs or {})})  # type: ignore[index]
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.3g}" for name, value in self._latest.items()}, refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(1)
        elif state.global_step % max(1, state.max_steps // 10) == 0:
            values = "  ".join(f"{name} {value:.3g}" for name, value in self._latest.items())
            print(f"{self._label}: step {state.global_step}/{state.max_steps}  {values}".rstrip(), file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def announce_scoring(label: str, rows: int, samples: int) -> None:
    """One line before a run is scored, which can take as long as its training where weights are drawn."""
    drawn = f" under {samples} draws of the weights each" if samples else ""
    print(f"{label}: scoring {rows:,} rows{drawn}", file=sys.stderr)


class Interruption(TrainerCallback):
    """SIGINT and SIGTERM as a request to stop after the current step, with a checkpoint. A second one stops at once.

    Outside of training steps (`training` is False) a signal raises KeyboardInterrupt, as Python's own SIGINT does.
    """

    def __init__(self) -> None:
        self.requested = False
        self._training = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self._training:
            raise KeyboardInterrupt
        self.requested = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False


class Clock(TrainerCallback):
    """Seconds spent training, over all the sessions of an interrupted run."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / _CLOCK_FILE
        self._before = 0.0
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far, earlier sessions included."""
        return self._before + time.perf_counter() - self._start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and self._file.is_file():
            self._before = float(json.loads(self._file.read_text(encoding="utf-8")))
        self._start = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._file.write_text(json.dumps(self.seconds), encoding="utf-8")

    def discard(self) -> None:
        """Remove the file that carries the time from one session to the next."""
        self._file.unlink(missing_ok=True)
