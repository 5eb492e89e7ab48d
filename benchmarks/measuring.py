"""What the timing benchmarks share: peaks of memory, processes that answer, and results shown and kept."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_INSTRUCTIONS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def processor() -> dict[str, Any]:
    """What a time was taken on: the processor, its instructions for narrow numbers, its cores, and torch's threads."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
    return {
        "processor": named[0] if named else platform.machine(),
        "instructions": [name for name in _INSTRUCTIONS if known.get(name)],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def peak_of(command: Sequence[str]) -> int:
    """The number that a command prints last, which measures memory; run so that a peak of memory shows."""
    # Without these the allocator keeps freed memory, and a peak within what it kept would not show.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.strip().splitlines()[-1])


def growth_of_peak(run: Callable[[], object]) -> int:
    """Bytes by which the peak of this process grows over `run` (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Environment of a process that computes on one thread."""


class Answering:
    """A process that says something when it is ready (`first`), and then answers each line of JSON with one."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> None:
        self.command = [str(word) for word in command]
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.first = self._read()

    def send(self, **request: Any) -> dict[str, Any]:
        """Send a request, and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process by the end of its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} ended: its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def print_result(result: Mapping[str, Any], output: Path | None) -> None:
    """Show a benchmark's result as JSON and, where a file is named, keep it."""
    text = json.dumps(result, indent=2)
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
