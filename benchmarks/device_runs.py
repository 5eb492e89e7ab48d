"""What `device.py` works with: a report of checks, models made from a config, runs of each method, and timing.

Imported for the first time, this module makes the source of bayeslora importable where the package is not installed.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

if importlib.util.find_spec("bayeslora") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import bayeslora

METHODS = ("lora", "blora", "melora", "blob", "bayes_adalora", "bayes_adalora_ivon", "dylora", "lora_ivon")
TARGETS = {"blora-learning": 1.3, "blora-frozen": 1.05, "melora": 1.05}
"""Times of a step that we want, as multiples of LoRA's."""

VARIANTS = ("lora", "blora-warm-up", "blora-learning", "blora-frozen", *METHODS[2:])
"""What a step is timed of; of the methods without phases, the middle of a run."""

LONG = 10_000  # steps of a run that is never finished, so that each of its phases is long
EXAMPLES = 1000
PACKAGE = str(Path(bayeslora.__file__).parent)


@dataclass(frozen=True)
class Size:
    """Size of the model, of a batch (rows, length), of training, and of a measurement."""

    hidden: int = 1024
    inner: int = 2816
    layers: int = 8
    heads: int = 16
    vocabulary: int = 8192
    rows: int = 8
    length: int = 256
    steps: int = 40
    rounds: int = 12
    tokens: int = 32
    side: int = 4096


TINY = Size(64, 128, 2, 4, 128, rows=4, length=16, rounds=3, tokens=4, side=256)


@dataclass
class Report:
    """Checks and figures, and what could not be run.

    Args:
        budget: seconds after which `section` skips.
    """

    budget: float
    started: float = field(default_factory=time.perf_counter)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, holds: bool, **facts: Any) -> None:
        """Record whether something holds, with the facts that say by how much."""
        self.checks[name] = {"ok": bool(holds), "facts": plain(facts)}
        passed = "ok  " if holds else "FAIL"
        print(f"[{self.elapsed():6.1f} s] {passed} {name} {plain(facts)}", file=sys.stderr, flush=True)

    def attempt(self, name: str, run: Callable[[], object]) -> bool:
        """Return whether `run` ends without an exception, which would be a failed check."""
        try:
            run()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            text = f"{type(error).__name__}: {error}"[:400]
            self.check(f"{name}: no exception", False, error=text, at=[place(frame) for frame in frames])
            return False
        return True

    def section(self, name: str, run: Callable[[], object]) -> None:
        """Run a section, if there is time left."""
        if self.elapsed() > self.budget:
            self.skipped.append(name)
            return
        begin = time.perf_counter()
        self.attempt(name, run)
        self.seconds[name] = round(time.perf_counter() - begin, 2)

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def result(self) -> dict[str, Any]:
        """Return the whole report, for JSON."""
        failed = [name for name, found in self.checks.items() if not found["ok"]]
        return {
            "ok": not failed and not self.skipped,
            "failed": failed,
            "skipped": self.skipped,
            **plain(self.figures),
            "checks": self.checks,
            "seconds": {**self.seconds, "total": round(self.elapsed(), 1)},
        }


def plain(value: Any) -> Any:
    """Return `value` for JSON, numbers with four digits, those that are not finite as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value if isinstance(value, int | str | type(None)) else str(value)


def place(frame: traceback.FrameSummary) -> str:
    """Return file and line, from the last two folders on."""
    return f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.lineno}"


@dataclass
class Bench:
    """What the sections share: the device, the sizes, the report, a folder, and the runs that have been trained."""

    device: torch.device
    size: Size
    report: Report
    folder: Path
    trained: dict[str, Run] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def write_base(self) -> None:
        """Write the random Llama that every model is loaded from."""
        torch.manual_seed(0)
        size = self.size
        config = LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.inner,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            max_position_embeddings=2 * size.length + size.tokens,
            initializer_range=0.05,
            pad_token_id=0,
        )
        LlamaForCausalLM(config).save_pretrained(self.folder / "base")

    def base(self, dtype: torch.dtype = torch.bfloat16, device: torch.device | None = None) -> PreTrainedModel:
        return LlamaForCausalLM.from_pretrained(self.folder / "base", dtype=dtype).to(device or self.device)

    def batches(self, count: int = 4) -> list[dict[str, Tensor]]:
        """Return sequences in which each token follows from the one before, so that there is something to learn."""
        generator = torch.Generator().manual_seed(0)
        size, found = self.size, []
        for _ in range(count):
            start = torch.randint(size.vocabulary, (size.rows, 1), generator=generator)
            ids = ((start + 7 * torch.arange(size.length)) % (size.vocabulary - 3) + 3).to(self.device)
            found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        return found

    def inputs(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.batches(1)[0].items() if name != "labels"}

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def peak(self, run: Callable[[], object]) -> int:
        """Return the bytes of the device's memory that `run` takes at most, above what is allocated (CUDA)."""
        release(self)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before


def release(bench: Bench) -> None:
    """Free what nothing refers to any more, so that it is in no later peak (CUDA)."""
    if bench.cuda:
        gc.collect()
        torch.cuda.empty_cache()


def times(bench: Bench, functions: Mapping[str, Callable[[], object]], reference: str) -> dict[str, dict[str, Any]]:
    """Return milliseconds of each function and its ratio to the one named `reference`; one that raises is left out."""
    attempt = bench.report.attempt
    live = {
        n: run for n, run in functions.items() if attempt(f"{n}, timed", run) and attempt(f"{n}, timed again", run)
    }
    seconds: dict[str, list[float]] = {name: [] for name in live}
    for _ in range(bench.size.rounds):
        for name, run in live.items():
            bench.wait()
            begin = time.perf_counter()
            run()
            bench.wait()
            seconds[name].append(time.perf_counter() - begin)
    return {
        name: {
            "ms": 1e3 * statistics.median(found),
            "fastest_and_slowest_ms": [1e3 * min(found), 1e3 * max(found)],
            "ratio": statistics.median(a / b for a, b in zip(found, seconds[reference], strict=True)),
        }
        for name, found in seconds.items()
    }


def configuration(method: str) -> PeftConfig:
    shared: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method.startswith("bayes_adalora"):
        importance = "snr_abs" if method.endswith("ivon") else "sensitivity"
        return bayeslora.AdaLoraConfig(init_r=8, target_r=4, deltaT=5, importance=importance, **shared)
    shared.update(r=8, lora_alpha=16)
    if method == "blora":
        return bayeslora.BLoraConfig(quantize_input=True, per_channel=True, **shared)
    if method in ("melora", "blob"):
        return bayeslora.METHODS[method](num_examples=EXAMPLES, **shared)
    return bayeslora.DyLoraConfig(**shared) if method == "dylora" else LoraConfig(**shared)


class Run:
    """A model with an adapter, its optimizer, and its loop (None for LoRA with AdamW)."""

    def __init__(self, bench: Bench, method: str, total_steps: int, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(1)
        self.model = get_peft_model(bench.base(dtype), configuration(method)).train()
        self.optimizer: torch.optim.Optimizer
        if method.endswith("ivon"):
            groups = bayeslora.parameter_groups(self.model, lr=4.0)
            self.optimizer = bayeslora.IVON(groups, lr=4.0, ess=EXAMPLES, clip_radius=4e-3)
        else:
            self.optimizer = torch.optim.AdamW(bayeslora.parameter_groups(self.model, lr=3e-3))
        self.loop: bayeslora.BayesLoop | None = None
        if method != "lora":
            options = {"total_steps": total_steps, "num_examples": EXAMPLES, "rows": bench.size.rows}
            self.loop = bayeslora.BayesLoop(self.model, self.optimizer, **options)

    def step(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Take one optimizer step, and return its loss without waiting for it."""
        if self.loop is not None:
            self.loop.step_begin()
        loss = self.model(**batch).loss
        loss.backward()
        if self.loop is not None:
            self.loop.before_optimizer_step()
        self.optimizer.step()
        if self.loop is not None:
            self.loop.step_end()
        self.optimizer.zero_grad()
        return loss.detach()


def midway(bench: Bench, variant: str, dtype: torch.dtype = torch.bfloat16) -> Run:
    """Return a run in the middle of a long training, in the phase that the variant names."""
    run, batch = Run(bench, "blora" if variant.startswith("blora") else variant, LONG, dtype), bench.batches(1)[0]
    run.step(batch)
    if run.loop is None or variant == "blora-warm-up":
        return run
    if variant.startswith("blora"):  # the steps that lead to the phase, without those between them
        state = run.loop.tuner.run_state()
        stops = [state.rotated_after - 1, state.warm_up_end - 2, state.warm_up_end - 1, *state.schedule.decisions]
        if variant == "blora-frozen":
            stops.append(state.frozen_from - 1)
        for run.loop.step in stops:
            run.step(batch)
    else:  # Me-LoRA's noise is whole, and AdaLoRA's has its final ranks still ahead
        run.loop.step = round((0.3 if variant.startswith("bayes_adalora") else 0.7) * LONG)
    return run


@contextmanager
def synchronisations() -> Iterator[Counter[str]]:
    """Count by place how often the host waits for the device (CUDA); places of this library where it is involved."""
    places: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [each for each in traceback.extract_stack()[:-1] if each.filename != warnings.__file__]
            own = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
            places[place((own or frames)[-1])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
