"""The tuner all methods share: which layers, which adapters, which parameters learn how fast."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from bayeslora._peft import (
    DEFAULT_TARGET_MODULES,
    BaseTuner,
    BaseTunerLayer,
    get_pattern_key,
    get_quantization_kwargs,
)
from bayeslora.errors import BayesLoraError
from bayeslora.methods.allocation import CostModel
from bayeslora.methods.description import LayerDescription
from bayeslora.methods.layer import BayesLayer, adapter_names_by_row, puts_tokens_first
from bayeslora.methods.targets import check_not_nested, check_targets, exclude_saved, warn_of_unmatched
from bayeslora.vocabulary import CostScope

ParameterRole = str
"""Group of parameters with its own learning rate: ``"weights"``, or a method's such as ``"bit gates"``."""


@dataclass(frozen=True)
class TrainingSetup:
    """Facts about a run that a method needs before it starts.

    Attributes:
        total_steps: number of optimizer steps in the whole run.
        num_examples: N, the number of training examples; None if the method does not need it.
        has_posterior: whether the optimizer keeps a Gaussian of every weight, `optimizer.posterior(p) -> (mean, std)`.
        cost_of: function from a unit (`"bops"`, `"bytes"` or `"rank"`) and a scope of bit operations (None: the scope
            of the adapted layers' region) to the cost of the model.
        rows: rows per optimizer step, over all micro-batches and ranks; None if not known yet.
        model: the model that the loop calls, possibly wrapped for distributed training; None if not known.
    """

    total_steps: int
    num_examples: int | None = None
    has_posterior: bool = False
    cost_of: Callable[[str, CostScope | None], CostModel] | None = None
    rows: int | None = None
    model: nn.Module | None = None


@dataclass(frozen=True)
class RowLoss:
    """Loss over logits that the model itself does not return, such as those of a row's choices: one term for each row.

    Attributes:
        logits: function from the model to logits (B, C), minus infinity for classes that a row lacks.
        inputs: the batch's tensors, by which rows are told apart; the first dimension of `input_ids` is B.
        labels: class ids (B,); None where they are unknown.
    """

    logits: Callable[[nn.Module], Tensor]
    inputs: Mapping[str, Tensor]
    labels: Tensor | None = None


@dataclass(kw_only=True)
class RunState:
    """State of a method during a run, made by `begin`; `learning_rates` are the rates that it fixes, by role."""

    learning_rates: dict[ParameterRole, float] = field(default_factory=dict)


class BayesTuner(BaseTuner):
    """Base class of the methods, which add a `penalty`, roles and learning rates of parameters, and phases.

    A training loop calls `begin` once. In every step it calls `step_begin`, `add_penalty` and `observe` before the
    optimizer's step, and `allocate` and `step_end` after it.
    """

    least_travel: ClassVar[float] = 0.05
    """Distance that a weight must be able to move in a run with IVON; if it cannot, a warning is given."""

    row_loss: RowLoss | None = None
    """Loss of the current forward pass, if it is not the model's own."""

    kept_labels: Any = None
    """Labels of the current batch, which a trainer may withhold from the model to compute the loss itself."""

    counted: int | None = None
    """N, if a run has counted it from its training set."""

    backward_scale: float = 1.0
    """Loss scale of the present step's backward passes, which gradients of rows have even where `.grad` has none."""

    rows_per_example: int = 1
    """Rows per example of a training batch, such as 2 for the texts of a pair; all first texts come first."""

    needs_whole_factors: ClassVar[bool] = False
    """True if the method reads whole factors during training, which FSDP1 cannot provide because it flattens them."""

    trains_sharded: ClassVar[bool] = True
    """False if the method cannot train with factors that are sharded over ranks, as under FSDP."""

    _run: RunState | None = None
    _named_layers: dict[str, Any] | None = None
    _passes_without_a_run: int | None = None  # None: nothing counts them yet
    _first_sum: float | None = None  # of the first layer's weights in the first of these passes; None: no more

    target_module_mapping: dict[str, list[str]] = cast(Any, DEFAULT_TARGET_MODULES)
    title: ClassVar[str]
    """The method's name in prose."""
    without_a_run: ClassVar[str] = "its penalty and its schedule stay out"
    """What is missing from training where no run has begun, as a clause for a warning."""
    linear_class: ClassVar[type[BayesLayer]]

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks, alphas = peft_config.rank_pattern, peft_config.alpha_pattern
        rank = ranks.get(get_pattern_key(list(ranks), current_key), peft_config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), current_key), peft_config.lora_alpha)
        # A rank that was cut keeps the scaling it was trained with, so the configured rank is the divisor.
        scaling = alpha / (peft_config.r**0.5 if peft_config.use_rslora else peft_config.r)
        if isinstance(target, BayesLayer):
            target.update_layer(adapter_name, peft_config, rank, scaling)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, (nn.Linear, Conv1D)) and not hasattr(base, "in_features"):
            raise BayesLoraError(
                f"target module {current_key!r} is a {type(base).__name__}, but {type(peft_config).__name__} adapts "
                "linear layers (torch.nn.Linear, transformers' Conv1D and their 4- and 8-bit forms): choose others"
            )
        mamba = "mamba" in str(self.get_model_config(self.model).get("model_type")) and target_name == "out_proj"
        if mamba or isinstance(parent, nn.MultiheadAttention):
            raise BayesLoraError(
                f"target module {current_key!r} is inside a {type(parent).__name__}, but that reads its weight past "
                "the adapter: name it in exclude_modules"
            )
        new = self.linear_class(target, **get_quantization_kwargs(self.model))
        new.train(self.training)  # one added to a model in eval mode must not sample
        new._active_adapter = adapter_name
        new.tokens_first = puts_tokens_first(parent)
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # its fast path reads the base weight past the adapter
        new.update_layer(adapter_name, peft_config, rank, scaling)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)  # a further adapter does not start trainable
        self._replace_module(parent, target_name, new, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # an unloaded module has its own weights, and a head of several layers has no `weight` to hand over
            setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        for layer in self.adapted_layers(adapter_name):
            dtype = layer.get_base_layer().weight.dtype
            if dtype.is_floating_point:
                layer.cast_kept_parameters(adapter_name, dtype)

    _enable_peft_forward_hooks = adapter_names_by_row

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self.check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        self.check_merge(adapter_names)
        self._named_layers = None
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def check_merge(self, adapter_names: list[str] | None) -> None:
        """Raise `BayesLoraError`, before any layer changes, if a layer cannot be merged."""
        for layer in self.adapted_layers():
            layer.check_merge(*(name for name in adapter_names or self.active_adapters if name in layer.adapter_names))

    def penalty(self) -> dict[str, Tensor]:
        """Return named scalar terms to add to the mean loss, functions of the parameters alone; {} for none."""
        return {}

    def add_penalty(self, parameters: Sequence[nn.Parameter], scale: float = 1.0) -> dict[str, Tensor]:
        """Add `scale` times the gradient of `penalty` to the `.grad` of `parameters`; returns the terms' values."""
        terms = self.penalty()
        if terms:
            total = torch.stack(list(terms.values())).sum() * scale
            gradients = torch.autograd.grad(total, list(parameters), allow_unused=True)
            add_gradients([(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None])
        return {name: value.detach() for name, value in terms.items()}

    @property
    def penalty_names(self) -> tuple[str, ...]:
        """Names of the terms that `penalty` can have in this configuration, now or later."""
        return ()

    def role_of(self, parameter_name: str) -> ParameterRole:
        """Return the role of one of this method's parameters, by its name in the model."""
        return "weights"

    def rate_factor(self, role: ParameterRole) -> float:
        """Return the learning rate of `role` as a multiple of the weights', where both follow one schedule."""
        return 1.0

    @property
    def num_examples(self) -> int | None:
        """N, if the configuration sets it; otherwise None."""
        return None

    def forget_counted(self) -> None:
        """Remove N from the configuration if an earlier run has counted it, since the next run may have other data."""

    def begin(self, setup: TrainingSetup) -> None:
        """Fit the method's schedule into the run; raises `BayesLoraError` if it does not fit."""
        self._run = RunState()

    def row_logits(self, model: nn.Module, loss: RowLoss) -> Tensor:
        """Return `loss.logits(model)`, and tell the method that the forward passes inside are for this loss."""
        self.row_loss = loss
        try:
            return loss.logits(model)
        finally:
            self.row_loss = None

    def labels_in(self, kwargs: Mapping[str, Any]) -> Any:
        """Return the labels that the model is called with, or if there are none, those that the trainer withholds."""
        given = kwargs.get("labels")
        return self.kept_labels if given is None else given

    def terms_in(self, kwargs: Mapping[str, Any], rows: int) -> Tensor:
        """Return the number of loss terms of each example in a batch of `rows` rows; a pair has one."""
        if self.rows_per_example > 1:
            return torch.ones(rows // self.rows_per_example)
        labels = kwargs.get("shift_labels")
        if labels is None:
            labels = self.labels_in(kwargs)
            if isinstance(labels, Tensor) and labels.ndim == 2 and predicts_next(self.model):
                labels = labels[:, 1:]  # nothing predicts the first token
        return loss_terms(labels, rows)

    def rate_of(self, role: ParameterRole, step: int) -> float | None:
        """Return the learning rate of `role` in step `step` (from 0); None leaves it to the optimizer's schedule."""
        return None

    def step_begin(self, step: int, seed: int) -> None:
        """Draw the noise of optimizer step `step` that its micro-batches and all ranks share."""

    def observe(self, step: int, optimizer: Optimizer, scale: float = 1.0) -> None:
        """Read the final gradients of optimizer step `step` (times `scale`), before the weights change."""

    def allocate(self, step: int, optimizer: Optimizer) -> None:
        """Divide a budget among the layers after optimizer step `step`, by the statistics in `optimizer`."""

    def step_end(self, step: int) -> None:
        """Calibrate or freeze after optimizer step `step`."""

    def statistics(self) -> dict[str, float]:
        """Return numbers to log with the loss."""
        return {}

    @property
    def is_final(self) -> bool:
        """True if the adapter has its final form, so that the current model can be chosen as the best of its run."""
        return True

    @property
    def final_from(self) -> int:
        """Smallest number of optimizer steps after which `is_final` is True."""
        return 0

    @property
    def learning_rates(self) -> dict[ParameterRole, float]:
        """Learning rates that the method sets itself, by role."""
        return self.run_state().learning_rates

    def run_state(self) -> RunState:
        """Return the state of the run that `begin` has created; raises `BayesLoraError` before that."""
        if self._run is None:
            raise BayesLoraError("no run has begun, but this call needs its schedule: call begin() first")
        return self._run

    def named_layers(self, adapter_name: str | None = None) -> dict[str, Any]:
        """Return the adapted layers (only those with `adapter_name`) by their path in the base model, in its order."""
        # A training loop asks several times a step, so the tree is walked once for every change of it.
        known = self._named_layers
        if known is None:
            known = {path: m for path, m in self.model.named_modules() if isinstance(m, BayesLayer)}
            self._named_layers = known
        return {path: m for path, m in known.items() if adapter_name is None or adapter_name in m.adapter_names}

    def adapted_layers(self, adapter_name: str | None = None) -> list[Any]:
        """Return the adapted layers (only those with `adapter_name`), in the order of the model."""
        return list(self.named_layers(adapter_name).values())

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._named_layers = None
        config = self.peft_config[adapter_name]
        if not config.inference_mode:  # a saved adapter is what it is
            check_targets(model, config)
            exclude_saved(model, config)
            check_not_nested(model, cast(Any, config).modules_to_save)
            warn_of_unmatched(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._named_layers = None
        if not config.inference_mode and self._passes_without_a_run is None:
            self._passes_without_a_run = 0
            model.register_forward_pre_hook(self._tell_of_no_run)

    def _tell_of_no_run(self, *_: Any) -> None:
        """Warn once if weights move in training although no run has begun; looked at in passes 1, 2, 4, 8, …"""
        if self._run is not None or torch.compiler.is_compiling() or not (self.training and torch.is_grad_enabled()):
            return
        passes = self._passes_without_a_run = (self._passes_without_a_run or 0) + 1
        if passes.bit_count() > 1 or (passes > 1 and self._first_sum is None):
            return
        layer = next(iter(self.adapted_layers()), nn.Module())
        own = [p.detach() for name, p in layer.named_parameters() if name.startswith(self.prefix)]
        if not all(type(weight) is Tensor and not weight.is_meta for weight in own):  # such as those of a plan
            return
        total = sum(float(weight.sum()) for weight in own)
        if passes == 1:
            self._first_sum = total
        elif total != self._first_sum:
            self._first_sum = None
            warnings.warn(
                f"an optimizer moves the weights of {self.title}, but no run has begun, so {self.without_a_run}: call "
                "bayeslora.attach(trainer) before trainer.train(), or use bayeslora.BayesLoop in a loop of your own",
                stacklevel=2,
            )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise `BayesLoraError`: only plain LoRA adapters can be combined."""
        raise BayesLoraError(
            f"add_weighted_adapter is called on adapters of {self.title}, but only plain LoRA can be added up: export "
            "each with `bayeslora export --format lora` first"
        )

    def unload(self) -> nn.Module:
        self._named_layers = None
        return super().unload()

    def training_adapter(self) -> str:
        """Return the name of the one adapter that a training loop trains."""
        active = self.active_adapters
        if len(active) != 1:
            raise BayesLoraError(
                f"adapters {sorted(active)} are active, but one is trained at a time: call set_adapter with one"
            )
        return active[0]

    def describe(self, adapter_name: str | None = None) -> list[LayerDescription]:
        """Describe every adapted layer as evaluation sees it, in the order of the model."""
        name = adapter_name or self.training_adapter()
        return [layer.describe(name, path) for path, layer in self.named_layers(name).items()]

    def shrink(self, adapter_name: str | None = None) -> dict[str, int]:
        """Cut the ranks that contribute nothing out of the adapter; return the rank of each layer by name."""
        name = adapter_name or self.training_adapter()
        ranks = {path: layer.shrink(name) for path, layer in self.named_layers(name).items()}
        cast(Any, self.peft_config[name]).rank_pattern = ranks
        return ranks


def tuner_of(model: nn.Module) -> BayesTuner | None:
    """Return the method's tuner inside `model` (a PEFT model, perhaps wrapped for distributed training), or None."""
    for module in model.modules():
        if isinstance(module, BayesTuner):
            return module
    return None


def check_has_tuner(model: nn.Module) -> None:
    """Refuse adapted layers without their tuner, which `add_adapter` and `from_pretrained` of Transformers leave out.

    Such a model predicts, but nothing in it trains the adapter by its method, describes it or exports it.
    """
    if tuner_of(model) is None and any(isinstance(module, BayesLayer) for module in model.modules()):
        raise BayesLoraError(
            f"Transformers has put an adapter into {type(model).__name__}, without what trains, describes and exports "
            "it: use get_peft_model(model, config), or PeftModel.from_pretrained(model, folder)"
        )


def describe(model: nn.Module, adapter_name: str | None = None) -> list[LayerDescription]:
    """Describe every adapted layer of `model`, in the model's order; an empty list for a model without adapters.

    Args:
        model: a PEFT model, with one of this library's methods or with LoRA.
        adapter_name: name of the adapter, by default the active one.

    Raises:
        BayesLoraError: the model has no adapter of that name, or Transformers has added the adapter.
    """
    check_has_tuner(model)
    tuner = tuner_of(model)
    if tuner is not None:
        found = tuner.describe(adapter_name)
    else:
        whole: Any = next((module for module in model.modules() if isinstance(module, PeftModel)), model)
        root = getattr(getattr(whole, "base_model", whole), "model", whole)
        found = [_describe_lora(path, m, adapter_name) for path, m in root.named_modules() if isinstance(m, LoraLayer)]
        found = [layer for layer in found if layer.initial_rank or adapter_name is None]
    if adapter_name is not None and not found:
        raise BayesLoraError(f"the model has no adapter {adapter_name!r}: name one of its adapters")
    return found


def _describe_lora(path: str, layer: LoraLayer, adapter_name: str | None) -> LayerDescription:
    name = adapter_name or layer.active_adapters[0]
    rank = layer.r.get(name, 0)
    d_in, d_out = int(layer.in_features or 0), int(layer.out_features or 0)
    return LayerDescription(path, d_in, d_out, rank, rank, parameters=rank * (d_in + d_out))


def add_gradients(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Add the second tensor of each pair to the `.grad` of the first."""
    known = [(p.grad, gradient) for p, gradient in pairs if p.grad is not None]
    for parameter, gradient in pairs:
        if parameter.grad is None:
            parameter.grad = gradient
    if known:
        torch._foreach_add_([grad for grad, _ in known], [gradient for _, gradient in known])


def batch_rows(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Return the rows of the batch that a model is called with: those of its first tensor, or 1 without one."""
    batch = next((value for value in (*kwargs.values(), *args) if isinstance(value, Tensor) and value.ndim), None)
    return 1 if batch is None else len(batch)


def predicts_next(model: Any) -> bool:
    """Return True if the logits at a token are for the one after it, as those of transformers' causal models are."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "loss_type"):
        return False
    # None means the default loss of transformers, which is causal.
    return model.loss_type in (None, "ForCausalLM", "ForConditionalGeneration")


def loss_terms(labels: Any, rows: int) -> Tensor:
    """Return how many terms of the mean loss each row has (rows,): one, its numbers or labels, or labelled tokens."""
    if not isinstance(labels, Tensor) or labels.ndim < 2:
        return torch.ones(rows)
    if labels.is_floating_point():
        return torch.full((rows,), labels.numel() / rows)
    terms = (labels != -100).flatten(1).sum(1).float().cpu()
    return terms if len(terms) == rows else terms.sum().expand(rows) / rows


def summed_over_ranks(values: Tensor) -> Tensor:
    """Return the sum of `values`, on the CPU, over all ranks of a distributed run; `values` itself in one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    values = values.to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.all_reduce(values)
    return values.cpu()


def mean_ranks(ranks: dict[str, float]) -> dict[str, float]:
    """Return the mean of the layers' ranks, over all and over those of one name (`query`, …), as they are logged."""
    by_suffix: dict[str, list[float]] = {}
    for path, rank in ranks.items():
        by_suffix.setdefault(path.rpartition(".")[2], []).append(rank)
    means = {f"rank/{suffix}": sum(group) / len(group) for suffix, group in by_suffix.items()}
    return {"mean_rank": sum(ranks.values()) / len(ranks), **means}


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of optimizer step `step`: the same on every rank, in every micro-batch, after a resume."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
