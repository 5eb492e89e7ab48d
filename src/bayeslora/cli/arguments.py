"""The options of `bayeslora train`: its own, those of the method's config, those of `TrainingArguments`.

All three live in one flat name space, on the command line (`--lora-alpha 16`, `--lora_alpha 16`, `--lora-alpha=16`)
and in the YAML file of `--config`; the command line wins. `config.yaml` in an output folder is such a file.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bayeslora.cli.coercion import close_matches, coerce, option
from bayeslora.errors import BayesLoraError

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

# Options that say where and how to run, not what: left out of config.yaml, free to differ on --resume.
_NOT_RECORDED = {"output_dir", "config", "resume", "keep_checkpoints"}
_MACHINE_FIELDS = {"disable_tqdm", "dataloader_pin_memory"}
_PATH_OPTIONS = ("data_dir", "train_file", "eval_file", "test_file")


@dataclass
class RunOptions:
    """The options of `bayeslora train` that are neither the method's nor `TrainingArguments`'."""

    method: str = field(
        default="blora",
        metadata={"help": "blora, melora, blob, bayes_adalora, dylora, lora or full (blora)", "metavar": "NAME"},
    )
    model: str | None = field(
        default=None,
        metadata={"help": "folder, installed model package or hub id of the base model", "metavar": "FOLDER_OR_ID"},
    )
    task: str | None = field(
        default=None,
        metadata={
            "help": "sst2, cola, mrpc, rte, stsb, rotten_tomatoes, winogrande, arc_easy or openbookqa",
            "metavar": "NAME",
        },
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "folder with <task>/<split>.jsonl; without it, the hub's data set", "metavar": "DIR"},
    )
    train_split: str | None = field(
        default=None, metadata={"help": "train_xs, train_s (the default) or train_m of winogrande", "metavar": "NAME"}
    )
    few_shot: int = field(
        default=0, metadata={"help": "training rows shown before each question of a prompt (0)", "metavar": "K"}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "training rows (.jsonl, .json, .csv, .parquet)", "metavar": "FILE"}
    )
    eval_file: str | None = field(default=None, metadata={"help": "rows to score on", "metavar": "FILE"})
    test_file: str | None = field(default=None, metadata={"help": "further rows to score on", "metavar": "FILE"})
    text_column: list[str] | None = field(
        default=None, metadata={"help": "the text's column, or two: a,b for sentence pairs", "metavar": "A[,B]"}
    )
    label_column: str | None = field(default=None, metadata={"help": "the label's column (label)", "metavar": "NAME"})
    labels: list[str] | None = field(
        default=None, metadata={"help": "class names in order of their ids (those seen, sorted)", "metavar": "A,B,…"}
    )
    output_dir: str | None = field(default=None, metadata={"help": "new folder for the result", "metavar": "OUT"})
    config: str | None = field(
        default=None, metadata={"help": "YAML file of options; the command line overrides it", "metavar": "FILE"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "longest input in tokens (128, or what the model takes)", "metavar": "N"}
    )
    dtype: typing.Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "type the base model is loaded in (float32)", "metavar": "TYPE"}
    )
    samples: int = field(
        default=0,
        metadata={
            "help": "Monte-Carlo samples of a stochastic adapter for the final scores (0: its mean)",
            "metavar": "N",
        },
    )
    resume: bool = field(default=False, metadata={"help": "continue the interrupted run in OUT.partial"})
    keep_checkpoints: bool = field(default=False, metadata={"help": "keep the last checkpoints in OUT/checkpoints"})


IVON = "ivon"
_IVON_PREFIX = "ivon_"


@dataclass
class IvonOptions:
    """The options of `--optim ivon`; its learning rate and weight decay are those of `TrainingArguments`."""

    ivon_ess: float | None = None
    """λ, the effective sample size; by default the number of training examples."""
    ivon_hess_init: float = 1.0
    """h at the start; with the default β2 it hardly moves, and sets the posterior's width."""
    ivon_beta1: float = 0.9
    ivon_beta2: float = 0.99999
    ivon_clip_radius: float = 1e-3
    """ξ, the largest change of a weight in a step, in units of the learning rate."""

    def keywords(self) -> dict[str, Any]:
        """What `bayeslora.IVON` is given by name."""
        values = {f.name.removeprefix(_IVON_PREFIX): getattr(self, f.name) for f in dataclasses.fields(self)}
        values["betas"] = (values.pop("beta1"), values.pop("beta2"))
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class TrainPlan:
    """What one `bayeslora train` does: every option resolved, defaults included."""

    options: RunOptions
    method_options: dict[str, Any]
    training_options: dict[str, Any]
    config_class: type[PeftConfig] | None
    ivon: IvonOptions | None = None

    @property
    def output_dir(self) -> Path:
        assert self.options.output_dir is not None
        return Path(self.options.output_dir)

    @property
    def seed(self) -> int:
        return int(self.training_options["seed"])

    def record(self) -> dict[str, Any]:
        """What `config.yaml` holds; running it again gives the same run."""
        own = {
            name: value
            for name, value in dataclasses.asdict(self.options).items()
            if name not in _NOT_RECORDED and value is not None
        }
        for name in (*_PATH_OPTIONS, "model"):
            if name in own and os.path.exists(own[name]):
                own[name] = os.path.abspath(own[name])
        training = {name: value for name, value in self.training_options.items() if name not in _MACHINE_FIELDS}
        ivon = {} if self.ivon is None else {"optim": IVON, **dataclasses.asdict(self.ivon)}
        optimizer = {name: value for name, value in ivon.items() if value is not None}
        return {**own, **optimizer, **self.method_options, **training}


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


def read_config(path: str) -> dict[str, Any]:
    """The options in a YAML file, with dashes in names read as underscores."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BayesLoraError(f"cannot read --config {path} ({error.strerror}); name a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise BayesLoraError(f"{path} is not valid YAML{where}; correct it or name another --config.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise BayesLoraError(f"{path} holds no options; one `name: value` a line is needed.")
    return {key.replace("-", "_"): value for key, value in content.items()}


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


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first option, in the order of `new`, whose value differs; None when the two are the same."""
    for name in (*new, *(name for name in old if name not in new)):
        if old.get(name) != new.get(name):
            return name, old.get(name), new.get(name)
    return None


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
