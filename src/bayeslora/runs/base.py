"""Load base models with the head that a task needs, and their tokenizers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import TaskType
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from bayeslora.cost.structure import is_decoder
from bayeslora.data.packaged import ENCODER_PACKAGE, as_dense, gguf_options
from bayeslora.errors import BayesLoraError, counted, one_line
from bayeslora.evaluation.items import DEFAULT_PROMPT_LENGTH
from bayeslora.prediction.predictor import MULTI_LABEL
from bayeslora.runs.digests import ADAPTER_CONFIG
from bayeslora.runs.info import Head, RunInfo, RunKind
from bayeslora.vocabulary import Scoring

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "tekken.json", "*.model", "*.spm", "*.tiktoken")
_TENSOR_PROBE = 64
_DEFAULT_LENGTH, _DEFAULT_TEXT_LENGTH = 128, 1024
_GGUF = ".gguf"
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet"}

DeviceMap = str | dict[str, Any]
DEVICE_PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways of Accelerate to spread a model over the devices."""

AUTO_CLASSES = {
    "sequence": AutoModelForSequenceClassification,
    "words": AutoModelForTokenClassification,
    "choices": AutoModelForMultipleChoice,
    "letters": AutoModelForCausalLM,
    "cloze": AutoModelForCausalLM,
    "text": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
}
CLASS_HEADS = ("sequence", "words")
"""Heads whose classes are in the model's configuration."""
LANGUAGE_HEADS = ("letters", "cloze")
"""Heads of language models on multiple choice."""
WRITING_HEADS = ("text", "seq2seq")
"""Heads of models that write their answers."""
# PEFT lacks a task type for multiple choice; without a type it wraps the model unchanged.
_TASK_TYPES = {
    "sequence": TaskType.SEQ_CLS,
    "words": TaskType.TOKEN_CLS,
    "choices": None,
    "letters": TaskType.CAUSAL_LM,
    "cloze": TaskType.CAUSAL_LM,
    "text": TaskType.CAUSAL_LM,
    "seq2seq": TaskType.SEQ_2_SEQ_LM,
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
            if (path / ADAPTER_CONFIG).is_file():
                raise BayesLoraError(
                    f"{name} has an adapter and no model, but a base model is needed: name the model that the adapter "
                    "is for, or merge it first (bayeslora export --format merged)"
                )
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
    if kind not in ("multiple_choice", "generation"):
        return "words" if kind == "token_classification" else "sequence"
    of_language: Head = "text" if kind == "generation" else scoring
    if resolved.endswith(_GGUF):  # always a language model, and slow to read
        return of_language
    with load_errors(f"the configuration of {name}", resolved):
        config = AutoConfig.from_pretrained(resolved)
    if kind == "generation" and not is_decoder(config):
        raise BayesLoraError(
            f"{name} is a {config.model_type} model, but text is generated by a decoder such as Llama: name one"
        )
    return of_language if is_decoder(config) else "choices"


def source(resolved: str) -> dict[str, Any]:
    """Return arguments of `from_pretrained` for a result of `resolve_model`."""
    if not resolved.endswith(_GGUF):
        return {"pretrained_model_name_or_path": resolved}
    return {"pretrained_model_name_or_path": str(Path(resolved).parent), "gguf_file": Path(resolved).name}


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
    except Exception as error:  # loaders raise what they meet, tokenizers a bare Exception
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
    try:
        with suppress(ValueError):  # of a configuration of an unknown kind
            return Path(model).exists() or AutoConfig.from_pretrained(model) is not None
    except OSError:
        return False
    return True


def load_tokenizer(folder: str, name: str, *, of_words: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, GGUF file or hub id; the end token replaces a missing padding token.

    One for lists of words (`of_words`) reads a blank before the first of them, where it has a choice. A folder without
    one is refused, because Transformers would make it up, without a vocabulary.
    """
    if Path(folder).is_dir() and not has_tokenizer(Path(folder)):
        raise BayesLoraError(
            f"{name} lacks a tokenizer, but needs that of the model that was fine-tuned: save it there, or give the "
            "folder or hub id of that model"
        )
    with load_errors(f"the tokenizer of {name}", folder):
        tokenizer = AutoTokenizer.from_pretrained(**source(folder))
        if of_words and getattr(tokenizer, "add_prefix_space", True) is False:
            tokenizer = AutoTokenizer.from_pretrained(**source(folder), add_prefix_space=True)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise BayesLoraError(f"the tokenizer of {name} lacks a padding and an end token, but needs one: add it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has a file of any kind of tokenizer."""
    return any(path.is_file() for pattern in _TOKENIZER_FILES for path in folder.glob(pattern))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the vocabulary: the tokens and their numbers."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{number}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def ready(model: torch.nn.Module, device: str | torch.device | None = None) -> torch.nn.Module:
    """Return the model in evaluation mode on `device`, by default on the GPU if one is available.

    One that was loaded with a device map stays where that put it.
    """
    if device is None and getattr(model, "hf_device_map", None) is not None:
        return model.eval()
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def check_device_map(device_map: DeviceMap | None) -> None:
    """Raise `BayesLoraError` unless `device_map` is a known plan, a device of this machine or a dictionary."""
    if not isinstance(device_map, str) or device_map in DEVICE_PLANS:
        return
    try:
        torch.empty(0, device=device_map)
    except (RuntimeError, AssertionError) as error:  # without CUDA, PyTorch raises the latter
        raise BayesLoraError(
            f"device_map is {device_map}, which is no device of this machine: give one, such as cpu, or one of "
            f"{', '.join(DEVICE_PLANS)}"
        ) from error


def check_in_memory(model: torch.nn.Module, name: str | Path) -> None:
    """Raise unless every weight is on a device that computes: adapters read those that they quantize or add to."""
    away = [module for module, place in getattr(model, "hf_device_map", {}).items() if place == "disk"]
    away = away or [each for each, tensor in model.named_parameters() if tensor.is_meta]
    if away:
        raise BayesLoraError(
            f"device_map leaves {away[0]} of {name} outside the devices' memory, but bayeslora computes where the "
            "weights are: give more devices, or device_map cpu"
        )


def load_base(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    labels: list[str],
    kind: RunKind,
    dtype: str,
    head: Head = "sequence",
    device_map: DeviceMap | None = None,
) -> BaseModel:
    """Load the base model with `head`; `labels` and `kind` configure a classifier of texts or of words.

    Weights missing from the checkpoint are drawn from the global random state; `fresh` names their modules, so that
    the caller can train and save them. `device_map` spreads the model over devices, as in Transformers.
    """
    resolved = resolve_model(name)
    # The GGUF reader's progress bar cannot be turned off.
    quiet = redirect_stderr(io.StringIO()) if resolved.endswith(_GGUF) else nullcontext()
    with load_errors(f"model {name}", resolved), quiet:
        check_bare(name, resolved)
        model, info = AUTO_CLASSES[head].from_pretrained(
            **source(resolved),
            **(gguf_options() if resolved.endswith(_GGUF) else {}),
            dtype=getattr(torch, dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            device_map=device_map,
            **(_classes(labels, kind, resolved) if head in CLASS_HEADS else {}),
        )
    if resolved.endswith(_GGUF):
        as_dense(model)
    check_in_memory(model, name)
    if model.config.pad_token_id is None or hasattr(model, "score"):  # decoders read the last token before padding
        model.config.pad_token_id = tokenizer.pad_token_id
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    missing = {*info["missing_keys"], *mismatched}
    prefix = model.base_model_prefix + "."
    fresh = sorted({key.removeprefix(prefix).split(".")[0] for key in missing})
    if len(missing) > len(list(model.parameters())) / 2:
        raise BayesLoraError(
            f"the weights in {name} do not fit its config.json ({counted(len(missing), 'tensor')} missing): "
            "name a complete model"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise BayesLoraError(
            f"the tokenizer of {name} has {counted(len(tokenizer), 'token')}, but the model has only "
            f"{model.get_input_embeddings().num_embeddings}: name a model with a matching tokenizer"
        )
    return BaseModel(model, fresh, _fingerprint(model, fresh), _TASK_TYPES[head])


def base_of(
    info: RunInfo, name: str, tokenizer: PreTrainedTokenizerBase, device_map: DeviceMap | None = None
) -> BaseModel:
    """Load the base model of a run, which is `name` on this machine."""
    made: dict[str, Any] = {"labels": info.labels, "kind": info.kind, "dtype": info.dtype, "head": info.head}
    return load_base(name, tokenizer, device_map=device_map, **made)


def check_bare(name: str, resolved: str) -> None:
    """Raise `BayesLoraError` if an adapter is beside the model: Transformers would load it into the model unasked."""
    if find_adapter_config_file(source(resolved)["pretrained_model_name_or_path"]) is not None:
        raise BayesLoraError(
            f"{name} has an adapter (adapter_config.json), which Transformers would load into the model, but a base "
            "model must be without one: name the model that the adapter is for, merge it, or take its files out"
        )


def tell_other_order(name: str, labels: list[str], head: Head, fresh: list[str]) -> None:
    """Warn if the model has a trained head for these labels in another order, which is kept as the first weights."""
    if head not in CLASS_HEADS or not {"classifier", "score"}.isdisjoint(fresh):
        return
    resolved = resolve_model(name)
    if resolved.endswith(_GGUF):
        return
    known = AutoConfig.from_pretrained(**source(resolved)).id2label
    own = [str(known[number]) for number in sorted(known)]
    order, asked_order = ([each.lower() for each in names] for names in (own, labels))
    if order != asked_order and sorted(order) == sorted(asked_order):
        asked = ",".join(sorted(labels, key=lambda each: order.index(each.lower())))
        warnings.warn(
            f"model {name} has a head for {', '.join(own)}, but the labels are {', '.join(labels)} in this order: "
            f"give --labels {asked} to go on from what it knows",
            stacklevel=2,
        )


def _classes(labels: list[str], kind: RunKind, resolved: str) -> dict[str, Any]:
    if kind == "regression":
        # One after the other: Transformers refuses a single output while the kind is still that of the checkpoint.
        config = AutoConfig.from_pretrained(**source(resolved))
        config.problem_type = "regression"
        config.num_labels = 1
        return {"config": config}
    ids = {name: index for index, name in enumerate(labels)}
    found = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": ids}
    problem = MULTI_LABEL if kind == "multi_label" else "single_label_classification"
    return found if kind == "token_classification" else {**found, "problem_type": problem}


def longest_input(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, wanted: int | None, head: Head = "sequence"
) -> int:
    """Return the maximum input length in tokens.

    It is `wanted`, by default 128 (2,048 for prompts of multiple choice, which are not truncated, 1,024 for text to
    generate) or the model's limit if that is lower.
    """
    config: Any = model.config
    default = DEFAULT_PROMPT_LENGTH if head in LANGUAGE_HEADS else _DEFAULT_LENGTH
    default = _DEFAULT_TEXT_LENGTH if head in WRITING_HEADS else default
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
