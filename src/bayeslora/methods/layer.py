"""The layer all methods share: modes, mixed batches, merging and unmerging are written here and nowhere else."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeslora._peft import (
    AuxiliaryTrainingWrapper,
    BaseTunerLayer,
    check_adapters_to_merge,
    get_in_out_features,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from bayeslora.errors import BayesLoraError
from bayeslora.methods.description import LayerDescription
from bayeslora.quantization import Float32Module
from bayeslora.vocabulary import BASE_WEIGHT, KINDS, UNQUANTIZED


@dataclass(frozen=True)
class PackedTensors:
    """The tensors of an adapted layer that exports store as codes.

    Attributes:
        matrices: A (r, d_in), E (r,) and B (d_out, r) in float32.
        widths: bits of each matrix, and of every other kind that has a quantizer.
        log_ranges: logarithms of the ranges of the kinds that have a quantizer, (1,) or one a row or group.
        ranges: the ranges as evaluation uses them, (), (rows, 1), or of a base weight (rows, groups).
        has_rank_gates: whether the adapter has gates for its ranks.
    """

    matrices: dict[str, Tensor]
    widths: dict[str, int]
    log_ranges: dict[str, Tensor]
    ranges: dict[str, Tensor]
    has_rank_gates: bool = False


class BayesLayer(nn.Module, BaseTunerLayer):
    """One adapted linear layer (`nn.Linear`, its 4- and 8-bit forms, or GPT-2's `Conv1D`) with any number of adapters.

    A method implements `add_adapter`, `adapted`, `factors` and `shrink`. It keeps its tensors in dictionaries with the
    adapter names as keys, as attributes of the layer: PEFT saves and loads these.

    Attributes:
        scaling: factor of each adapter's update.
        initial_rank: the configured rank of each adapter.
        adapter_dropout: dropout on each adapter's input.
        tokens_first: whether the layer gets (tokens, rows, d_in) and returns (tokens, rows, d_out).
    """

    other_param_names: tuple[str, ...] = ("adapter_dropout", "scaling", "initial_rank")
    optional_state: ClassVar[tuple[str, ...]] = ()
    """Parts of the names of tensors that only training needs, so that a saved file may lack them."""

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        d_in, d_out = get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = cast(int, d_in), cast(int, d_out)
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **kwargs)
        self._weight_backups: dict[str, Tensor] = {}
        self.scaling: dict[str, float] = {}
        self.initial_rank: dict[str, int] = {}
        self.adapter_dropout = nn.ModuleDict()
        self.tokens_first = False

    def add_adapter(self, adapter_name: str, config: Any, rank: int) -> None:
        """Create the tensors of one adapter of rank `rank` >= 0."""
        raise NotImplementedError

    def adapted(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Return the output (..., d_out) for `x` (..., d_in) under the named adapters, all of which this layer has."""
        raise NotImplementedError

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return A (r, d_in), diagonal (r,) and B (d_out, r) at the posterior mean, float32, without the scaling."""
        raise NotImplementedError

    def shrink(self, adapter_name: str) -> int:
        """Cut the ranks that contribute nothing out of every tensor, and return the remaining rank."""
        raise NotImplementedError

    def packed_tensors(self, adapter_name: str) -> PackedTensors | None:
        """Return the tensors that an export stores as codes, or None for a method that learns no widths."""
        return None

    def remove_quantizers(self) -> list[str]:
        """Remove the quantizers of all adapters, for cost estimates; return the kinds of tensors they quantized."""
        return []

    @staticmethod
    def unpacked_state(packed: PackedTensors) -> dict[str, Tensor]:
        """Return the tensors of a frozen adapter, by the last parts of their keys: the inverse of `packed_tensors`."""
        raise NotImplementedError

    def merged_weight(self, adapter_name: str, weight: Tensor) -> Tensor:
        """Return a weight with the combined effect of `weight` and the adapter."""
        return weight + self.get_delta_weight(adapter_name).to(weight.device, weight.dtype)

    def check_merge(self, *adapter_names: str) -> None:
        """Raise `BayesLoraError` if no weight can have the adapters' effect."""
        if self.quantization_backend is None and self.base_width < UNQUANTIZED:
            raise BayesLoraError(
                f"quanto stores the base weight in {self.base_width} bits, which a merge would leave as they are: "
                "load the base without quantization to merge"
            )

    def needs_backup(self, adapter_name: str) -> bool:
        """Return True if subtraction cannot undo a merge, so that a copy of the base weight must be kept."""
        return False

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the update of the base weight at the posterior mean, in the base weight's layout, float32."""
        a, diagonal, b = self.factors(adapter_name)
        delta = (b * diagonal) @ a * self.scaling[adapter_name]
        return delta.T if self.is_transposed else delta

    def kept(self, adapter_name: str) -> Tensor:
        """Return a boolean mask (r,) of the ranks that contribute: those whose diagonal entry is not zero."""
        return self.factors(adapter_name)[1] != 0

    def widths(self, adapter_name: str) -> dict[str, int]:
        """Return the bits of every kind of tensor in evaluation, 32 where it is not quantized."""
        return dict.fromkeys(KINDS, UNQUANTIZED) | {BASE_WEIGHT: self.base_width}

    def describe(self, adapter_name: str, name: str) -> LayerDescription:
        """Describe the layer, called `name`, as evaluation and deployment see it."""
        containers = [getattr(self, each) for each in self.adapter_layer_names]
        trained = [container[adapter_name] for container in containers if adapter_name in container]
        count = sum(p.numel() for each in trained for p in ([each] if isinstance(each, Tensor) else each.parameters()))
        return LayerDescription(
            name=name,
            in_features=self.in_features,
            out_features=self.out_features,
            rank=int(self.kept(adapter_name).sum()),
            initial_rank=self.initial_rank[adapter_name],
            parameters=count,
            bits=self.widths(adapter_name),
        )

    def initial_factors(self, config: Any, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Return LoRA's initial A (r, d_in) and B (d_out, r): A uniform, B zero unless `init_weights` is False.

        Like PEFT, this draws both matrices before it sets them. With the same seed, LoRA and the methods that start
        like it therefore get the same A and the same dropout, and runs can be compared in pairs.
        """
        a, b = torch.empty(rank, self.in_features), torch.zeros(self.out_features, rank)
        if not rank:
            return nn.Parameter(a), nn.Parameter(b)
        drawn = torch.empty_like(b)
        for matrix in (a, drawn, a):
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        if not config.init_weights:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        return nn.Parameter(a), nn.Parameter(b)

    def adapter_input(self, name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `x` after the adapter's dropout, as `dtype`."""
        return cast(Tensor, self.adapter_dropout[name](self._cast_input_dtype(x, dtype)))

    @torch.no_grad()
    def cut(self, container: nn.ParameterDict, adapter_name: str, part: Any) -> None:
        """Replace a tensor of the adapter by a copy of `tensor[part]`."""
        old = container[adapter_name]
        container[adapter_name] = nn.Parameter(old.detach()[part].contiguous(), requires_grad=old.requires_grad)

    @property
    def base_width(self) -> int:
        """Bits of the stored base weight: 4 or 8 if it was loaded quantized, otherwise 32."""
        layer = self.get_base_layer()
        if self.quantization_backend is None:  # or quanto's, which says its type
            return int(getattr(getattr(layer, "weight_qtype", None), "bits", UNQUANTIZED))
        described = f"{type(layer).__name__} {type(getattr(layer, 'weight', None)).__name__}".lower()
        if "4bit" in described or "int4" in described or getattr(layer, "nbits", None) == 4:
            return 4
        return 8

    @property
    def has_plain_weight(self) -> bool:
        """True if the base weight is an ordinary matrix, and not loaded in 4 or 8 bits."""
        forward = type(self.get_base_layer()).forward
        return self.quantization_backend is None and forward in (nn.Linear.forward, Conv1D.forward)

    @property
    def is_transposed(self) -> bool:
        """True if the base weight is stored as (d_in, d_out), as in `Conv1D`."""
        return isinstance(self.get_base_layer(), Conv1D)

    @property
    def adapter_names(self) -> set[str]:
        return self._get_available_adapters()

    def update_layer(self, adapter_name: str, config: Any, rank: int, scaling: float) -> None:
        self.scaling[adapter_name], self.initial_rank[adapter_name] = scaling, config.r
        self.adapter_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.add_adapter(adapter_name, config, rank)
        for container in self.children():
            if isinstance(container, nn.ModuleDict) and adapter_name in container:
                container[adapter_name].train(self.training)  # PEFT leaves them in train mode inside an eval model
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def cast_kept_parameters(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Cast those tensors of the adapter that usually stay float32."""
        for container in self.children():
            if isinstance(container, nn.ModuleDict) and adapter_name in container:
                module = container[adapter_name]
                if isinstance(module, Float32Module):
                    module.cast_parameters(dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.rows_first(self._with_rows_first(self.rows_first(x), *args, **kwargs))

    def rows_first(self, x: Tensor) -> Tensor:
        """Swap the first two dimensions of an input or output if the layer has its tokens first."""
        return x.transpose(0, 1).contiguous() if self.tokens_first and x.ndim == 3 else x

    def _with_rows_first(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is not None:
            return self._mixed(x, adapter_names, *args, **kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.adapter_names]
        if self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted(x, active, *args, **kwargs)

    def _mixed(self, x: Tensor, adapter_names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """One adapter a row; `"__base__"`, or an adapter that this layer does not have, means the base layer."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        known = set() if self.disable_adapters else self.adapter_names
        groups: dict[str | None, list[int]] = {}
        for row, name in enumerate(adapter_names):
            groups.setdefault(name if name in known else None, []).append(row)
        out: Tensor | None = None
        for known_name, rows in groups.items():
            part = x[rows]
            if known_name is None:
                y = self.base_layer(part, *args, **kwargs)
            else:
                y = self.adapted(part, [known_name], *args, **kwargs)
            if out is None:
                out = y.new_empty(len(x), *y.shape[1:])
            out[rows] = y.to(out.dtype)
        return self.base_layer(x, *args, **kwargs) if out is None else out

    def get_base_weight(self) -> Tensor:
        """Return the base weight (d_out, d_in) in its own dtype, dequantized if it is stored in fewer bits."""
        undo_cpu_order(self.get_base_layer())
        return super().get_base_weight()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters (by default the active ones), at their posterior mean, into the base weight."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.adapter_names:
                continue
            weight = self.get_base_weight()
            with torch.no_grad():
                merged = self.merged_weight(name, weight).contiguous()
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            if self.needs_backup(name):
                self._weight_backups[name] = weight
            self.set_base_weight(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Remove the merged adapters from the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name not in self.adapter_names:
                continue
            weight = self._weight_backups.pop(name, None)
            if weight is None:
                weight = self.get_base_weight()
                weight = weight - self.get_delta_weight(name).to(weight.device, weight.dtype)
            self.set_base_weight(weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


_TOKENS_FIRST = {
    "longformer": {"LongformerSelfAttention"},
    "led": {"LEDEncoderSelfAttention"},
    "xlnet": {"XLNetFeedForward"},
    "fsmt": {"Attention", "EncoderLayer", "DecoderLayer"},
}
"""Modules of transformers whose linear layers get the tokens in the first dimension, by model."""


def puts_tokens_first(parent: nn.Module) -> bool:
    """Return whether `parent` gives its linear layers (tokens, rows, features)."""
    if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return not parent.self_attn.batch_first
    return any(
        kind.__name__ in _TOKENS_FIRST.get(kind.__module__.rpartition(".modeling_")[2], ())
        for kind in type(parent).__mro__
    )


def undo_cpu_order(module: nn.Module) -> None:
    """Undo what a forward pass without gradients on a CPU does to a 4-bit weight of bitsandbytes.

    It reorders the weight for a kernel. Dequantizing does not expect that, and saving puts back the codes, but the
    scales only where they are quantized themselves. That the scales were rounded to bfloat16 is not undone.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    module.state_dict()  # puts the codes back
    state = cast(Any, module.weight).quant_state
    if state.absmax.ndim == 2:
        state.absmax = state.absmax.T.reshape(-1).float()


def add_update(result: Tensor, hidden: Tensor, b: Tensor, scaling: float, in_place: bool = False) -> Tensor:
    """Return `result + scaling * hidden @ b.T`, computed in one pass over `result` if the dtypes agree.

    Set `in_place` if `result` is a matrix that nothing else refers to, so that it may be overwritten.
    """
    if not result.dtype == hidden.dtype == b.dtype:
        return result + (F.linear(hidden, b) * scaling).to(result.dtype)
    if in_place:
        return result.addmm_(hidden, b.T, alpha=scaling)
    flat = torch.addmm(result.flatten(0, -2), hidden.flatten(0, -2), b.T, alpha=scaling)
    return flat.view(result.shape)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter; the CPU for a model without parameters, such as a graph."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and restore the mode of every submodule afterwards.

    `model.train()` cannot restore it, because parts of a model may be in evaluation mode on purpose.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def adapter_names_by_row(tuner: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Hand `adapter_names`, one for each row of the batch, to every adapted layer of `tuner`: PEFT's forward hook."""
    names = kwargs.pop("adapter_names", None)
    if names is None:
        yield
        return
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    known = set().union(*(layer.adapter_names for layer in tuner.adapted_layers())) | {"__base__"}
    if unknown := set(names) - known:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    beams = kwargs.get("num_beams") or 1
    repeated = [name for name in names for _ in range(beams)]
    encoder = _encoder_modules(tuner.model) if beams > 1 else set()  # an encoder runs before beams are expanded
    handles = []
    for module in tuner.modules():
        if isinstance(module, (BayesLayer, AuxiliaryTrainingWrapper)):
            hook = partial(_with_adapter_names, adapter_names=names if module in encoder else repeated)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _encoder_modules(model: Any) -> set[nn.Module]:
    """The modules of an encoder-decoder's encoder; empty for other models."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set()
    return set(model.get_encoder().modules())


def _with_adapter_names(module: nn.Module, args: Any, kwargs: Any, adapter_names: list[str]) -> tuple[Any, Any]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs
