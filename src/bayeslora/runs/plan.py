"""A training run as it is planned: every option resolved, before any model or data is read.

`config.yaml` in an output folder is the plan's record; the command builds plans out of what is typed. This module is
imported for `--help`, too, so it imports neither torch, transformers nor peft.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import BayesLoraError

if TYPE_CHECKING:
    from peft import PeftConfig

# Options that say where and how to run, not what: left out of config.yaml, free to differ on --resume.
_NOT_RECORDED = {"output_dir", "config", "resume", "keep_checkpoints"}
_MACHINE_FIELDS = {"disable_tqdm", "dataloader_pin_memory"}
_PATH_OPTIONS = ("data_dir", "train_file", "eval_file", "test_file")


def declared(default: Any, metavar: str | None, text: str, **more: Any) -> Any:
    """Return a dataclass field that a command shows in its help; without a metavar it is a switch.

    Further metadata: `required`, and `least`, the smallest number allowed.
    """
    return field(default=default, metadata={"metavar": metavar, "help": text, **more})


@dataclass
class RunOptions:
    """The options of `bayeslora train` that are neither the method's nor `TrainingArguments`'."""

    method: str = declared("blora", "NAME", "blora, melora, blob, bayes_adalora, dylora, lora or full (blora)")
    model: str | None = declared(
        None, "FOLDER_OR_ID", "folder, installed model package or hub id of the base model", required=True
    )
    task: str | None = declared(
        None, "NAME", "sst2, cola, mrpc, rte, stsb, rotten_tomatoes, winogrande, arc_easy or openbookqa"
    )
    data_dir: str | None = declared(None, "DIR", "folder with <task>/<split>.jsonl; without it, the hub's data set")
    train_split: str | None = declared(None, "NAME", "train_xs, train_s (the default) or train_m of winogrande")
    few_shot: int = declared(0, "K", "training rows shown before each question of a prompt (0)", least=0)
    train_file: str | None = declared(None, "FILE", "training rows (.jsonl, .json, .csv, .parquet)")
    eval_file: str | None = declared(None, "FILE", "rows to score on")
    test_file: str | None = declared(None, "FILE", "further rows to score on")
    text_column: list[str] | None = declared(None, "A[,B]", "the text's column, or two: a,b for sentence pairs")
    label_column: str | None = declared(None, "NAME", "the label's column (label)")
    labels: list[str] | None = declared(None, "A,B,…", "class names in order of their ids (those seen, sorted)")
    output_dir: str | None = declared(None, "OUT", "new folder for the result", required=True)
    config: str | None = declared(None, "FILE", "YAML file of options; the command line overrides it")
    max_length: int | None = declared(None, "N", "longest input in tokens (128, or what the model takes)", least=1)
    dtype: typing.Literal["float32", "bfloat16", "float16"] = declared(
        "float32", "TYPE", "type the base model is loaded in (float32)"
    )
    samples: int = declared(
        0, "N", "Monte-Carlo samples of a stochastic adapter for the final scores (0: its mean)", least=0
    )
    resume: bool = declared(False, None, "continue the interrupted run in OUT.partial")
    keep_checkpoints: bool = declared(False, None, "keep the last checkpoints in OUT/checkpoints")


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


def read_config(path: str) -> dict[str, Any]:
    """Return the options in a YAML file, with dashes in names read as underscores."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BayesLoraError(f"cannot read --config {path} ({error.strerror}): name a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise BayesLoraError(f"{path} is not valid YAML{where}: correct it or name another --config") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise BayesLoraError(f"{path} does not hold options: write one `name: value` a line")
    return {key.replace("-", "_"): value for key, value in content.items()}


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first option, in the order of `new`, whose value differs; None when the two are the same."""
    for name in (*new, *(name for name in old if name not in new)):
        if old.get(name) != new.get(name):
            return name, old.get(name), new.get(name)
    return None
