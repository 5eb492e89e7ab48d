"""Trainer callbacks: save a checkpoint on Ctrl-C, and measure the time over all sessions of a run."""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from bayeslora.files import write_atomically
from bayeslora.runs import ranks

_CLOCK_FILE = "seconds.json"


class Interruption(TrainerCallback):
    """Stop after the current step and save a checkpoint on SIGINT or SIGTERM; stop at once on a second signal.

    Outside of training a signal raises KeyboardInterrupt, as Python does on SIGINT.
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
        self.requested = ranks.any_of(self.requested)  # a signal may reach the processes in different steps
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False


class Clock(TrainerCallback):
    """Measure the seconds of training over all sessions of an interrupted run."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / _CLOCK_FILE
        self._before = 0.0
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far, including earlier sessions."""
        return self._before + time.perf_counter() - self._start

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            with suppress(OSError, ValueError, TypeError):  # a lost time is no reason not to resume
                self._before = float(json.loads(self._file.read_text(encoding="utf-8")))
        self._start = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with write_atomically(self._file) as path:
                path.write_text(json.dumps(self.seconds), encoding="utf-8")

    def discard(self) -> None:
        """Remove the file that passes the time to the next session."""
        self._file.unlink(missing_ok=True)
