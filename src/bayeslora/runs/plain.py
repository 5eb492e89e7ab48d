"""Describe adapters and whole models without `run.json` from their files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig

from bayeslora.errors import BayesLoraError, counted
from bayeslora.methods.registry import find_method
from bayeslora.prediction.predictor import MULTI_LABEL
from bayeslora.runs.base import AUTO_CLASSES, CLASS_HEADS, WRITING_HEADS, load_errors, resolve_model, source
from bayeslora.runs.digests import ADAPTER_CONFIG, adapter_config
from bayeslora.runs.info import RUN_FILE, UNKNOWN, Head, RunInfo
from bayeslora.vocabulary import WORDS

ADAPTER_FILE = "adapter_model.safetensors"
_HEADS: dict[str, Head] = {"SEQ_CLS": "sequence", "TOKEN_CLS": "words", "CAUSAL_LM": "text", "SEQ_2_SEQ_LM": "seq2seq"}
_SUFFIXES: dict[str, Head] = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "words",
    "ForCausalLM": "text",
    "ForConditionalGeneration": "seq2seq",
}
_PROBE = 7919
"""A number of classes that differs from every other dimension of a model."""
_NAMES = {
    "labels": "different names, one for each class in the order of their ids",
    "text_columns": "one name, or two different ones for a classifier of pairs",
    "label_column": "a name",
}
"""What `load` takes of what only `run.json` stores."""


def plain_info(folder: Path, model: str | None) -> RunInfo:
    """Describe a folder that `save_pretrained` or `bayeslora.export` wrote.

    The base model comes from `adapter_config.json`, the number of classes from the shape of the saved classifier, and
    the class names from the model's configuration if their number matches. `model` is the folder or hub id of the base
    model, if it is not as the adapter names it.

    Raises:
        BayesLoraError: the folder is neither an adapter nor a model, or its task is not supported.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return _of_adapter(folder, adapter_config(folder), model)
    if not (folder / "config.json").is_file():
        raise BayesLoraError(
            f"{folder} lacks run.json, {ADAPTER_CONFIG} and config.json, but needs one of them: give a folder that "
            "`bayeslora train`, `bayeslora export` or save_pretrained wrote"
        )
    with load_errors(f"the configuration in {folder}"):
        config = AutoConfig.from_pretrained(folder)
    named = (config.architectures or [""])[0]
    head = next((head for suffix, head in _SUFFIXES.items() if named.endswith(suffix)), None)
    if head is None:
        raise _other_task(folder, named or "unknown")
    return _info("full", str(folder), "", head, config, config.num_labels or 0)


def with_names(info: RunInfo, folder: Path, given: Mapping[str, Any]) -> RunInfo:
    """Return what describes a folder with the names that were given to `load`; one that is None is not given.

    Raises:
        BayesLoraError: a name does not fit the model, or `run.json` has another.
    """
    found = {name: _names(name, value, info) for name, value in given.items() if value is not None}
    does = {"generation": "generates text", "regression": "predicts numbers"}.get(info.kind)
    for name, value in found.items():
        own = getattr(info, name)
        if own and value != own and (folder / RUN_FILE).is_file():
            raise BayesLoraError(f"{name} is {value}, but {folder / RUN_FILE} has {own}: leave it out")
        if value != own and does and (name == "labels" or info.kind == "generation"):
            raise BayesLoraError(f"{name} is given, but the model in {folder} {does}: leave it out")
        if name == "labels" and len(value) != len(own):
            raise BayesLoraError(
                f"labels has {counted(len(value), 'name')}, but the model in {folder} has {len(own)} classes: give "
                "one for each, in the order of their ids"
            )
    return dataclasses.replace(info, **found)


def _names(name: str, value: Any, info: RunInfo) -> Any:
    """Return an argument of `load` as `RunInfo` has it."""
    if isinstance(value, Mapping) and name == "labels":
        names = [value.get(number) for number in range(len(value))]
    else:
        names = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    is_kind = name == "text_columns" or isinstance(value, str) == (name == "label_column")
    fits = is_kind and all(isinstance(each, str) for each in names) and len({*names}) == len(names)
    most = {"labels": len(names), "text_columns": 1 if info.head == "words" else 2, "label_column": 1}[name]
    if not fits or not 0 < len(names) <= most:
        raise BayesLoraError(f"{name} is {value!r}, but must be {_NAMES[name]}: correct it")
    return value if name == "label_column" else names


def _of_adapter(folder: Path, content: dict[str, Any], model: str | None) -> RunInfo:
    name = model or content.get("base_model_name_or_path")
    if not name:
        raise BayesLoraError(f"{folder / ADAPTER_CONFIG} does not name the base model: give it as load(…, model=…)")
    named = str((content.get("auto_mapping") or {}).get("base_model_class", ""))
    kind = content.get("task_type")
    by_class = next((head for suffix, head in _SUFFIXES.items() if named.endswith(suffix)), None)
    head = _HEADS.get(str(kind)) or by_class
    if head is None:
        raise _other_task(folder, str(kind or named or "not named"))
    resolved = resolve_model(name)
    with load_errors(f"the configuration of {name}", resolved):
        config = AutoConfig.from_pretrained(**source(resolved))
    classes = _saved_classes(folder, config, head) if head in CLASS_HEADS else 0
    find_method(str(content["peft_type"]).lower())
    with load_errors(f"the adapter in {folder}"):
        method = getattr(PeftConfig.from_pretrained(str(folder)), "method", str(content["peft_type"]).lower())
    return _info(str(method), str(name), str(content.get("base_model_name_or_path") or ""), head, config, classes)


def _info(method: str, model: str, base_name: str, head: Head, config: PretrainedConfig, classes: int) -> RunInfo:
    if head == "seq2seq" and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise _other_task(Path(model), str((config.architectures or [config.model_type])[0]))
    problem = getattr(config, "problem_type", None) if head == "sequence" else None
    if problem == MULTI_LABEL or (problem == "regression" and classes > 1):
        raise BayesLoraError(
            f"{model} has problem_type {problem!r} with {classes} outputs, but load accepts one label a row: load it "
            "with PEFT and use bayeslora.predict"
        )
    labels: list[str] = []
    if head in CLASS_HEADS and classes > 1:
        known: dict[Any, str] = dict(config.id2label or {}) if config.num_labels == classes else {}
        labels = [str(known.get(index, f"LABEL_{index}")) for index in range(classes)]
    of_classes = "token_classification" if head == "words" else "classification"
    kind = "generation" if head in WRITING_HEADS else of_classes if labels else "regression"
    return RunInfo(
        method=method,
        model=model,
        task=UNKNOWN,
        kind=kind,  # type: ignore[arg-type]
        metric={"regression": "pearson", "generation": "perplexity"}.get(kind, "accuracy"),
        text_columns=[WORDS] if head == "words" else [],
        label_column="label",
        labels=labels,
        max_length=0,
        dtype="float32",
        base_fingerprint="",
        base_name=base_name,
        head=head,
    )


def _saved_classes(folder: Path, config: PretrainedConfig, head: Head) -> int:
    """Return the number of classes of the saved classifier, or of the base model if none was saved."""
    probe = type(config).from_dict({**config.to_dict(), "num_labels": _PROBE})
    with load_errors(f"the adapter in {folder}"), torch.device("meta"):
        outline = AUTO_CLASSES[head].from_config(probe)
    last = [name for name, tensor in outline.named_parameters() if tensor.ndim == 2 and tensor.shape[0] == _PROBE]
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            for key in file.keys():
                if key.removeprefix("base_model.model.") in last:
                    return int(file.get_slice(key).get_shape()[0])
    except (SafetensorError, OSError) as error:
        raise BayesLoraError(f"{folder / ADAPTER_FILE} is missing or damaged: restore it from a copy") from error
    return config.num_labels or 0


def _other_task(folder: Path, kind: str) -> BayesLoraError:
    return BayesLoraError(
        f"the model in {folder} is for the task {kind}, but load accepts sequence classification (SEQ_CLS), token "
        "classification (TOKEN_CLS), language models (CAUSAL_LM) and encoder-decoders (SEQ_2_SEQ_LM): load it with "
        "PEFT and use bayeslora.predict"
    )
