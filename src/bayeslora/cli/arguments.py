"""The options of `bayeslora train`: its own, those of the method's config, those of `TrainingArguments`.

All three live in one flat name space, on the command line (`--lora-alpha 16`, `--lora_alpha 16`, `--lora-alpha=16`)
and in the YAML file of `--config`; the command line wins. `config.yaml` in an output folder is such a file.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any

from bayeslora.cli.coercion import coerce
from bayeslora.errors import BayesLoraError, close_matches, option
from bayeslora.runs.plan import IVON, IvonOptions, RunOptions, TrainPlan, read_config

if TYPE_CHECKING:
    from peft import PeftConfig

# Fields that the commands fill themselves; a user's value would be overwritten or would break the output folder.
_METHOD_FIELDS_SET_HERE = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "runtime_config",
}
_TRAINING_FIELDS_SET_HERE = {"output_dir": "--output-dir", "resume_from_checkpoint": "--resume"}
METHOD_DEFAULTS = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
"""What the commands choose for every method that has these fields."""


def build_plan(given: dict[str, Any]) -> TrainPlan:
    """Resolve options from the command line (`config` among them) against the YAML file, the method and defaults.

    Raises:
        BayesLoraError: an unknown option, a value of the wrong type, or options that contradict each other.
    """
    file_options = read_config(given["config"]) if given.get("config") else {}
    values = {**file_options, **given}
    own_fields = {f.name: hint for f, hint in _fields(RunOptions)}
    options = RunOptions(
        **{name: coerce(name, values[name], hint) for name, hint in own_fields.items() if name in values}
    )

    from bayeslora.cli.registry import method_config_class

    config_class = method_config_class(options.method)
    method_fields = method_field_hints(config_class)
    training_fields = training_field_hints()
    method_options: dict[str, Any] = {}
    training_options: dict[str, Any] = {}
    by_ivon = values.get("optim") == IVON  # the trainer knows the others
    ivon_fields = ivon_field_hints()
    ivon_options: dict[str, Any] = {}
    for name, value in values.items():
        if name in own_fields or (by_ivon and name == "optim"):
            continue
        if name in _TRAINING_FIELDS_SET_HERE:
            raise BayesLoraError(f"{option(name)} cannot be set; use {_TRAINING_FIELDS_SET_HERE[name]}.")
        if name in ivon_fields:
            if not by_ivon:
                raise BayesLoraError(f"{option(name)} is of use only with --optim ivon; add it or leave this out.")
            ivon_options[name] = coerce(name, value, ivon_fields[name])
        elif name in method_fields:
            method_options[name] = coerce(name, value, method_fields[name])
        elif name in training_fields:
            training_options[name] = coerce(name, value, training_fields[name])
        else:
            where = f"`bayeslora train --method {options.method} --list-options` lists them all"
            known = {*own_fields, *ivon_fields, *method_fields, *training_fields}
            raise unknown_option(name, options.method, known, where)
    _check(options, method_options)
    _fill_defaults(options, method_fields, method_options, training_options, by_ivon)
    ivon = IvonOptions(**ivon_options) if by_ivon else None
    return TrainPlan(options, method_options, training_options, config_class, ivon)


def parse_open_options(tokens: list[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--name` (true) and `--no-name` (false) as a dict; names get underscores."""
    found: dict[str, Any] = {}
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if not token.startswith("--") or len(token) < 3:
            raise BayesLoraError(f"unexpected argument {token!r}; every option of train is written --name value.")
        name, equals, text = token[2:].partition("=")
        name = name.replace("-", "_")
        value: Any = text
        if not equals:
            if position < len(tokens) and not tokens[position].startswith("--"):
                value = tokens[position]
                position += 1
            elif name.startswith("no_"):
                name, value = name.removeprefix("no_"), False
            else:
                value = True
        if name in found:
            raise BayesLoraError(f"{option(name)} is given twice; give it once.")
        found[name] = value
    return found


def method_field_hints(config_class: type[PeftConfig] | None) -> dict[str, Any]:
    """Name → type hint of the method's fields a user may set; none for full fine-tuning."""
    if config_class is None:
        return {}
    return {f.name: hint for f, hint in _fields(config_class) if f.name not in _METHOD_FIELDS_SET_HERE}


def ivon_field_hints() -> dict[str, Any]:
    """Name → type hint of the options of `--optim ivon`."""
    return {f.name: hint for f, hint in _fields(IvonOptions)}


def training_field_hints() -> dict[str, Any]:
    """Name → type hint of the `TrainingArguments` a user may set."""
    from transformers import TrainingArguments

    return {f.name: hint for f, hint in _fields(TrainingArguments) if f.name not in _TRAINING_FIELDS_SET_HERE}


def _fields(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(f, hints[f.name]) for f in dataclasses.fields(cls) if f.init]


def unknown_option(name: str, method: str, known: set[str], where: str) -> BayesLoraError:
    """The error for an option that `method` does not have; `where` says which command lists those there are."""
    from bayeslora.cli.registry import method_config_class, method_names

    owners = [other for other in method_names() if name in method_field_hints(method_config_class(other))]
    if owners:
        return BayesLoraError(
            f"{option(name)} belongs to --method {', '.join(owners)}, not to {method}; "
            "leave it out or change the method."
        )
    near = close_matches(name, known).replace("_", "-")
    return BayesLoraError(f"unknown option {option(name)}{near}; {where}.")


def _check(options: RunOptions, method_options: dict[str, Any]) -> None:
    if options.model is None:
        raise BayesLoraError("no base model given; add --model with a folder, a model package or a hub id.")
    if options.output_dir is None:
        raise BayesLoraError("no output folder given; add --output-dir with a new folder.")
    files = [name for name in ("train_file", "eval_file", "test_file") if getattr(options, name)]
    if options.task and files:
        raise BayesLoraError(f"--task {options.task} contradicts {option(files[0])}; give a task or files, not both.")
    if options.task:
        for name in ("text_column", "label_column", "labels"):
            if getattr(options, name):
                raise BayesLoraError(
                    f"{option(name)} contradicts --task {options.task}, whose columns are known; leave it out."
                )
    else:
        if options.train_split:
            raise BayesLoraError("--train-split is of use only with --task; leave it out.")
        if options.data_dir:
            raise BayesLoraError(
                "--data-dir is of use only with --task; add it, or give --train-file and --eval-file."
            )
        for name in ("train_file", "eval_file"):
            if not getattr(options, name):
                raise BayesLoraError(f"{option(name)} is missing; give --task, or --train-file and --eval-file.")
        if not options.text_column:
            raise BayesLoraError("--text-column is missing; name the column (or two, a,b) that holds the text.")
        if len(options.text_column) > 2:
            raise BayesLoraError(f"--text-column names {len(options.text_column)} columns; name one or two.")
    if options.few_shot < 0:
        raise BayesLoraError(f"--few-shot is {options.few_shot}; give 0 or more.")
    if options.max_length is not None and options.max_length < 1:
        raise BayesLoraError(f"--max-length is {options.max_length}; give at least 1 token.")
    rank = method_options.get("r")
    if isinstance(rank, int) and rank < 1:
        raise BayesLoraError(f"--r is {rank}; a rank of at least 1 is needed to start from.")


def _fill_defaults(
    options: RunOptions,
    method_fields: dict[str, Any],
    method_options: dict[str, Any],
    training: dict[str, Any],
    by_ivon: bool,
) -> None:
    """One set of defaults for all adapter methods, so that two runs differ in nothing but `--method`."""
    if options.task is None and options.label_column is None:
        options.label_column = "label"
    for name, value in METHOD_DEFAULTS.items():
        if name in method_fields:
            method_options.setdefault(name, value)
    evaluation = training.get("eval_strategy", "no")
    follow = evaluation if evaluation != "no" and training.get("load_best_model_at_end") else "steps"
    training.setdefault("per_device_train_batch_size", 32)
    training.setdefault("per_device_eval_batch_size", 64)
    if by_ivon:
        # A rate of another kind: no square root is taken. Clipping the whole gradient would bias the Hessian, and
        # the clip radius bounds a step already.
        training.setdefault("learning_rate", 0.4)
        training.setdefault("max_grad_norm", 0.0)
    training.setdefault("learning_rate", 1e-3 if method_fields else 5e-5)
    training.setdefault("num_train_epochs", 3.0)
    training.setdefault("seed", 0)
    training.setdefault("report_to", ["none"])
    training.setdefault("logging_steps", 0.01)
    training.setdefault("save_strategy", follow)
    training.setdefault("save_steps", training.get("eval_steps") or 0.1)
    training.setdefault("save_total_limit", 2)
