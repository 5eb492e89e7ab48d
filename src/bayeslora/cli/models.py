"""Base models, their tokenizers, and finished runs, as the commands load them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from peft import PeftModel, TaskType, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import logging as transformers_logging

from bayeslora.data.packaged import as_dense, gguf_options
from bayeslora.errors import BayesLoraError
from bayeslora.evaluation.multiple_choice import DEFAULT_PROMPT_LENGTH
from bayeslora.export import load_integer
from bayeslora.export.container import looks_packed
from bayeslora.export.integer.index import is_integer_model
from bayeslora.posterior import POSTERIOR_FILE, WeightPosterior, load_posterior

RUN_FILE = "run.json"
_ADAPTER_FILE = "adapter_model.safetensors"
_TENSOR_PROBE = 64
_DEFAULT_LENGTH = 128
_GGUF = ".gguf"
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet"}

Head = Literal["sequence", "choices", "letters"]
"""What turns a model's states into class logits: a classifier (or regressor) over a text or a pair, a scorer of pairs
of question and choice, or the language model's own head at the letters of the choices."""
_AUTO_CLASSES = {
    "sequence": AutoModelForSequenceClassification,
    "choices": AutoModelForMultipleChoice,
    "letters": AutoModelForCausalLM,
}
# PEFT has no type for multiple choice; without one it wraps the model as it is.
_TASK_TYPES = {"sequence": TaskType.SEQ_CLS, "choices": None, "letters": TaskType.CAUSAL_LM}


@dataclass
class RunInfo:
    """What a finished run must remember to be loaded again; `run.json` in its folder."""

    method: str
    model: str
    task: str
    kind: Literal["classification", "regression", "multiple_choice"]
    metric: str
    text_columns: list[str]
    label_column: str
    labels: list[str]
    max_length: int
    dtype: str
    base_fingerprint: str
    base_name: str
    task_name: str | None = None
    data_dir: str | None = None
    head: Head = "sequence"
    train_split: str | None = None
    few_shot: int = 0
    files: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `run.json`."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / RUN_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> RunInfo:
        """Read `run.json`; raises BayesLoraError for a folder that is no finished run."""
        path = folder / RUN_FILE
        if not folder.is_dir():
            raise BayesLoraError(f"{folder} is no folder; name a folder that `bayeslora train` wrote.")
        if not path.is_file():
            raise BayesLoraError(f"{folder} holds no {RUN_FILE}; name a folder that `bayeslora train` wrote.")
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise BayesLoraError(f"{path} is damaged ({error}); train again or restore it from a copy.") from error


@dataclass
class BaseModel:
    """A base model ready to be adapted. `fresh` names modules whose weights the checkpoint did not hold."""

    model: PreTrainedModel
    fresh: list[str]
    fingerprint: str
    task_type: TaskType | None


def resolve_model(name: str) -> str:
    """Where `name` is: a model folder, a GGUF file, either of them in an installed package, or else a hub id."""
    path = Path(name).expanduser()
    if path.suffix == _GGUF and path.is_file():
        return str(path.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BayesLoraError(
                f"{name} is no model folder, it holds no config.json; name one saved by Transformers."
            )
        return str(path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise BayesLoraError(f"{name} is no model folder; name an existing folder, a model package or a hub id.")
    if "/" not in name:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            return name
        for file in files:
            folder = Path(str(file.locate())).parent
            if file.name == "config.json" and any(folder.glob("*.safetensors")):
                return str(folder)
            if file.suffix == _GGUF:
                return str(file.locate())
    return name


def head_for(kind: str, resolved: str, name: str) -> Head:
    """How a model, resolved from `name`, answers a task of this kind: as a language model where it is no encoder."""
    if kind != "multiple_choice":
        return "sequence"
    if resolved.endswith(_GGUF):  # always a language model, and slow to read
        return "letters"
    with loading(f"the configuration of {name}"):
        config = type(AutoConfig.from_pretrained(resolved))
    causal = config in MODEL_FOR_CAUSAL_LM_MAPPING and config not in MODEL_FOR_MASKED_LM_MAPPING
    return "letters" if causal else "choices"


def _source(resolved: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` for what `resolve_model` returned."""
    if not resolved.endswith(_GGUF):
        return {"pretrained_model_name_or_path": resolved}
    return {"pretrained_model_name_or_path": str(Path(resolved).parent), "gguf_file": Path(resolved).name}


def _weights(resolved: str) -> dict[str, Any]:
    return {**_source(resolved), **(gguf_options() if resolved.endswith(_GGUF) else {})}


def hush() -> None:
    """No progress bars of the loaders: the one bar a user sees is that of training."""
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns whatever a loader raises for unusable files into one sentence that names `what`."""
    try:
        yield
    except BayesLoraError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 160 else reason[:157] + "..."
        raise BayesLoraError(
            f"cannot load {what} ({type(error).__name__}: {reason}); check that it is complete and of the right kind."
        ) from error


def load_tokenizer(folder: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, GGUF file or hub id; one without a padding token pads with its end-of-text token."""
    with loading(f"the tokenizer of {name}"):
        tokenizer = AutoTokenizer.from_pretrained(**_source(folder))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BayesLoraError(f"the tokenizer of {name} has neither padding nor end token; add one and save it.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    labels: list[str],
    regression: bool,
    dtype: str,
    head: Head = "sequence",
) -> BaseModel:
    """The base model with the head that the task needs; `labels` and `regression` are for a sequence classifier.

    Weights the checkpoint does not hold are initialised from the global random state; their modules are named in
    `fresh`, so that a caller can train and save them.
    """
    resolved = resolve_model(name)
    # The reader of GGUF files has a progress bar that nothing turns off.
    quiet = redirect_stderr(io.StringIO()) if resolved.endswith(_GGUF) else nullcontext()
    with loading(f"model {name}"), quiet:
        model, info = _AUTO_CLASSES[head].from_pretrained(
            **_weights(resolved),
            dtype=getattr(torch, dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **(_classes(labels, regression) if head == "sequence" else {}),
        )
    if resolved.endswith(_GGUF):
        as_dense(model)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    missing = {*info["missing_keys"], *mismatched}
    prefix = model.base_model_prefix + "."
    fresh = sorted({key.removeprefix(prefix).split(".")[0] for key in missing})
    if len(missing) > len(list(model.parameters())) / 2:
        raise BayesLoraError(
            f"the weights in {name} do not fit its config.json ({len(missing)} tensors are missing); "
            "name a complete model."
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise BayesLoraError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens and the model "
            f"{model.get_input_embeddings().num_embeddings}; name a model with its own tokenizer."
        )
    return BaseModel(model, fresh, _fingerprint(model, fresh), _TASK_TYPES[head])


def _classes(labels: list[str], regression: bool) -> dict[str, Any]:
    if regression:
        return {"num_labels": 1, "problem_type": "regression"}
    ids = {name: index for index, name in enumerate(labels)}
    names = {"id2label": dict(enumerate(labels)), "label2id": ids}
    return {"num_labels": len(labels), "problem_type": "single_label_classification", **names}


def longest_input(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: int | None, head: Head = "sequence"
) -> int:
    """The number of tokens of the longest input: `wanted`, or 128 (2,048 for prompts, which are not cut), or less
    where model and tokenizer do not take as many."""
    default = DEFAULT_PROMPT_LENGTH if head == "letters" else _DEFAULT_LENGTH
    positions = getattr(model.config, "max_position_embeddings", None)
    # RoBERTa's positions start after its padding id.
    offset = model.config.pad_token_id + 1 if model.config.model_type in _OFFSET_POSITIONS else 0
    limit = min(int(min(tokenizer.model_max_length, 10**9)), positions - offset if positions else 10**9)
    if wanted is not None and wanted > limit:
        raise BayesLoraError(f"--max-length is {wanted}, but the model takes {limit} tokens; give at most {limit}.")
    return wanted or min(default, limit)


def _fingerprint(model: PreTrainedModel, fresh: list[str]) -> str:
    """A digest of names, shapes and a probe of each pretrained weight: two checkpoints of one shape differ in it."""
    digest = hashlib.sha256()
    prefix = model.base_model_prefix + "."
    for name, parameter in sorted(model.named_parameters()):
        if name.removeprefix(prefix).split(".")[0] in fresh or not name.startswith(prefix):
            continue
        values = parameter.detach().flatten()
        probe = values[:: max(1, values.numel() // _TENSOR_PROBE)][:_TENSOR_PROBE].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(probe.numpy().tobytes())
    return digest.hexdigest()[:16]


def load_run(folder: Path, model: str | None = None) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, RunInfo]:
    """The trained model of a finished run in evaluation mode, its tokenizer, and what it remembers.

    Args:
        folder: the output folder of `bayeslora train`.
        model: where the base model is now; by default where it was at training.

    Raises:
        BayesLoraError: the folder is no run, a file is damaged, or the base model is not the one trained on.
    """
    hush()
    info = RunInfo.load(folder)
    tokenizer = load_tokenizer(str(folder), str(folder))
    if is_integer_model(folder):
        return ready(load_integer(folder)), tokenizer, info
    if info.method == "full":
        with loading(f"the model in {folder}"):
            trained = _AUTO_CLASSES[info.head].from_pretrained(folder, dtype=getattr(torch, info.dtype))
        return ready(trained), tokenizer, info
    _check_adapter_files(folder, info)
    name = model or info.model
    with torch.random.fork_rng(devices=[]):
        base = load_base(
            name,
            tokenizer,
            labels=info.labels,
            regression=info.kind == "regression",
            dtype=info.dtype,
            head=info.head,
        )
    if base.fingerprint != info.base_fingerprint:
        raise BayesLoraError(
            f"the adapter in {folder} was trained on {info.model}, and the weights of {name} are others; "
            "name the right one with --model."
        )
    with loading(f"the adapter in {folder}"):
        adapted = PeftModel.from_pretrained(base.model, folder)
    _check_keys(adapted, folder)
    return ready(adapted), tokenizer, info


def with_posterior(model: torch.nn.Module, folder: Path) -> torch.nn.Module | WeightPosterior:
    """The model of a run as something to predict with: with its weights' posterior where the run has saved one."""
    return load_posterior(model, folder) if (folder / POSTERIOR_FILE).is_file() else model


def ready(model: torch.nn.Module) -> torch.nn.Module:
    """The model in evaluation mode, on the GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval()


def _check_adapter_files(folder: Path, info: RunInfo) -> None:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base_name = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise BayesLoraError(f"{path} is missing or damaged; train again or restore it from a copy.") from error
    if base_name != info.base_name:
        raise BayesLoraError(
            f"the adapter in {folder} was made for {base_name}, and the run trained {info.base_name}; "
            "restore the run's own adapter files."
        )
    weights = folder / _ADAPTER_FILE
    if not weights.is_file():
        raise BayesLoraError(f"{weights} is missing; train again or restore it from a copy.")
    try:
        with safe_open(weights, framework="pt") as file:
            list(file.keys())
    except (SafetensorError, OSError) as error:
        size = os.path.getsize(weights)
        raise BayesLoraError(
            f"{weights} ({size} bytes) is damaged or cut short; restore or train it again."
        ) from error


def _check_keys(model: PeftModel, folder: Path) -> None:
    """An adapter whose tensors did not all find their place would run untrained, silently."""
    if looks_packed(folder / _ADAPTER_FILE):
        return  # compared with the model while it was loaded
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(folder / _ADAPTER_FILE, framework="pt") as file:
        found = set(file.keys())
    for keys, verb in ((wanted - found, "lacks"), (found - wanted, "has no place for")):
        if keys:
            owner = _ADAPTER_FILE if verb == "lacks" else "the model"
            raise BayesLoraError(
                f"the adapter in {folder} does not fit its config: {owner} {verb} {min(keys)}; restore its own files."
            )
