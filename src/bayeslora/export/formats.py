"""`export`, `shrink`, and the helpers that all export formats share."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import GENERATION_CONFIG_NAME

from bayeslora.errors import BayesLoraError
from bayeslora.methods.layer import BayesLayer, device_of
from bayeslora.methods.tuner import BayesTuner, check_has_tuner, tuner_of
from bayeslora.model_card import CARDED, write_card

FORMATS = {
    "gguf": "bayeslora.export.gguf.writer",
    "integer": "bayeslora.export.integer.writer",
    "lora": "bayeslora.export.lora",
    "merged": "bayeslora.export.merged",
    "onnx": "bayeslora.export.onnx.writer",
    "packed": "bayeslora.export.packed.writer",
    "torchao": "bayeslora.export.torchao",
}
"""Module of each format, imported at first use; the module's function is named `export_<format>`."""


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "lora",  # noqa: A002 - the command's own word
    adapter_name: str | None = None,
    batch: Mapping[str, Tensor] | None = None,
    *,
    base_model_id: str | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Write an adapter to the folder `path` in another format, and return what was measured, such as sizes and errors.

    The folder's `README.md` says what the folder holds, how to load it, how large its error is, and where it is from.

    Args:
        model: a PEFT model with an adapter of this library; for `onnx` and `gguf` also with PEFT's LoRA.
        path: folder to write into; removed if the export fails, unless it existed before.
        format: `lora` (default) for a plain LoRA adapter that needs only PEFT; `packed` for the adapter at its learned
            widths; `merged` for a single model without an adapter; `integer` for a single model of integer codes, for
            `load_integer`; `onnx` for a graph for onnxruntime; `gguf` for files for llama.cpp; `torchao` for int8
            weights for Transformers and vLLM.
        adapter_name: name of the adapter, by default the active one.
        batch: inputs to measure the error on; by default the model's `dummy_inputs`, and result and card say so.
        base_model_id: hub id of the base model for README and configuration; by default where it was loaded from.
        tokenizer: a Transformers tokenizer to save beside the model; `gguf` and `onnx` need it.
        options: further keyword arguments of the format's function, such as those of `export_lora`.

    Raises:
        BayesLoraError: the format or an option is unknown, or the model has no adapter that can be exported.
    """
    if format not in FORMATS:
        raise BayesLoraError(f"format is {format!r}, but must be one of {', '.join(sorted(FORMATS))}: choose one")
    with libraries_of(format):
        write = getattr(importlib.import_module(FORMATS[format]), f"export_{format}")
    takes = set(inspect.signature(write).parameters)
    options |= {"tokenizer": tokenizer} if tokenizer is not None and "tokenizer" in takes else {}
    if unknown := sorted(set(options) - takes):
        raise BayesLoraError(f"format {format!r} takes no option {unknown[0]!r}: drop it, or choose another format")
    with _nothing_left_over(path), _based_on(model, base_model_id):
        measured = cast(dict[str, Any], write(model, path, adapter_name, batch, **options))
        if tokenizer is not None and "tokenizer" not in takes:
            for each in adapter_folders(Path(path), options):
                tokenizer.save_pretrained(each)
        if format in CARDED:
            inner = next(module for module in model.modules() if isinstance(module, PeftModel))
            config = inner.peft_config[adapter_name or only_active(inner)]
            for each in adapter_folders(Path(path), options):
                write_card(each, format, inner.get_base_model(), config, measured)
    return measured


def adapter_folders(path: Path, options: Mapping[str, Any]) -> list[Path]:
    """Return the folders that an export with these options has: one each for draws and members, otherwise `path`."""
    kind = "draw" if options.get("draws") else "member" if options.get("members") else None
    return [path] if kind is None else sorted(path.glob(f"{kind}-*"))


@contextmanager
def _based_on(model: nn.Module, name: str | None) -> Iterator[None]:
    """Let the adapters inside `model` name this base, unless it is None."""
    if name is not None:
        check_hub_id(name)
    found = [module for module in model.modules() if isinstance(module, PeftModel)] if name is not None else []
    configs = [config for module in found for config in module.peft_config.values()]
    before = [config.base_model_name_or_path for config in configs]
    for config in configs:
        config.base_model_name_or_path = name
    try:
        yield
    finally:
        for config, known in zip(configs, before, strict=True):
            config.base_model_name_or_path = known


def check_hub_id(name: str) -> None:
    """Raise `BayesLoraError` unless `name` could be that of a model on the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BayesLoraError(
            f"base_model_id is {name!r}, but must be a hub id: give one such as google/gemma-3-1b"
        ) from error


@contextmanager
def libraries_of(form: str) -> Iterator[None]:
    """Raise `BayesLoraError` if an import inside the `with` lacks a library, which the format needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise BayesLoraError(
            f"{error.name} is not installed, but format {form!r} needs it: pip install 'bayeslora[{form}]'"
        ) from error


@contextmanager
def _nothing_left_over(folder: str | Path) -> Iterator[None]:
    """Remove `folder` when what is inside the `with` fails, unless it was there before."""
    was_there = os.path.lexists(folder)
    try:
        yield
    except BaseException:
        if not was_there:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def shrink(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """Remove every rank that contributes nothing from the tensors of an adapter, in place.

    A rank is removed if its gate is closed or its diagonal entry is quantized to zero. Ranges and the scaling stay as
    trained, so the outputs stay the same up to float rounding. `rank_pattern` in the adapter's config records the
    remaining ranks, and a saved adapter reloads with them. Shrink after training: optimizers keep the old tensors.

    Args:
        model: a PEFT model; one without an adapter of this library is left unchanged.
        adapter_name: name of the adapter, by default the active one.

    Returns:
        The remaining rank of each layer, by layer name; a rank may be 0.

    Raises:
        BayesLoraError: Transformers has added the adapter, so that there is no configuration to record ranks in.
    """
    check_has_tuner(model)
    tuner = tuner_of(model)
    return {} if tuner is None else tuner.shrink(adapter_name)


def adapted_parts(model: nn.Module, adapter_name: str | None) -> tuple[PeftModel, BayesTuner, str]:
    """Return the PEFT model inside `model`, its tuner, and the name of the adapter, by default the active one.

    Raises:
        BayesLoraError: if the model lacks an adapter of this library, or one of that name; if several are active and
            none is named; if one is merged.
    """
    check_has_tuner(model)
    tuner = tuner_of(model)
    inner = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if tuner is None or inner is None:
        way_out = "give a model with its adapter"
        if inner is not None:  # such as a run of plain LoRA
            way_out = (
                "other programs read an adapter of PEFT as it is, so use its folder, or export it as merged or onnx"
            )
        raise BayesLoraError(
            f"{type(model).__name__} has no adapter of bayeslora, but this format needs one: {way_out}"
        )
    name = adapter_name or only_active(inner)
    if name not in inner.peft_config:
        raise BayesLoraError(f"the model has no adapter {name!r}: give the name of one of its adapters")
    check_unmerged(tuner.named_layers(name))
    return inner, tuner, name


def lora_layers(model: PeftModel, name: str) -> dict[str, Any]:
    """Return the layers with the adapter `name` of PEFT's LoRA by their path in the base model."""
    modules = model.get_base_model().named_modules()
    return {path: m for path, m in modules if isinstance(m, LoraLayer) and name in {*m.lora_A, *m.lora_embedding_A}}


def sharing_base(model: PeftModel, tuner: BayesTuner) -> PeftModel:
    """Return a copy of `model` with copied adapters; its base weights share the original's memory."""
    own = {
        id(tensor)
        for layer in tuner.adapted_layers()
        for name, child in layer.named_children()
        if name != "base_layer"
        for tensor in (*child.parameters(), *child.buffers())
    }
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers() if id(buffer) not in own}
    for parameter in model.parameters():
        if id(parameter) not in own:
            # A second parameter over the same memory, whose `.data` can be replaced; subclasses stay shared.
            second = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
            shared[id(parameter)] = second if type(parameter) is nn.Parameter else parameter
    for layer in tuner.adapted_layers():
        cached = getattr(getattr(layer, "frozen_weight", None), "cached", None)
        if cached is not None:
            shared[id(cached)] = cached
    return copy.deepcopy(model, shared)


def only_active(model: PeftModel) -> str:
    """Return the name of the active adapter; raise `BayesLoraError` if there are several, of which one is exported."""
    active = list(cast(Any, model.base_model).active_adapters)
    if len(active) != 1:
        raise BayesLoraError(
            f"adapters {sorted(active)} are active, but one is exported at a time: give adapter_name, or call "
            "set_adapter with one"
        )
    return str(active[0])


def check_unmerged(layers: Mapping[str, Any]) -> None:
    """Raise `BayesLoraError` if an adapter is merged into one of the layers."""
    for key, layer in layers.items():
        if layer.merged_adapters:
            raise BayesLoraError(
                f"adapter {layer.merged_adapters[0]!r} is merged into {key}: call unmerge_adapter first"
            )


def to_take_apart(model: PeftModel, tuner: BayesTuner, name: str) -> tuple[PeftModel, dict[str, BayesLayer]]:
    """Return a copy of the model with adapter `name` active, in evaluation mode, and its adapted layers by path.

    Raises:
        BayesLoraError: a base weight is not in floating point.
    """
    layers: dict[str, BayesLayer] = tuner.named_layers(name)
    for key, layer in layers.items():
        if not layer.has_plain_weight:
            raise BayesLoraError(
                f"the base weight of {key} has {layer.base_width} bits, but must be in floating point: "
                f"load the base in float32 and export adapter {name!r} on it"
            )
    whole = sharing_base(model, tuner)
    whole.set_adapter(name)
    _, tuner, _ = adapted_parts(whole.eval(), name)
    return whole, tuner.named_layers(name)


def upright(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer as (d_out, d_in), also of GPT-2's, which is stored the other way round."""
    weight = cast(Tensor, module.weight).detach()
    return weight.T if isinstance(module, Conv1D) else weight


def saved_state(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Return separate copies on the CPU of the tensors that PEFT would save."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}


def save_config(model: Any, folder: Path) -> None:
    """Write the model's `config.json`, and of one that generates `generation_config.json`.

    A classifier's labels have their names also where they are the usual two: Transformers leaves those out, but reads
    a file without them as of three labels for BART, mBART and LED. Settings of `generate` that contradict each other
    are written as they are; with `save_pretrained` they would stop the export.
    """
    model.config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        generation.to_json_file(folder / GENERATION_CONFIG_NAME)
    if str((model.config.architectures or [""])[0]).endswith("Classification"):
        file = folder / "config.json"
        names = {str(number): name for number, name in model.config.id2label.items()}
        content = {**json.loads(file.read_text("utf-8")), "id2label": names, "label2id": model.config.label2id}
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_model(model: Any, folder: Path, **options: Any) -> None:
    """Save with `save_pretrained(folder, **options)`, and the configurations as `save_config` does."""
    known = getattr(model, "generation_config", None)
    if known is not None:
        model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, **options)
    finally:
        if known is not None:
            model.generation_config = known
    save_config(model, folder)


def inputs_for(model: nn.Module, batch: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return `batch`, by default the model's `dummy_inputs`, on its device and without labels; None without both.

    Labels that are an encoder-decoder's text become its decoder's inputs.

    Transformers' dummy inputs are token ids, also of models that read images or sound: those have none.
    """
    found = batch if batch is not None else getattr(model, "dummy_inputs", None)
    if found is None or (batch is None and getattr(model, "main_input_name", "input_ids") not in found):
        return None
    inputs = {key: value.to(device_of(model)) for key, value in found.items() if key not in ("labels", "label")}
    labels, shift = found.get("labels"), getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if labels is not None and labels.ndim > 1 and shift is not None and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = shift(labels=labels.to(device_of(model)))
    return inputs


@torch.no_grad()
def output_of(model: nn.Module, inputs: Mapping[str, Tensor] | None) -> Tensor | None:
    """Return the logits, or a model's first output without them, in float32 and evaluation mode; None for None."""
    if inputs is None:
        return None
    outputs = model.eval()(**inputs)
    return cast(Tensor, outputs["logits"] if "logits" in outputs else outputs[0]).float()


def output_error(
    expected: Tensor | None, found: Tensor | None, model: nn.Module | None = None, *, is_dummy: bool = False
) -> dict[str, float | None]:
    """Return how far outputs are from the expected ones.

    Args:
        expected: (…, classes), or None if there was nothing to measure on.
        found: of the same shape, or None.
        model: that the outputs are logits of, one class of several; None if they may be others.
        is_dummy: True for outputs of the model's `dummy_inputs`; the result then has `dummy_inputs`, True.

    Returns:
        `max_output_error` and `max_output`, the largest difference and the largest expected output, or None; and of
        logits `changed`, the share of other answers, and `divergence`, the mean of Kullback and Leibler in nats.
    """
    if expected is None or found is None:
        return {"max_output_error": None, "max_output": None}
    errors: dict[str, float | None] = {
        "max_output_error": float((found - expected).abs().max()),
        "max_output": float(expected.abs().max()),
    }
    config = getattr(model, "config", None)
    if config is not None and expected.shape[-1] > 1 and config.problem_type != "multi_label_classification":
        before, after = (logits.float().flatten(0, -2).log_softmax(-1) for logits in (expected, found))
        errors["changed"] = float((before.argmax(1) != after.argmax(1)).float().mean())
        errors["divergence"] = max(0.0, float(F.kl_div(after, before, reduction="batchmean", log_target=True)))
    return {**errors, "dummy_inputs": True} if is_dummy else errors
