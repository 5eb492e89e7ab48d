"""Read a command line into options: those of the command, of the method's config, and of `TrainingArguments`.

All three live in one flat name space, on the command line (`--lora-alpha 16`, `--lora_alpha 16`, `--lora-alpha=16`)
and in the YAML file of `--config`; the command line wins. `config.yaml` in an output folder is such a file. Errors
that names and types show are reported together and at once, without importing torch; what a config itself refuses, or
`TrainingArguments`, comes after them.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.cli.coercion import coerce
from bayeslora.cli.commands import COMMANDS, RUN, Command, Option, PlanOptions
from bayeslora.cli.goals import with_goal
from bayeslora.cli.registry import check_method, method_config_class, method_names
from bayeslora.cli.source_fields import OPEN, method_source_hints, training_source_hints
from bayeslora.data.tables import check_data_file
from bayeslora.errors import BayesLoraError, Problems, close_matches, option, spelled_as_options
from bayeslora.files import first_columns
from bayeslora.runs.info import RunInfo
from bayeslora.runs.plan import IVON, IVON_PREFIX, IvonOptions, RunOptions, TrainPlan, read_config
from bayeslora.vocabulary import TAGS, TEXT_TASKS, WORDS, tagged_form

if TYPE_CHECKING:
    from peft import PeftConfig

# Fields that the commands set; a user's value would be overwritten or would break the output folder.
_METHOD_FIELDS_SET_HERE = {
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("peft_version", "runtime_config"),
}
_TRAINING_FIELDS_SET_HERE = {"output_dir": "--output-dir", "resume_from_checkpoint": "--resume"}
_BOUNDS: dict[str, tuple[float, float, str]] = {
    "r": (1, math.inf, "give the initial rank"),
    "max_steps": (-1, math.inf, "leave it out to train for whole epochs"),
    "num_train_epochs": (0, math.inf, "give a number of passes over the rows, such as 3"),
    "seed": (0, 2**32 - 1, "give such a whole number"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        (1, math.inf, "give 1 or more"),
    ),
}
_NOT_ZERO = ("max_steps", "num_train_epochs")
# Plain LoRA shares these defaults with the library's methods, so that two runs differ only in --method.
_SHARED_DEFAULTS = ("r", "lora_alpha", "lora_dropout")


def parse(name: str, words: list[str]) -> tuple[dict[str, Any], Problems]:
    """Return the options given to the command `name`, and everything wrong with them.

    An open command's values stay as typed; `build_plan` and `plan_options` convert them.
    """
    command, problems = COMMANDS[name], Problems()
    given, others = _split(words, {item.name for item in command.options if item.metavar is None}, problems)
    _place(others, command, given, problems)
    if command.is_open:
        return given, problems
    known = {item.name for item in command.options} | ({command.argument[0]} if command.argument else set())
    for unknown in [key for key in given if key not in known]:
        near = close_matches(option(unknown), map(option, known))
        problems.append(f"unknown option {option(unknown)}{near}: `bayeslora {name} --help` lists them")
    values = read_options(command, given, problems)
    return {**{key: value for key, value in given.items() if key in known}, **values}, problems


def check_paths(name: str, given: dict[str, Any], problems: Problems) -> None:
    """Look for the run and the data files given to the command `name`, which imports torch before it reads them."""
    command, folder = COMMANDS[name], given.get(RUN[0])
    if command.argument == RUN and folder and "task" not in given:  # on a task, untrained models are scored too
        with problems.collected():
            RunInfo.load(Path(folder))
    for item in command.options:
        if item.is_data and isinstance(given.get(item.name), str):
            with problems.collected():
                check_data_file(Path(given[item.name]))


def _split(words: list[str], switches: set[str], problems: Problems) -> tuple[dict[str, Any], list[str]]:
    """Read `--name value`, `--name=value`, `--name` (true) and `--no-name` (false); names get underscores."""
    found: dict[str, Any] = {}
    others: list[str] = []
    waiting = list(reversed(words))
    while waiting:
        word = waiting.pop()
        if not word.startswith("--") or len(word) < 3:
            others.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        value: Any = text
        if not equals:
            if name not in switches and waiting and not waiting[-1].startswith("--"):
                value = waiting.pop()
            else:
                value = name in switches or not name.startswith("no_")
                name = name if name in switches else name.removeprefix("no_")
        if name in found:
            problems.append(f"{option(name)} is given twice, but must be given once: leave one out")
        found[name] = value
    return found, others


def _place(words: list[str], command: Command, given: dict[str, Any], problems: Problems) -> None:
    """Move the positional argument from `words` to `given`."""
    if command.argument is None:
        problems += [f"{word!r} is given, but only options are accepted: write --name value" for word in words]
        return
    name, metavar, text = command.argument
    if not words:
        problems.append(f"{metavar} is missing: give the {text}")
    elif metavar.endswith("…"):
        given[name] = words
    else:
        given[name] = words[0]
        problems += [f"{word!r} is given too, but only one {metavar} is accepted: leave it out" for word in words[1:]]


def read_options(command: Command, given: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """Return the command's own options that are given, converted to their types; switches that are off are omitted."""
    found: dict[str, Any] = {}
    for item in command.options:
        if item.name in given:
            with problems.collected():
                found[item.name] = _read(item, given[item.name])
        elif item.required:
            problems.append(f"{option(item.name)} is missing: add {item.spelling} ({item.help})")
    problems += command.contradictions({**given, **found})
    return {name: value for name, value in found.items() if value is not False}


def _read(item: Option, given: Any) -> Any:
    if given is True and item.alone is not None:
        return item.alone
    if given is True and item.metavar is not None:
        raise BayesLoraError(f"{option(item.name)} is given without a value, but needs one: write {item.spelling}")
    value = coerce(item.name, given, item.hint)
    if value is None and item.required:
        raise BayesLoraError(f"{option(item.name)} is {given!r}, but is needed: write {item.spelling}")
    if item.least is not None and value is not None and value < item.least:
        raise BayesLoraError(f"{option(item.name)} is {value}, but must be at least {item.least}")
    return value


def build_plan(given: dict[str, Any], problems: Problems | None = None) -> TrainPlan:
    """Combine options from the command line (including `config`) with the YAML file and the defaults.

    Raises:
        BayesLoraError: the earlier `problems`, unknown options, values of the wrong type, contradictory options, or
            options that the config or `TrainingArguments` refuse. One sentence each.
    """
    problems = problems or Problems()
    given = _rank_as_r(given, problems)
    file = given.get("config")  # True without a value, which is told below
    values = with_goal({**(read_config(file) if file and file is not True else {}), **given}, problems)
    options = RunOptions(**read_options(COMMANDS["train"], values, problems))
    rest = {name: value for name, value in values.items() if name not in vars(options)}
    by_ivon = rest.get("optim") == IVON  # the Trainer knows the others
    if by_ivon:
        del rest["optim"]
    refused = {name: f"the command sets it: use {instead}" for name, instead in _TRAINING_FIELDS_SET_HERE.items()}
    if not by_ivon:
        refused |= dict.fromkeys(ivon_field_hints(), "needs --optim ivon: add that or leave this out")
    for name in [name for name in refused if name in rest]:
        problems.append(f"{option(name)} is given, but {refused[name]}")
        del rest[name]
    where = f"`bayeslora train --method {options.method} --list-options` lists all"
    method_options, training, ivon = _sorted_out(rest, options, where, problems)
    _fill_defaults(options, method_options, training, by_ivon)
    config_class = method_config_class(options.method)
    plan = TrainPlan(options, method_options, training, config_class, IvonOptions(**ivon) if by_ivon else None)
    _check_with_libraries(plan)
    return plan


def plan_options(
    given: dict[str, Any], problems: Problems
) -> tuple[PlanOptions, dict[str, Any], type[PeftConfig] | None]:
    """Return the options of `bayeslora plan`, those of the method and its config class; raise like `build_plan`."""
    given = _rank_as_r(given, problems)
    options = PlanOptions(**read_options(COMMANDS["plan"], given, problems))
    rest = {name: value for name, value in given.items() if name not in vars(options)}
    where = (
        "`bayeslora plan --help` shows its own options, and "
        f"`bayeslora train --method {options.method} --list-options` those of the method"
    )
    (method_options,) = _sorted_out(rest, options, where, problems)
    return options, shared_defaults(options.method) | method_options, method_config_class(options.method)


def _rank_as_r(given: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """Take `--rank` for `--r`, which torchrun refuses on its command line as short for several options of its own."""
    if "rank" in given and "r" in given:
        problems.append("--rank is given, but --r is given too: leave one out")
    return {"r" if name == "rank" else name: value for name, value in given.items()}


def _sorted_out(
    given: dict[str, Any], options: RunOptions | PlanOptions, where: str, problems: Problems
) -> list[dict[str, Any]]:
    """Return the method's options, for `train` also the trainer's and IVON's, converted to the types of their fields.

    Problems that the source of the configurations shows are raised first: importing their classes takes seconds.
    """
    method = options.method
    with problems.collected():
        check_method(method)
    if method not in method_names():
        problems.tell()  # its fields are unknown, too
    by_source = _method_hints_by_source, _training_hints_by_source
    for of_method, of_training in (by_source, (method_field_hints, training_field_hints)):
        groups = [of_method(method), *([of_training(), ivon_field_hints()] if isinstance(options, RunOptions) else [])]
        found = _converted(given, groups, options, where, problems)
        problems.tell()
    return found


def _converted(
    given: dict[str, Any],
    groups: list[dict[str, Any]],
    options: RunOptions | PlanOptions,
    where: str,
    problems: Problems,
) -> list[dict[str, Any]]:
    """Return each group's options, converted to the types of its fields of that name; open types are left out."""
    found: list[dict[str, Any]] = [{} for _ in groups]
    for name, value in given.items():
        with problems.collected():
            place = next((index for index, hints in enumerate(groups) if name in hints), None)
            if place is None:
                known = {*vars(options), *(n for g in groups for n in g)}
                raise _unknown_option(f"no_{name}" if value is False else name, options.method, known, where)
            if groups[place][name] is OPEN:
                continue
            found[place][name] = coerce(name, value, groups[place][name])
            _check_bounds(name, found[place][name])
    return found


def _check_bounds(name: str, value: Any) -> None:
    """Raise for numbers that the Trainer takes, and fails on later."""
    if name not in _BOUNDS or not isinstance(value, (int, float)):
        return
    least, most, way_out = _BOUNDS[name]
    if not least <= value <= most or (value == 0 and name in _NOT_ZERO):
        bound = f"at most {most}" if value > most else "above 0" if name in _NOT_ZERO else f"at least {least}"
        raise BayesLoraError(f"{option(name)} is {value}, but must be {bound}: {way_out}")


def _check_with_libraries(plan: TrainPlan) -> None:
    """Raise what the method's config and `TrainingArguments` refuse, of options that are valid by themselves."""
    from bayeslora.runs.adapt import check_options
    from bayeslora.runs.train import training_arguments

    problems = Problems()
    with problems.collected(), fields_as_options(plan.options.method):
        check_options(plan.config_class, plan.method_options)
    with problems.collected(), fields_as_options(plan.options.method):
        training_arguments(plan, plan.output_dir)
    problems.tell()


def fields_as_options(method: str) -> AbstractContextManager[None]:
    """Spell fields of configs that an error of the library names as the options they are given by."""

    def names() -> dict[str, str]:
        of_ivon = {name.removeprefix(IVON_PREFIX): name for name in ivon_field_hints()}
        return of_ivon | {name: name for name in (*method_field_hints(method), *training_field_hints())}

    return _spelled(names)


def arguments_as_options(command: str) -> AbstractContextManager[None]:
    """Spell arguments that an error of the library names as the options of a command that they are given by."""
    return _spelled(lambda: {item.name: item.name for item in COMMANDS[command].options})


@contextmanager
def _spelled(names: Callable[[], dict[str, str]]) -> Iterator[None]:
    try:
        yield
    except BayesLoraError as error:
        options = names()
        raise BayesLoraError(*(spelled_as_options(str(each), options) for each in error.args)) from error


def method_field_hints(method: str) -> dict[str, Any]:
    """Map names to type hints of the method's fields that a user may set; empty for full fine-tuning."""
    config_class = method_config_class(method)
    return {} if config_class is None else _hints(config_class)


def _method_hints_by_source(method: str) -> dict[str, Any]:
    """Return what `method_field_hints` does with hints from the source, where that is known."""
    hints = method_source_hints(method)
    return method_field_hints(method) if hints is None else _settable(hints)


def _training_hints_by_source() -> dict[str, Any]:
    hints = training_source_hints()
    return training_field_hints() if hints is None else _settable(hints)


def ivon_field_hints() -> dict[str, Any]:
    """Map names to type hints of the options of `--optim ivon`."""
    return _hints(IvonOptions)


def training_field_hints() -> dict[str, Any]:
    """Map names to type hints of the `TrainingArguments` that a user may set."""
    from transformers import TrainingArguments

    return _hints(TrainingArguments)


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return _settable({item.name: hints[item.name] for item in dataclasses.fields(cls) if item.init})


def _settable(hints: dict[str, Any]) -> dict[str, Any]:
    return {
        n: hint for n, hint in hints.items() if n not in _METHOD_FIELDS_SET_HERE | _TRAINING_FIELDS_SET_HERE.keys()
    }


def _unknown_option(name: str, method: str, known: Iterable[str], where: str) -> BayesLoraError:
    owners = [other for other in method_names() if name in _method_hints_by_source(other)]
    if owners:
        return BayesLoraError(
            f"{option(name)} is given, but belongs to --method {', '.join(owners)}, not to {method}: "
            "leave it out or change the method"
        )
    near = ", did you mean --learning-rate" if name == "lr" else close_matches(option(name), map(option, known))
    return BayesLoraError(f"unknown option {option(name)}{near}: {where}")


def shared_defaults(method: str) -> dict[str, Any]:
    """Return the library's defaults for the fields that every adapter method has, including plain LoRA."""
    from bayeslora.methods.config import AdapterConfig

    defaults = {item.name: item.default for item in dataclasses.fields(AdapterConfig)}
    fields = method_field_hints(method)
    return {name: defaults[name] for name in _SHARED_DEFAULTS if name in fields}


def _name_tagged_columns(options: RunOptions) -> None:
    """Name the columns of words and of tags, and the kind of task, where the training file tells them."""
    if options.task is not None or options.train_file is None:
        return
    found = tagged_form(first_columns(options.train_file))
    if options.kind == "token_classification" or options.kind is None and options.text_column is None and found:
        words, tags = found or (WORDS, TAGS[0])
        options.kind = "token_classification"
        options.text_column = options.text_column or [words]
        options.label_column = options.label_column or tags


def _fill_defaults(
    options: RunOptions, method_options: dict[str, Any], training: dict[str, Any], by_ivon: bool
) -> None:
    """Fill in the defaults that all methods share."""
    _name_tagged_columns(options)
    generates = options.text_column is None if options.task is None else options.task in TEXT_TASKS
    if options.task is None and options.label_column is None and not generates:
        options.label_column = "label"
    for name, value in shared_defaults(options.method).items():
        method_options.setdefault(name, value)
    evaluation = training.get("eval_strategy", "no")
    follow = evaluation if evaluation != "no" and training.get("load_best_model_at_end") else "steps"
    if by_ivon:
        # IVON divides by the Hessian without a square root, so its rate is larger. Clipping the whole gradient would
        # bias the Hessian, and the clip radius already bounds a step.
        training.setdefault("learning_rate", 0.4)
        training.setdefault("max_grad_norm", 0.0)
    training.setdefault("save_strategy", follow)
    training.setdefault("save_steps", training.get("eval_steps") or 0.1)
    for name, value in command_defaults(options.method, generates).items():
        training.setdefault(name, value)


def command_defaults(method: str, generates: bool = False) -> dict[str, Any]:
    """Return the defaults of `TrainingArguments` that `train` has in place of the library's."""
    return {
        "per_device_train_batch_size": 8 if generates else 32,
        "per_device_eval_batch_size": 8 if generates else 64,
        "learning_rate": 5e-5 if method == "full" else 1e-3,
        "num_train_epochs": 3.0,
        "seed": 0,
        "report_to": ["none"],
        "logging_steps": 0.01,
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
    }
