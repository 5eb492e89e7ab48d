"""`bayeslora`: parse, dispatch, and turn every expected error into one line and exit status 2.

A command imports what it uses, beside the package itself, which brings PEFT and takes the first seconds of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from bayeslora.cli.arguments import parse_open_options
from bayeslora.errors import BayesLoraError, option
from bayeslora.runs.plan import RunOptions

USER_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """argparse, with its usage errors as ours: one sentence, raised."""

    def error(self, message: str) -> NoReturn:
        raise BayesLoraError(f"{message}; `{self.prog} --help` shows what it takes.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status (0 worked, 2 bad input, 130 interrupted)."""
    try:
        with _quiet_libraries():
            return _run(sys.argv[1:] if argv is None else list(argv))
    except BayesLoraError as error:
        _say(str(error))
        return USER_ERROR
    except KeyboardInterrupt as error:
        _say(str(error) or "interrupted.")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has left; the interpreter's own flush at exit must not fail on it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EROFS, errno.EDQUOT):
            raise
        _say(f"{error.filename or 'a file'} cannot be written ({error.strerror}); name another place or make room.")
        return USER_ERROR


def _run(argv: list[str]) -> int:
    parser = build_parser()
    known, rest = parser.parse_known_args(argv)
    if not getattr(known, "command", None):
        raise BayesLoraError("no command given; `bayeslora --help` lists them.")
    given = vars(known)
    command = given.pop("command")
    if command in ("train", "plan"):
        given.update(_train_options(rest, given))
    elif rest:
        raise BayesLoraError(f"unknown argument {rest[0]!r}; `bayeslora {command} --help` shows what it takes.")
    module = importlib.import_module(f"bayeslora.cli.{command}")
    return int(module.run(given))


def _train_options(rest: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """The open options; those of `RunOptions` that argparse left over (`--train_file`) are among them."""
    extra = parse_open_options(rest)
    for name in extra:
        if name in given:
            raise BayesLoraError(f"{option(name)} is given twice; give it once.")
    return extra


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; options a user did not give are absent from its result."""
    parser = _Parser(
        prog="bayeslora",
        description="Bayesian low-rank adapters for pretrained transformers: train, judge, export.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bayeslora {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def add(name: str, text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, epilog=epilog, allow_abbrev=False, argument_default=argparse.SUPPRESS
        )

    _add_train(
        add(
            "train",
            "fine-tune a model with one method into a new folder",
            "Any field of the method's config and of TrainingArguments is an option too: --r 8 "
            "--target-modules query,key --learning-rate 1e-3. --list-options lists them.",
        )
    )
    evaluate = add("evaluate", "score a finished run; changes nothing")
    _add_run(evaluate)
    evaluate.add_argument("--task", metavar="NAME", help="a named task (the run's own)")
    evaluate.add_argument("--data-dir", metavar="DIR", help="folder with <task>/<split>.jsonl (the run's own)")
    evaluate.add_argument("--eval-file", metavar="FILE", help="rows to score on instead of a task")
    evaluate.add_argument("--text-column", metavar="A[,B]", help="the text's column or columns (the run's own)")
    evaluate.add_argument("--label-column", metavar="NAME", help="the label's column (the run's own)")
    evaluate.add_argument("--split", metavar="NAME", help="split of the task to score on (its evaluation split)")
    evaluate.add_argument("--ood", action="store_true", help="detect the task's own out-of-distribution texts too")
    evaluate.add_argument("--ood-file", metavar="FILE", help="out-of-distribution texts to detect instead")
    evaluate.add_argument("--ood-text-column", metavar="A[,B]", help="their column or columns (the run's own)")
    evaluate.add_argument("--output-dir", metavar="DIR", help="new folder for scores and figures, for `compare` too")
    evaluate.add_argument("--few-shot", metavar="K", type=int, help="examples in each prompt (as trained; 0)")
    evaluate.add_argument("--json", action="store_true", help="print JSON instead of a table")

    predict = add("predict", "label the rows of a file, one line a row, in order")
    _add_run(predict)
    predict.add_argument("--input", metavar="FILE", required=True, help="rows to label (.jsonl or .csv)")
    predict.add_argument("--output", metavar="FILE.jsonl", required=True, help="where the predictions go")
    predict.add_argument("--text-column", metavar="A[,B]", help="the text's column or columns (the run's own)")

    compare = add("compare", "a table and figures of several finished runs")
    compare.add_argument("folders", nargs="+", metavar="OUT", help="output folders of `train` or of `evaluate`")
    compare.add_argument("--output-dir", metavar="DIR", required=True, help="new folder for table and figures")
    compare.add_argument("--json", action="store_true", help="print the table as JSON")

    export = add("export", "write a finished run in another format")
    export.add_argument("folder", metavar="OUT", help="output folder of `bayeslora train`")
    export.add_argument("--format", metavar="NAME", required=True, help="lora, merged, packed or integer")
    export.add_argument("--output-dir", metavar="DIR", required=True, help="new folder for the export")
    export.add_argument("--rank", metavar="K", type=int, help="rank to cut out of a run of dylora (all)")
    export.add_argument("--uniform", action="store_true", help="lora at one rank, for vLLM, SGLang and llama.cpp")
    export.add_argument("--draws", metavar="K", type=int, help="lora: draws of the posterior, not its mean")
    export.add_argument("--seed", metavar="N", type=int, help="seed of the draws (0)")
    export.add_argument(
        "--unadapted", metavar="TYPE", help="integer: int8, bfloat16 or float32 for other layers (int8)"
    )
    export.add_argument(
        "--calibrate", action="store_true", help="integer: 8-bit inputs of other layers, by 256 rows of the training"
    )
    export.add_argument("--allow-error", action="store_true", help="merge where it cannot be exact, and measure")
    export.add_argument("--model", metavar="FOLDER_OR_ID", help="the base model, where it is no longer at its place")
    export.add_argument("--json", action="store_true", help="print what was measured as JSON")

    _add_plan(
        add(
            "plan",
            "parameters, memory, file size and operations of a training run, from a model's config.json alone",
            "Any field of the method's config is an option too: --r 8 --target-modules q_proj,v_proj,lm_head. "
            "`bayeslora train --method NAME --list-options` lists them.",
        )
    )

    demo = add("demo", "LoRA, B-LoRA and Me-LoRA on the packaged model and data, side by side")
    demo.add_argument("--output-dir", metavar="DIR", help="folder for the runs (runs/demo)")
    demo.add_argument("--max-steps", metavar="N", type=int, help="training steps of each run")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in that folder")
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    for item in dataclasses.fields(RunOptions):
        if item.default is False:
            parser.add_argument(option(item.name), action="store_true", help=item.metadata["help"])
        else:
            parser.add_argument(option(item.name), metavar=item.metadata["metavar"], help=item.metadata["help"])
    parser.add_argument("--list-options", action="store_true", help="list every option with its type, then stop")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER_OR_CONFIG", help="model folder, its config.json, or a hub id")
    parser.add_argument("--method", metavar="NAME", help="any of `train` (blora)")
    parser.add_argument("--task-type", metavar="NAME", help="causal_lm, seq_cls, … (what the config.json says)")
    parser.add_argument("--num-labels", metavar="N", help="classes of a classifier's head (the config.json's)")
    parser.add_argument("--batch-size", metavar="N", help="rows of a step (32)")
    parser.add_argument("--tokens", metavar="N", help="tokens of a row (128)")
    parser.add_argument("--dtype", metavar="TYPE", help="type the base model is loaded in (float32)")
    parser.add_argument("--device", metavar="NAME", help="cpu or cuda: whose kernels keep the activations (cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON, under the keys of metrics.json")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="OUT", help="output folder of `bayeslora train`")
    parser.add_argument("--model", metavar="FOLDER_OR_ID", help="the base model, where it is no longer at its place")
    parser.add_argument("--samples", metavar="N", type=int, help="Monte-Carlo samples of a stochastic adapter (0)")
    parser.add_argument("--seed", metavar="N", type=int, help="seed of the samples (0)")
    parser.add_argument("--batch-size", metavar="N", type=int, help="rows at a time (64)")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("bayeslora")
    except PackageNotFoundError:  # a source tree on the path, not installed
        return "(not installed)"


def _say(sentence: str) -> None:
    print(f"bayeslora: {' '.join(sentence.split())}", file=sys.stderr)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep other libraries' log lines, warnings and progress bars from the user; the package's own warnings stay."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"bayeslora(\.|$)")
            yield
    finally:
        logging.disable(level)
