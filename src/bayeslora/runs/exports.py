"""Tell the formats of exports apart, and load those that are for other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from bayeslora.errors import BayesLoraError
from bayeslora.export.container import looks_packed
from bayeslora.export.formats import libraries_of
from bayeslora.export.integer.reader import is_integer_model
from bayeslora.model_card import public_name
from bayeslora.runs.base import AUTO_CLASSES, base_of
from bayeslora.runs.digests import ADAPTER_CONFIG, adapter_config
from bayeslora.runs.info import RunInfo
from bayeslora.runs.plain import ADAPTER_FILE
from bayeslora.vocabulary import FORMATS_FOR_OTHERS


def format_of(folder: Path) -> str:
    """Return the format of the export in a folder.

    Raises:
        BayesLoraError: there is none.
    """
    if not folder.is_dir():
        raise BayesLoraError(f"{folder} is not a folder, but must be an export: check the path")
    if (form := format_for_others(folder)) is not None:
        return form
    if is_integer_model(folder):
        return "integer"
    if (folder / ADAPTER_CONFIG).is_file():
        if looks_packed(folder / ADAPTER_FILE):
            return "packed"
        if adapter_config(folder).get("peft_type") == "LORA":
            return "lora"
    elif (folder / "config.json").is_file():
        return "merged"
    if several := sorted([*folder.glob("draw-*"), *folder.glob("member-*")]):
        raise BayesLoraError(f"{folder} holds {len(several)} exports, but must be one: give such as {several[0]}")
    raise BayesLoraError(f"{folder} is not an export, but must be one: give a folder that bayeslora export wrote")


def format_for_others(folder: Path) -> str | None:
    """Return which of `FORMATS_FOR_OTHERS` the folder has; None for another one."""
    if any((folder / f"{name}model.onnx").is_file() for name in ("", "encoder_")):
        return "onnx"
    if any((folder / name).is_file() for name in ("model.gguf", "adapter.gguf")):
        return "gguf"
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and (folder / "config.json").is_file() and (folder / "adapter" / ADAPTER_CONFIG).is_file():
        return "torchao"
    return None


def load_for_others(
    form: str, folder: Path, info: RunInfo, tokenizer: PreTrainedTokenizerBase, base: str | None = None
) -> nn.Module:
    """Return the model of an export in one of `FORMATS_FOR_OTHERS`; ONNX runs in onnxruntime, GGUF in Transformers.

    A GGUF adapter alone goes into `base`, a folder or hub id; by default into the base model that `info` names.

    Raises:
        BayesLoraError: a library that is not installed; files that are missing or damaged, or belong to another kind
            of run.
    """
    with libraries_of(form):
        if form == "onnx":
            from bayeslora.export.onnx.reader import OnnxClassifier, OnnxDecoder, OnnxEncoderDecoder

            reader = {"sequence": OnnxClassifier, "seq2seq": OnnxEncoderDecoder}.get(info.head, OnnxDecoder)
            return reader(folder)
        if form == "torchao":
            from bayeslora.export.torchao import load_torchao

            return load_torchao(folder, cast(Any, AUTO_CLASSES[info.head]))
        from bayeslora.export.gguf.reader import MODEL_FILE, load_gguf

    if (folder / MODEL_FILE).is_file():
        return load_gguf(folder)
    return load_gguf(folder, cast(Any, base_of(info, base or info.model, tokenizer).model))


def info_of_export(form: str, folder: Path, info: RunInfo, base_model_id: str | None = None) -> RunInfo:
    """Return what the `run.json` of an export says, with which it is loaded like the run.

    That of a folder for other machines does not say where files are on this one. Such are the formats for other
    programs, and all that name a `base_model_id`.
    """
    if form in FORMATS_FOR_OTHERS or base_model_id is not None:
        info = dataclasses.replace(
            info, model=base_model_id or public_name(info.model), base_name=base_model_id or "",
            data_dir=None, files={}, evaluation_rows=[], train_digest=None,
        )  # fmt: skip
    if form in FORMATS_FOR_OTHERS:
        return dataclasses.replace(info, method="full", base_fingerprint="")
    if form in ("integer", "merged"):
        return dataclasses.replace(info, method="full")
    method = "lora" if form == "lora" else info.method
    return dataclasses.replace(info, method=method, base_name=adapter_config(folder)["base_model_name_or_path"])
