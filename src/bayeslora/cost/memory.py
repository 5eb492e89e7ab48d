"""The bytes that autograd keeps for the backward pass of one training step, found without running the model.

The pass is run on fake tensors (torch's own: shapes, types and strides, no memory), and every distinct storage that
autograd saves is counted once at its size; parameters and buffers do not count, because they exist anyway:

    activations = Σ bytes of the storages saved between the input and the loss

This works for any architecture and any method, because a method's own tensors (a core per sequence, two sign tensors
per token) are computed too. Quantizers are the exception, since their widths depend on the values of their gates: they
are removed for the pass, and each counts as one more copy of its tensor.

Temporary tensors are not counted: gradients of activations during the backward pass, workspaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from bayeslora.cost.structure import base_model, read_structure
from bayeslora.methods import LayerDescription
from bayeslora.methods.layer import BayesLayer

Device = Literal["cpu", "cuda"]
_TOKEN_LABELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForTokenClassification", "ForConditionalGeneration")


def activation_bytes(
    model: nn.Module, layers: Iterable[LayerDescription], batch_size: int, tokens: int, device: Device = "cpu"
) -> int:
    """Return the bytes that autograd keeps of one training pass; `model`, on the meta device, is unusable afterwards.

    Args:
        model: with or without adapters.
        layers: the adapted layers.
        batch_size, tokens: the batch's rows and the length of each.
        device: where the model trains. With dropout, attention on a CPU keeps its scores, and a mask is as large as
            the tensor it masks; on a GPU attention never keeps scores, and a mask takes one byte per entry.

    Raises:
        RuntimeError, ValueError, TypeError, NotImplementedError: the model does not run on tensors without values.
    """
    extra = _remove_quantizers(model, layers, batch_size, tokens)
    model.train()
    kept: dict[int, torch.UntypedStorage] = {}
    own: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    kernels = _GpuKernels() if device == "cuda" else nullcontext()
    with FakeTensorMode():
        _to_fake(model)
        own |= {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        batch = training_batch(model, batch_size, tokens)
        with kernels, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**batch)
    return sum(storage.nbytes() for storage in kept.values()) + extra


def _to_fake(model: nn.Module) -> None:
    """Replace all parameters and buffers by fake tensors on the CPU; call it under a fake mode.

    On the meta device autocast and the choice between kernels do not work.
    """
    made: dict[int, Any] = {}
    originals = [*model.parameters(), *model.buffers()]  # held, so that no other tensor gets the id of one
    for tensor in originals:
        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: made[id(tensor)] for name, tensor in tensors.items() if tensor is not None})


def training_batch(model: nn.Module, batch_size: int, tokens: int) -> dict[str, Tensor]:
    """Return inputs of the right shapes, with labels if the model's class computes a loss."""
    root = base_model(model)
    name, config = type(root).__name__, cast(PretrainedConfig, root.config)
    ids = torch.zeros(batch_size, tokens, dtype=torch.long)
    row = torch.zeros(batch_size, dtype=torch.long)
    if name.endswith("ForSequenceClassification"):
        if getattr(config, "problem_type", None) == "multi_label_classification":
            return {"input_ids": ids, "labels": torch.zeros(batch_size, int(config.num_labels or 1))}
        return {"input_ids": ids, "labels": row.float() if config.num_labels == 1 else row}
    if name.endswith("ForQuestionAnswering"):
        return {"input_ids": ids, "start_positions": row, "end_positions": row}
    if name.endswith("ForMultipleChoice"):  # the rows are the choices of one question
        return {"input_ids": ids.unsqueeze(0), "labels": row[:1]}
    return {"input_ids": ids, "labels": ids} if name.endswith(_TOKEN_LABELS) else {"input_ids": ids}


class _GpuKernels(TorchFunctionMode):
    """Attention and dropout as the kernels of a GPU keep them."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value", "attn_mask"), args[:4], strict=False)) | kwargs
            return _FusedAttention.apply(named["query"], named["key"], named["value"], named.get("attn_mask"))
        if func is F.dropout:
            named = {"p": 0.5, "training": True} | dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            return _MaskedByBytes.apply(named["input"]) if named["training"] and named["p"] else named["input"]
        return func(*args, **kwargs)


class _FusedAttention(torch.autograd.Function):
    """Attention that keeps queries, keys, values, the output and one number per row of the scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, rows, _ = query.shape
        # Kernels write (batch, tokens, heads, size), which the next product reads without a copy.
        out = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


class _MaskedByBytes(torch.autograd.Function):
    """Dropout that keeps a mask of one byte per entry."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty_like(x, dtype=torch.bool))
        return torch.empty_like(x)


def _remove_quantizers(model: nn.Module, layers: Iterable[LayerDescription], batch_size: int, tokens: int) -> int:
    """Remove all quantizers from `model` and return the bytes of a copy of each tensor that they quantized."""
    structure, root = read_structure(model), base_model(model)
    total = 0
    for layer in layers:
        module = root.get_submodule(layer.name)
        if not isinstance(module, BayesLayer):
            continue
        n, calls = batch_size * structure.positions(layer.name, tokens), structure.calls(layer.name)
        r, d_in, d_out = layer.rank, layer.in_features, layer.out_features
        sizes = {"weight": calls * d_in * d_out, "A": calls * r * d_in, "E": calls * r, "B": calls * r * d_out}
        sizes |= {"in": n * d_in, "A_out": n * r, "E_out": n * r, "out": n * d_out}
        base = cast(Tensor, module.base_layer.weight).element_size()
        for kind in module.remove_quantizers():  # the adapter's own tensors are float32
            total += sizes[kind] * (base if kind in ("weight", "in", "out") else 4)
    return total
