"""Load base models with the head that a task needs, and their tokenizers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import TaskType
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from bayeslora.cost.structure import is_decoder
from bayeslora.data.packaged import ENCODER_PACKAGE, as_dense, gguf_options
from bayeslora.errors import BayesLoraError, one_line
from bayeslora.evaluation.items import DEFAULT_PROMPT_LENGTH
from bayeslora.runs.info import Head
from bayeslora.vocabulary import Scoring

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)
_TENSOR_PROBE = 64
_DEFAULT_LENGTH = 128
_GGUF = ".gguf"
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet"}

AUTO_CLASSES = {
    "sequence": AutoModelForSequenceClassification,
    "choices": AutoModelForMultipleChoice,
    "letters": AutoModelForCausalLM,
    "cloze": AutoModelForCausalLM,
}
LANGUAGE_HEADS = ("letters", "cloze")
# PEFT lacks a task type for multiple choice; without a type it wraps the model unchanged.
_TASK_TYPES = {
    "sequence": TaskType.SEQ_CLS,
    "choices": None,
    "letters": TaskType.CAUSAL_LM,
    "cloze": TaskType.CAUSAL_LM,
}


@dataclass
class BaseModel:
    """A base model to be adapted; `fresh` names the modules whose weights were missing from the checkpoint."""

    model: PreTrainedModel
    fresh: list[str]
    fingerprint: str
    task_type: TaskType | None


def resolve_model(name: str, *, tokenizer_only: bool = False) -> str:
    """Return the path of a model folder or GGUF file, also in an installed package; otherwise `name` as a hub id."""
    path = Path(name).expanduser()
    if path.suffix == _GGUF and path.is_file():
        return str(path.resolve())
    if path.is_dir():
        if not tokenizer_only and not (path / "config.json").is_file():
            raise BayesLoraError(f"{name} lacks config.json, but must have it: name a folder that Transformers saved")
        return str(path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise BayesLoraError(f"{name} is not a model, but must be one: name a folder, a model package or a hub id")
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


def head_for(kind: str, resolved: str, name: str, scoring: Scoring = "letters") -> Head:
    """Return the head that a task of this kind needs on the model `name`, resolved to `resolved`.

    That of a language model on multiple choice is `scoring`.
    """
    if kind != "multiple_choice":
        return "sequence"
    if resolved.endswith(_GGUF):  # always a language model, and slow to read
        return scoring
    with load_errors(f"the configuration of {name}", resolved):
        config = AutoConfig.from_pretrained(resolved)
    return scoring if is_decoder(config) else "choices"


def source(resolved: str) -> dict[str, Any]:
    """Return arguments of `from_pretrained` for a result of `resolve_model`."""
    if not resolved.endswith(_GGUF):
        return {"pretrained_model_name_or_path": resolved}
    return {"pretrained_model_name_or_path": str(Path(resolved).parent), "gguf_file": Path(resolved).name}


def _weights(resolved: str) -> dict[str, Any]:
    return {**source(resolved), **(gguf_options() if resolved.endswith(_GGUF) else {})}


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the loaders' progress bars and their report of new weights, which the adapter's files replace."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    datasets_bars = not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if datasets_bars:
            datasets.enable_progress_bars()


@contextmanager
def load_errors(what: str, model: str | None = None) -> Iterator[None]:
    """Turn errors that loaders raise for unusable files into a BayesLoraError that names `what`.

    If `model`, a result of `resolve_model`, is out of reach, the error says that instead.
    """
    try:
        yield
    except BayesLoraError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, SafetensorError) as error:
        if model is not None and not _is_found(model):
            raise BayesLoraError(
                f"the model {model} is neither a folder nor an installed package, and the hub lacks it or cannot be "
                f"reached: give a folder, a hub id such as owner/name, or a package such as {ENCODER_PACKAGE}"
            ) from error
        reason = one_line(error)
        reason = reason if len(reason) <= 160 else reason[:157] + "..."
        raise BayesLoraError(
            f"cannot load {what} ({type(error).__name__}: {reason}): check that it is complete and of the right kind"
        ) from error


def _is_found(model: str) -> bool:
    """Return whether a result of `resolve_model` is on this machine, or the hub has its configuration."""
    if Path(model).exists():
        return True
    try:
        AutoConfig.from_pretrained(model)
    except OSError:
        return False
    except ValueError:  # a configuration of an unknown kind
        return True
    return True


def load_tokenizer(folder: str, name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, GGUF file or hub id; the end token replaces a missing padding token."""
    with load_errors(f"the tokenizer of {name}", folder):
        tokenizer = AutoTokenizer.from_pretrained(**source(folder))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BayesLoraError(f"the tokenizer of {name} lacks a padding and an end token, but needs one: add it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has tokenizer files; without them Transformers may make an empty tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the vocabulary: the tokens and their numbers."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{number}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def ready(model: torch.nn.Module, device: str | torch.device | None = None) -> torch.nn.Module:
    """Return the model in evaluation mode on `device`, by default on the GPU if one is available."""
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def load_base(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    labels: list[str],
    regression: bool,
    dtype: str,
    head: Head = "sequence",
) -> BaseModel:
    """Load the base model with `head`; `labels` and `regression` configure a sequence classifier.

    Weights missing from the checkpoint are drawn from the global random state; `fresh` names their modules, so that
    the caller can train and save them.
    """
    resolved = resolve_model(name)
    # The GGUF reader's progress bar cannot be turned off.
    quiet = redirect_stderr(io.StringIO()) if resolved.endswith(_GGUF) else nullcontext()
    with load_errors(f"model {name}", resolved), quiet:
        model, info = AUTO_CLASSES[head].from_pretrained(
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
            f"the weights in {name} do not fit its config.json ({len(missing)} tensors are missing): "
            "name a complete model"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise BayesLoraError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, but the model has only "
            f"{model.get_input_embeddings().num_embeddings}: name a model with a matching tokenizer"
        )
    return BaseModel(model, fresh, _fingerprint(model, fresh), _TASK_TYPES[head])


def _classes(labels: list[str], regression: bool) -> dict[str, Any]:
    if regression:
        return {"num_labels": 1, "problem_type": "regression"}
    ids = {name: index for index, name in enumerate(labels)}
    names = {"id2label": dict(enumerate(labels)), "label2id": ids}
    return {"num_labels": len(labels), "problem_type": "single_label_classification", **names}


def longest_input(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, wanted: int | None, head: Head = "sequence"
) -> int:
    """Return the maximum input length in tokens.

    It is `wanted`, by default 128 (2,048 for prompts, which are not truncated) or the model's limit if that is lower.
    """
    config: Any = model.config
    default = DEFAULT_PROMPT_LENGTH if head in LANGUAGE_HEADS else _DEFAULT_LENGTH
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa's positions start after its padding id.
    offset = config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS else 0
    limit = min(int(min(tokenizer.model_max_length, 10**9)), positions - offset if positions else 10**9)
    if wanted is not None and wanted > limit:
        raise BayesLoraError(f"--max-length is {wanted}, but the model accepts {limit} tokens: give at most {limit}")
    return wanted or min(default, limit)


def _fingerprint(model: PreTrainedModel, fresh: list[str]) -> str:
    """Return a digest of the pretrained weights: names, shapes and a sample of the values."""
    digest = hashlib.sha256()
    prefix = model.base_model_prefix + "."
    for name, parameter in sorted(model.named_parameters()):
        if name.removeprefix(prefix).split(".")[0] in fresh or not name.startswith(prefix):
            continue
        add_tensor(digest, name, parameter)
    return digest.hexdigest()[:16]


def add_tensor(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Update a digest of `hashlib` with the name, the shape and a sample of the values of a tensor."""
    values = tensor.detach().flatten()
    probe = values[:: max(1, values.numel() // _TENSOR_PROBE)][:_TENSOR_PROBE].float().cpu()
    digest.update(f"{name}{tuple(tensor.shape)}".encode())
    digest.update(probe.numpy().tobytes())
