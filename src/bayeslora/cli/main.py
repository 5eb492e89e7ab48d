"""`bayeslora`: parse and dispatch; print each expected error on one line and exit with status 2.

Help, version and most errors import no torch: a command's module is imported once its options are valid.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import bayeslora
from bayeslora.cli.arguments import arguments_as_options, build_plan, check_paths, parse, plan_options
from bayeslora.cli.coercion import coerce
from bayeslora.cli.commands import COMMANDS, help_text
from bayeslora.cli.sweep import Sweep, build_sweep
from bayeslora.errors import BayesLoraError, close_matches

USER_ERROR = 2
INTERRUPTED = 130
_HELP = ("-h", "--help")
_UNUSABLE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "cannot be used ({}): `chmod` it, or give another path"),
    **dict.fromkeys(
        (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR), "cannot be used ({}): give another path"
    ),
    **dict.fromkeys(
        (errno.ENOSPC, errno.EROFS, errno.EDQUOT), "cannot be written ({}): choose another folder or free space"
    ),
}
"""What is said of a file by the number of the error that the system gives."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 success, 1 closed pipe, 2 bad input, 130 interrupted."""
    try:
        with _quiet_libraries():
            return _run(sys.argv[1:] if argv is None else list(argv))
    except BayesLoraError as error:
        for sentence in error.args:
            _say(str(sentence))
        return USER_ERROR
    except KeyboardInterrupt as error:
        _say(str(error) or "interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has closed it; the interpreter's flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _UNUSABLE:
            raise
        _say(f"{error.filename or 'a file'} {_UNUSABLE[error.errno].format(error.strerror)}")
        return USER_ERROR


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else ""
    if name in (*_HELP, "--version"):
        print(f"bayeslora {bayeslora.__version__}" if name == "--version" else help_text())
        return 0
    if not name:
        raise BayesLoraError("no command is given, but one is required: `bayeslora --help` lists them")
    if name not in COMMANDS:
        raise BayesLoraError(f"unknown command {name}{close_matches(name, COMMANDS)}: `bayeslora --help` lists them")
    if set(_HELP) & set(argv):
        print(help_text(name))
        return 0
    given, problems = parse(name, argv[1:])
    if not problems:
        check_paths(name, given, problems)
    with _interrupts_at_once():
        if name == "train" and coerce("list_options", given.get("list_options", False), bool):
            from bayeslora.cli.listing import list_options

            print(list_options(given.get("method", "blora")))
            return 0
        request: Any = given
        if name == "train":
            request = (build_sweep if "seeds" in given else build_plan)(given, problems)
        elif name == "plan":
            request = plan_options(given, problems)
        problems.tell()
        module = importlib.import_module(f"bayeslora.cli.{'sweep' if isinstance(request, Sweep) else name}")
    with arguments_as_options(name):
        return int(module.run(request))


@contextmanager
def _interrupts_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process while torch is imported: a KeyboardInterrupt can get lost in an import."""

    def leave(number: int, frame: object) -> None:
        os.write(sys.stderr.fileno(), b"bayeslora: interrupted; nothing was started\n")
        os._exit(INTERRUPTED)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _say(sentence: str) -> None:
    """Print an error, of several processes on a machine only in the first: all of them have met it."""
    if not _follows():
        print(f"bayeslora: {' '.join(sentence.split())}", file=sys.stderr)


def _follows() -> bool:
    """Return whether torchrun or `accelerate launch` started this process beside a first one on this machine."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Hide log lines, warnings and progress bars of other libraries; keep this package's warnings."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    level, formatted = logging.root.manager.disable, warnings.formatwarning
    logging.disable(logging.WARNING)
    warnings.formatwarning = lambda message, *_, **__: f"bayeslora: note: {' '.join(str(message).split())}\n"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not _follows():
                warnings.filterwarnings("default", module=r"bayeslora(\.|$)")
            yield
    finally:
        logging.disable(level)
        warnings.formatwarning = formatted
