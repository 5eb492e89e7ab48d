"""`OUT.partial`, the folder of a run that is under way: who owns it, and where a resumed run starts."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bayeslora.errors import BayesLoraError, option
from bayeslora.files import check_new, dump_yaml, open_to_others, write_atomically
from bayeslora.runs import ranks
from bayeslora.runs.plan import TrainPlan, first_difference, read_config

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = "config.yaml"
CHECKPOINTS = "checkpoints"
_LOCK_FILE = "lock"
_TRAINER_STATE = "trainer_state.json"


@contextmanager
def claimed(plan: TrainPlan) -> Iterator[Path]:
    """Yield `OUT.partial` with `config.yaml`, new or of an interrupted run to resume; no other process has it.

    After a failure or an interruption it is removed, unless it can be resumed or has been.

    Raises:
        BayesLoraError: `OUT` exists, another process trains in the folder, it holds a run and `resume` is not given,
            or the run to resume is missing or has other options.
    """
    out = plan.output_dir
    check_new(out)
    partial = out.with_name(out.name + ".partial")
    if plan.options.resume and not partial.is_dir():
        raise BayesLoraError(f"--resume is given, but {partial} lacks an interrupted run: leave it out to start one")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BayesLoraError(f"{partial} cannot be used ({error.strerror}): give another path") from None
    with _locked(partial):
        if plan.options.resume and _holds_run(partial):
            _check_same(plan, partial)
        elif _holds_run(partial):
            raise BayesLoraError(
                f"{partial} holds an interrupted run, but must be new: continue it with --resume or delete it"
            )
        else:  # also of a run that was killed before it had written anything
            with write_atomically(partial / CONFIG_FILE) as path:
                path.write_text(dump_yaml(plan.record()), encoding="utf-8")
        try:
            yield partial
        except BaseException:
            if not (plan.options.resume or can_be_resumed(partial)):
                shutil.rmtree(partial, ignore_errors=True)
            raise


def complete(partial: Path, out: Path, keep_checkpoints: bool) -> None:
    """Give the finished folder `partial` its name."""
    if not keep_checkpoints:
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
    for unfinished in partial.glob(".*.partial"):  # of a process that was killed while it wrote a file
        unfinished.unlink(missing_ok=True)
    open_to_others(partial)
    os.rename(partial, out)
    (out / _LOCK_FILE).unlink(missing_ok=True)  # only now, so that nobody can take the old name's lock


def can_be_resumed(partial: Path) -> bool:
    """Return whether the folder has a checkpoint."""
    return any((partial / CHECKPOINTS).glob(f"checkpoint-*/{_TRAINER_STATE}"))


def last_checkpoint(partial: Path) -> Path | None:
    """Return the newest checkpoint that is whole, or None to start from the beginning; a warning says why others not.

    One after the last step of training that ends within an epoch is passed over: the Trainer would take a step more.

    Raises:
        BayesLoraError: the run had another number of processes.
    """
    numbered = []
    for path in (partial / CHECKPOINTS).glob("checkpoint-*"):
        if path.name.rpartition("-")[2].isdecimal() and (path / _TRAINER_STATE).is_file():  # which is written last
            numbered.append((int(path.name.rpartition("-")[2]), path))
    damaged: list[str] = []
    finished: list[str] = []
    whole: Path | None = None
    for _, path in sorted(numbered, reverse=True):
        _check_processes(path)
        problem = _damage(path)
        if problem is not None:
            damaged.append(f"{path.name} is damaged ({problem})")
        elif _ends_within_epoch(path):
            finished.append(f"{path.name} is from after the last step")
        else:
            whole = path
            break
    told = damaged if whole is not None else damaged + finished
    if told:
        instead = "the beginning" if whole is None else whole.name
        warnings.warn(f"{', '.join(told)} in {partial}: training goes on from {instead}", stacklevel=2)
    return whole


def _holds_run(partial: Path) -> bool:
    config = partial / CONFIG_FILE
    return (config.is_file() and config.stat().st_size > 0) or can_be_resumed(partial)


def _check_same(plan: TrainPlan, partial: Path) -> None:
    difference = first_difference(read_config(str(partial / CONFIG_FILE)), json.loads(json.dumps(plan.record())))
    if difference is not None:
        name, old, new = difference
        raise BayesLoraError(
            f"{option(name)} is {new!r}, but the interrupted run in {partial} has {old!r}: "
            "resume with the same options or start a new run elsewhere"
        )


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the lock of the folder; the system releases it when the process ends, however it does."""
    if fcntl is None:
        yield
        return
    with open(partial / _LOCK_FILE, "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BayesLoraError(
                f"another process is training in {partial}, but only one can: wait for it, or stop it first"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def _check_processes(checkpoint: Path) -> None:
    """Raise BayesLoraError if the random states are those of another number of processes."""
    before = len(list(checkpoint.glob("rng_state_*.pth"))) or 1
    if before > ranks.count() or (ranks.count() > 1 and (checkpoint / "rng_state.pth").is_file()):
        raise BayesLoraError(
            f"{ranks.count()} processes are started, but the interrupted run in {checkpoint.parent.parent} had "
            f"{before}: start as many"
        )


def _damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, from the lengths and checksums in its files; None if it is whole."""
    several = [f"rng_state_{rank}.pth" for rank in range(ranks.count())]
    needed = ["optimizer.pt", "scheduler.pt", *(several if len(several) > 1 else ["rng_state.pth"])]
    missing = [name for name in needed if not (checkpoint / name).is_file()]
    weights = sorted(checkpoint.glob("*.safetensors"))
    if missing or not weights:
        return f"{missing[0] if missing else 'a .safetensors file'} is missing"
    for path in [*weights, *(checkpoint / name for name in needed), checkpoint / _TRAINER_STATE]:
        try:
            _read(path)
        except (OSError, ValueError, KeyError, RecursionError, zipfile.BadZipFile, SafetensorError):
            return f"{path.name} cannot be read"
    return None


def _ends_within_epoch(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))
    step, last, epoch = (state.get(name) for name in ("global_step", "max_steps", "epoch"))
    return isinstance(epoch, float) and not epoch.is_integer() and isinstance(last, int) and step >= last


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            return None
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))["global_step"]
    with zipfile.ZipFile(path) as archive:
        if (entry := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {entry} is wrong")
    return None
