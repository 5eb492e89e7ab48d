"""New processes that start at once: forked from one that has imported torch, transformers and PEFT, but not bayeslora.

Importing these takes a process several seconds, so each pytest worker has it done once. What runs here knows no model,
no adapter and no random state of the test that starts it.
"""

from __future__ import annotations

import importlib
import os
import runpy
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

LIBRARIES = ["torch.distributed.fsdp", "transformers.models.bert.modeling_bert", "peft", "datasets"]
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(LIBRARIES)


def run_ranks(main: Callable[..., None], *arguments: object, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Run `main(rank, *arguments, folder)` in a process for each rank; returns what each saves as `<rank>.pt`."""
    mp.start_processes(main, args=(*arguments, str(folder)), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def run_code(code: str, folder: Path, *arguments: str) -> str:
    """Return what `code` prints in a new process with these arguments, whose working directory is `folder`.

    An exception in it is one here, with its traceback. Imports find what they find in the test.
    """
    printed = folder / "printed.txt"
    mp.start_processes(_run, args=(code, str(folder), arguments, str(printed)), nprocs=1, start_method="forkserver")
    return printed.read_text(encoding="utf-8")


def _run(_: int, code: str, folder: str, arguments: tuple[str, ...], printed: str) -> None:
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    torch.set_num_threads(1)
    with open(printed, "w", encoding="utf-8") as stream, redirect_stdout(stream):
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def start_command(log: Path, folder: Path, *arguments: str) -> ForkServerProcess:
    """Start `python -m bayeslora` with these arguments in `folder`; what it prints goes to `log`."""
    process = CONTEXT.Process(target=_command, args=(str(log), str(folder), arguments))
    process.start()
    return process


def start_commands(logs: Sequence[Path], folder: Path, *arguments: str) -> list[ForkServerProcess]:
    """Start `python -m bayeslora` once for each log, as torchrun does on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(len(logs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank, log in enumerate(logs):
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = CONTEXT.Process(target=_command, args=(str(log), str(folder), arguments, variables))
        process.start()
        started.append(process)
    return started


def _command(log: str, folder: str, arguments: tuple[str, ...], variables: dict[str, str] | None = None) -> None:
    os.chdir(folder)
    os.environ.update(variables or {})
    sys.argv = ["bayeslora", *arguments]
    with open(log, "w", encoding="utf-8") as stream:
        for standard in (1, 2):
            os.dup2(stream.fileno(), standard)
    runpy.run_module("bayeslora", run_name="__main__")


class Commands:
    """A process that has imported the commands and forks for each run, so that a run costs no imports.

    Reports have an empty picture for each figure.
    """

    def __init__(self) -> None:
        self._pipe, other = CONTEXT.Pipe()
        self._server = CONTEXT.Process(target=_serve, args=(other,), daemon=True)
        self._server.start()
        assert self._pipe.recv() == "ready"

    def start(self, folder: Path, log: Path, lines: Sequence[Sequence[str]]) -> int:
        """Start `bayeslora` for each line, one after the other until one fails, in a process whose id is returned."""
        self._pipe.send((str(folder), str(log), [list(line) for line in lines]))
        return int(self._pipe.recv())

    def wait(self) -> int:
        """Return the exit code of the process that was started last: negative for a signal."""
        return int(self._pipe.recv())

    def stop(self) -> None:
        """End the process that forks."""
        self._pipe.send(None)
        self._server.join(30)


def _serve(pipe: Connection) -> None:
    import bayeslora.report.page
    from bayeslora.cli.main import main

    for name in ("train", "predict", "generate"):
        importlib.import_module(f"bayeslora.cli.{name}")
    torch.set_num_threads(1)
    bayeslora.report.page.png_bytes = lambda figure: b""
    bayeslora.report.page.inline_svg = lambda figure, name: "<svg></svg>"
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        folder, log, lines = request
        child = os.fork()
        if not child:
            status = 70
            try:
                os.chdir(folder)
                with open(log, "a", encoding="utf-8") as stream:
                    for standard in (1, 2):
                        os.dup2(stream.fileno(), standard)
                status = next(filter(None, map(main, lines)), 0)
            finally:
                os._exit(status)
        pipe.send(child)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
