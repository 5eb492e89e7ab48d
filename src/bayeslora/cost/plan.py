"""The cost of fine-tuning, without loading weights: parameters, memory, bytes on disk, bit operations.

The model is built on the meta device from its configuration and gets its adapters there, so a model of any size takes
seconds and no memory, and every number is counted on the real modules, whatever the method.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from bayeslora._peft import get_pattern_key
from bayeslora.cost.bops import macs_by_scope, relative_bops
from bayeslora.cost.macs import operations
from bayeslora.cost.memory import Device, activation_bytes
from bayeslora.cost.parameters import added_parameters, count_parameters
from bayeslora.cost.structure import build_on_meta, from_config, is_adapted, is_decoder, read_structure
from bayeslora.errors import BayesLoraError, one_line
from bayeslora.methods import LayerDescription

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]

# By PEFT's task type: the endings of its class names, and its classes by model type.
_TASKS: dict[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
    "SEQ_CLS": (("ForSequenceClassification",), MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    "CAUSAL_LM": (("ForCausalLM", "LMHeadModel"), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "TOKEN_CLS": (("ForTokenClassification",), MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    "QUESTION_ANS": (("ForQuestionAnswering",), MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    "SEQ_2_SEQ_LM": (("ForConditionalGeneration",), MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "FEATURE_EXTRACTION": (("Model",), MODEL_MAPPING_NAMES),
}
TASK_TYPES = tuple(_TASKS)


@dataclass(frozen=True)
class Plan:
    """The cost of one training run. All sizes are in bytes; an optimizer step sees one batch.

    Attributes:
        model: class name of the model.
        task_type: PEFT's name of the task; None for a model without a head.
        batch_size, tokens, dtype: the arguments; `dtype` is the base model's, and adapters train in float32.
        parameters: {"trainable", "adapter", "total"}, as `count_parameters` counts them.
        relative_bops: bit operations by scope, as a share of 32-bit LoRA of rank 16. Counted at the configured rank
            and 32 bits: the cost at the start of training, before a method has learned narrower widths.
        macs: multiply-accumulate operations of one sequence by scope, forward pass only.
        bytes: {"weights", "gradients", "optimizer", "activations", "training", "file", "file_16bit"}. The optimizer is
            AdamW, with two numbers in a trained parameter's dtype. `activations` estimates what autograd keeps of one
            batch; None if the model cannot run on the meta device. `training` is the sum of the first four. `file` is
            the file that `save_pretrained` writes: the adapter, or the whole model if there is none.
        layers: the adapted layers.
        notes: values that are unknown and why, one sentence each.
    """

    model: str
    task_type: str | None
    batch_size: int
    tokens: int
    dtype: str
    parameters: dict[str, int]
    relative_bops: dict[str, float]
    macs: dict[str, int]
    bytes: dict[str, int | None]
    layers: list[LayerDescription]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary, with the keys of `metrics.json` where they exist."""
        return {**asdict(self), "layers": [layer.to_dict() for layer in self.layers]}


def plan(
    model: str | Path | dict[str, Any] | PretrainedConfig,
    method: PeftConfig | None,
    *,
    task_type: str | None = None,
    batch_size: int = 32,
    tokens: int = 128,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> Plan:
    """Return the cost of training `model` with `method`, counted on the meta device without loading weights.

    Args:
        model: a configuration, or a source for `from_config`: a model folder, a `config.json` or a dictionary.
        method: configuration of an adapter, from this library or from PEFT; None trains every weight.
        task_type: one of `TASK_TYPES`; by default the method's own, then that of the configuration's first
            `architectures` entry, then "CAUSAL_LM" for a decoder.
        batch_size, tokens: rows per batch (default 32) and tokens per row (default 128).
        dtype: dtype of the base model's weights, by default "float32".
        device: device for which activations are estimated, "cpu" (default) or "cuda"; they differ only with dropout.

    Raises:
        BayesLoraError: the configuration cannot be read or built, the adapter does not fit it, or a number is below 1.
    """
    for name, value in (("batch_size", batch_size), ("tokens", tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BayesLoraError(f"{name} is {value!r}, but must be a whole number of at least 1: give another")
    for name, chosen, known in (("dtype", dtype, get_args(Dtype)), ("device", device, get_args(Device))):
        if chosen not in known:
            raise BayesLoraError(f"{name} is {chosen!r}, but must be one of {', '.join(known)}: choose one")
    config = copy.deepcopy(model) if isinstance(model, PretrainedConfig) else from_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < tokens:
        raise BayesLoraError(f"tokens is {tokens}, but the model takes {limit}: give at most {limit}")
    wanted = task_type or (str(getattr(method, "task_type", None) or "").rpartition(".")[2] or None)
    built, found, heads = build_for_task(config, wanted)
    name = type(built).__name__
    built = built.to(getattr(torch, dtype))
    adapted = built if method is None else _wrapped(built, method, found, heads)
    layers = [] if method is None else _layers(cast(PeftModel, adapted))
    parameters = count_parameters(adapted)
    sizes = _sizes(adapted)
    # Bit operations and MACs before the pass that uses the model up.
    costs = relative_bops(adapted, layers, tokens), macs_by_scope(operations(adapted, tokens, layers))
    notes: list[str] = []
    try:
        sizes["activations"] = activation_bytes(adapted, layers, batch_size, tokens, device)
        sizes["training"] = sum(cast(int, sizes[key]) for key in ("weights", "gradients", "optimizer", "activations"))
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError, KeyError) as error:
        notes.append(f"activations are unknown: {name} does not run without values ({one_line(error)[:160]})")
    return Plan(name, found, batch_size, tokens, dtype, parameters, *costs, sizes, layers, notes)


def build_for_task(config: PretrainedConfig, task_type: str | None = None) -> tuple[nn.Module, str | None, list[str]]:
    """Build the model of a configuration on the meta device, with the head of a task.

    Returns:
        The model, the task type (None for a model without a head), and the modules that the configuration's
        checkpoint lacks, which are therefore trained and saved with an adapter.

    Raises:
        BayesLoraError: the task type is unknown, or this architecture has no class for it.
    """
    own = next(iter(getattr(config, "architectures", None) or []), None)
    if task_type is None:
        task_type = _default_task(config, own)
    elif task_type not in TASK_TYPES:
        raise BayesLoraError(f"task_type is {task_type!r}, but must be one of {', '.join(TASK_TYPES)}: choose one")
    if task_type is not None and _task_of(own) != task_type:
        config.architectures = [_class_for(config.model_type, task_type)]
    if task_type == "SEQ_CLS":
        if getattr(config, "problem_type", None) is None:
            config.problem_type = "regression" if config.num_labels == 1 else "single_label_classification"
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0  # a classifier on a decoder finds the last token by it
    model = build_on_meta(config)
    heads: list[str] = []
    if task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and config.architectures != [own]:
        prefix = getattr(model, "base_model_prefix", "")
        heads = [name for name, child in model.named_children() if name != prefix and list(child.parameters())]
    return model, task_type, heads


def _task_of(class_name: str | None) -> str | None:
    """Return the task that a class is named after; "FEATURE_EXTRACTION" for one without a head."""
    return next((task for task, (ends, _) in _TASKS.items() if str(class_name).endswith(ends)), None)


def _default_task(config: PretrainedConfig, class_name: str | None) -> str | None:
    named = _task_of(class_name)
    if class_name is not None and named != "FEATURE_EXTRACTION":
        return named
    return "CAUSAL_LM" if is_decoder(config) else None


def _class_for(model_type: str, task_type: str) -> str:
    found = _TASKS[task_type][1].get(model_type)
    if not found:
        raise BayesLoraError(
            f"task_type is {task_type}, but transformers does not have a {model_type} model for it: choose another"
        )
    return found if isinstance(found, str) else str(found[0])


def _wrapped(model: nn.Module, method: PeftConfig, task_type: str | None, heads: list[str]) -> nn.Module:
    config = cast(Any, copy.deepcopy(method))
    config.task_type = task_type
    if heads:
        config.modules_to_save = sorted({*(getattr(config, "modules_to_save", None) or ()), *heads})
    try:
        with torch.random.fork_rng(devices=[]):  # keep the caller's random state
            return get_peft_model(cast(Any, model), config)
    except BayesLoraError:
        raise
    except (ValueError, TypeError, NotImplementedError, KeyError) as error:
        raise BayesLoraError(
            f"{type(method).__name__} does not fit {type(model).__name__} ({one_line(error)}): change its options"
        ) from error


def _layers(model: PeftModel) -> list[LayerDescription]:
    """Return the adapted layers as configured, as `describe` does before anything has been learned."""
    config = cast(Any, model.peft_config[model.active_adapter])
    patterns: dict[str, int] = getattr(config, "rank_pattern", None) or {}
    structure = read_structure(model)
    shapes = {name: (matrix.in_features, matrix.out_features) for name, matrix in structure.matrices.items()}
    shapes |= structure.embeddings
    found = []
    for name, module in model.get_base_model().named_modules():
        if not is_adapted(module) or name not in shapes:
            continue
        rank = patterns.get(get_pattern_key(list(patterns), name), getattr(config, "r", 0))
        count = sum(parameter.numel() for parameter in added_parameters(module))
        found.append(LayerDescription(name, *shapes[name], rank, rank, count))
    return found


def _sizes(model: nn.Module) -> dict[str, int | None]:
    parameters = list(model.parameters())  # shared ones once
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "activations": None,
        "training": None,
        "file": _file_bytes(model, half=False),
        "file_16bit": _file_bytes(model, half=True),
    }


def _file_bytes(model: nn.Module, half: bool) -> int:
    """Return the bytes of the safetensors file: length of the header, the header padded to 8 bytes, the tensors."""
    tensors = _saved_tensors(model)
    width = {name: 2 if half and t.is_floating_point() else t.element_size() for name, t in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-width[name], name)):
        start, end = end, end + tensors[name].numel() * width[name]
        dtype = f"{'F' if tensors[name].is_floating_point() else 'I'}{8 * width[name]}"
        header[name] = {"dtype": dtype, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    header_bytes = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header_bytes // 8) * 8 + end


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    if isinstance(model, PeftModel):
        # An adapted embedding or output layer is not saved in full with its adapter.
        return get_peft_model_state_dict(model, save_embedding_layers=False)
    distinct: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        distinct.setdefault(id(tensor), (name, tensor))
    return dict(distinct.values())
