"""Plan of a training run: every option resolved before any model or data is read.

`config.yaml` in an output folder records the plan. `--help` imports this module too, so it imports neither torch,
transformers nor peft.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bayeslora.errors import BayesLoraError
from bayeslora.files import parse_yaml
from bayeslora.vocabulary import Normalization, Scoring

if TYPE_CHECKING:
    from peft import PeftConfig

# Options about where and how to run: not recorded in config.yaml, and free to differ on --resume.
_NOT_RECORDED = {"output_dir", "config", "resume", "keep_checkpoints", "report_rows"}
_MACHINE_FIELDS = {"disable_tqdm", "dataloader_pin_memory"}
_PATH_OPTIONS = ("data_dir", "train_file", "eval_file", "test_file")


def declared(default: Any, metavar: str | None, text: str, **more: Any) -> Any:
    """Return a dataclass field with a help text; without a metavar it is a switch.

    `more` may hold `required`, `least` (the smallest number allowed) and `is_data` (a data file that must exist).
    """
    return field(default=default, metadata={"metavar": metavar, "help": text, **more})


@dataclass
class RunOptions:
    """Options of `bayeslora train`, apart from those of the method and of `TrainingArguments`."""

    method: str = declared("blora", "NAME", "blora, melora, blob, bayes_adalora, dylora, lora or full (blora)")
    model: str | None = declared(
        None, "FOLDER_OR_ID", "folder, installed model package or hub id of the base model", required=True
    )
    task: str | None = declared(
        None,
        "NAME",
        "mnli, sst2, cola, qqp, qnli, rte, mrpc, stsb, snli, boolq, ag_news, subj, trec, winogrande, arc_easy, "
        "arc_challenge, openbookqa, commonsenseqa, piqa, squad, e2e, rotten_tomatoes or rotten_tomatoes_small",
    )
    data_dir: str | None = declared(None, "DIR", "folder with <task>/<split>.jsonl (the hub's data set)")
    train_split: str | None = declared(None, "NAME", "train_xs, train_s (the default) or train_m of winogrande")
    few_shot: int = declared(0, "K", "training rows shown before each question of a prompt (0)", least=0)
    scoring: Scoring | None = declared(None, "NAME", "language models answer by letters or cloze (that of the task)")
    normalization: Normalization | None = declared(
        None, "UNIT", "cloze: divide log-likelihoods by none, tokens or bytes (that of the task)"
    )
    train_file: str | None = declared(
        None,
        "FILE",
        "training rows, conversations, or words with tags (.jsonl, .json, .csv, .tsv, .parquet, CoNLL)",
        is_data=True,
    )
    eval_file: str | None = declared(
        None, "FILE", "rows to score (of text to generate: a tenth held out)", is_data=True
    )
    eval_fraction: float | None = declared(
        None, "P", "hold out this share of --train-file and score it; each label keeps its share"
    )
    group_column: str | None = declared(
        None, "NAME", "with --eval-fraction: rows with the same value in this column stay on one side"
    )
    split_seed: int | None = declared(None, "N", "seed of --eval-fraction (0)", least=0)
    test_file: str | None = declared(None, "FILE", "further rows to score", is_data=True)
    text_column: list[str] | None = declared(None, "A[,B]", "text column, or two columns a,b for sentence pairs")
    label_column: str | None = declared(
        None, "NAME", "label column (label); of several labels a row a column of lists, or columns of 0 and 1 a,b,c"
    )
    labels: list[str] | None = declared(
        None, "A,B,…", "class names in the order of their numbers (those in the data, sorted)"
    )
    kind: Literal["classification", "regression", "multi_label", "token_classification"] | None = declared(
        None, "NAME", "classification, regression, multi_label or token_classification (guessed from the labels)"
    )
    class_weights: list[str] | None = declared(
        None, "WEIGHTS", "weigh rows by class: balanced, or NAME=W,… (all alike); only ratios matter"
    )
    output_dir: str | None = declared(None, "OUT", "new folder for the result", required=True)
    config: str | None = declared(None, "FILE", "YAML file of options; the command line takes precedence")
    max_length: int | None = declared(
        None, "N", "maximum input length in tokens (128, of text to generate 1024, or the model's limit)", least=1
    )
    dtype: Literal["float32", "bfloat16", "float16"] = declared(
        "float32", "TYPE", "float32, bfloat16 or float16, of the base model (float32)"
    )
    samples: int = declared(
        0, "N", "draws of the weights for the final scores, of Me-LoRA, BLoB or IVON (0: the mean weights)", least=0
    )
    swag: int | None = declared(
        None, "K", "learn a posterior by SWAG: K iterates of the last quarter of training (none)", least=2
    )
    resume: bool = declared(False, None, "continue the interrupted run in OUT.partial")
    report_rows: int = declared(
        5, "N", "evaluation rows that the report shows with their texts: least certain, most wrong (5)", least=0
    )
    keep_checkpoints: bool = declared(False, None, "keep the last checkpoints in OUT/checkpoints")


IVON = "ivon"
IVON_PREFIX = "ivon_"


@dataclass
class IvonOptions:
    """Options of `--optim ivon`; learning rate and weight decay are those of `TrainingArguments`."""

    ivon_ess: float | None = None
    """λ, the effective sample size; by default the number of training examples."""
    ivon_hess_init: float = 1.0
    """Initial h; with the default β2 it hardly changes and determines the posterior's width."""
    ivon_beta1: float = 0.9
    ivon_beta2: float = 0.99999
    ivon_clip_radius: float = 1e-3
    """ξ, the maximum change of a weight per step, in units of the learning rate."""

    def keywords(self) -> dict[str, Any]:
        """Return the keyword arguments of `bayeslora.IVON`."""
        values = {f.name.removeprefix(IVON_PREFIX): getattr(self, f.name) for f in dataclasses.fields(self)}
        values["betas"] = (values.pop("beta1"), values.pop("beta2"))
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class TrainPlan:
    """Everything that determines a training run: all options, including defaults."""

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
    def has_weight_posterior(self) -> bool:
        """True if the run saves a posterior over its weights, from IVON or SWAG."""
        return self.ivon is not None or self.options.swag is not None

    @property
    def seed(self) -> int:
        return int(self.training_options["seed"])

    def record(self) -> dict[str, Any]:
        """Return the content of `config.yaml`, which reproduces the run."""
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
    """Read the options in a YAML file; dashes in names become underscores."""
    import yaml

    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BayesLoraError(f"cannot read --config {path} ({error.strerror}): name a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f" in line {mark.line + 1}" if mark else ""
        why = f" ({problem})" if problem else ""
        raise BayesLoraError(f"{path} is not valid YAML{where}{why}: correct it or name another --config") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise BayesLoraError(f"{path} is not a mapping, but must hold options: write one `name: value` per line")
    return {key.replace("-", "_"): value for key, value in content.items()}


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first option, in the order of `new`, whose value differs; None if all are equal."""
    for name in (*new, *(name for name in old if name not in new)):
        if old.get(name) != new.get(name):
            return name, old.get(name), new.get(name)
    return None
