"""One call that teaches a `transformers.Trainer` to train a Bayesian adapter."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, TypeVar, cast

import torch
from peft import TaskType
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayeslora.errors import BayesLoraError
from bayeslora.methods.describe import tuner_of
from bayeslora.training.groups import parameter_groups
from bayeslora.training.loop import BayesLoop, require_tuner

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)

_LOSS_BY_TOKEN = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM, TaskType.TOKEN_CLS)
_NAMES_BY_TOKEN = ("ForMaskedLM", "ForTokenClassification")


def attach(trainer: AnyTrainer, num_examples: int | None = None) -> AnyTrainer:
    """Attach the method of `trainer.model` to `trainer` and return it; works with any Trainer, TRL's included.

    It adds one callback (first in line), gives the optimizer a group for each role of the method's parameters, and
    adds the method's numbers to what the Trainer logs. The evaluation loss stays the task's alone. A model without one
    of this library's adapters (plain LoRA, a full model) is left to the Trainer as it is.

    Args:
        trainer: constructed but not yet trained.
        num_examples: N, for methods with a divergence: the number of terms that the loss is a mean of over the whole
            training set. By default what the configuration says, or else the length of the training set; the loss of
            a language model, or of a token classifier, is a mean over tokens, so there it has to be given.

    Raises:
        BayesLoraError: under DeepSpeed, which owns the gradients; if the trainer was given an optimizer that lacks the
            method's groups; or if N contradicts the configuration.
    """
    if trainer.model is None or tuner_of(trainer.model) is None:
        return trainer
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise BayesLoraError("DeepSpeed keeps gradients to itself, which these methods need: use DDP or FSDP2 instead")
    if trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None:
        trainer.optimizer_cls_and_kwargs = _grouped_optimizer(trainer)
    stated = require_tuner(trainer.model).num_examples
    if stated is not None and num_examples not in (None, stated):
        raise BayesLoraError(
            f"num_examples is {num_examples}, but the adapter's config says {stated}: drop one of them"
        )
    callback = BayesCallback(trainer, num_examples)
    trainer.callback_handler.callbacks.insert(0, callback)
    _log_statistics(trainer, callback)
    return trainer


class BayesCallback(TrainerCallback):
    """The Trainer's events, handed to a `BayesLoop`."""

    def __init__(self, trainer: Trainer, num_examples: int | None = None) -> None:
        self.trainer, self.num_examples = trainer, num_examples
        self.loop: BayesLoop | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.trainer.model is not None
        self.loop = BayesLoop(
            self.trainer.model,
            _inner(kwargs["optimizer"]),
            total_steps=state.max_steps,
            num_examples=self.num_examples or require_tuner(self.trainer.model).num_examples or self._length(),
            seed=args.seed,
            step=state.global_step,
        )

    def _length(self) -> int | None:
        """The number of training examples, where each of them is one term of the loss."""
        assert self.trainer.model is not None
        dataset, tuner = self.trainer.train_dataset, require_tuner(self.trainer.model)
        task = tuner.peft_config[tuner.active_adapters[0]].task_type
        generates = getattr(tuner.model, "can_generate", None)
        by_token = task in _LOSS_BY_TOKEN or type(tuner.model).__name__.endswith(_NAMES_BY_TOKEN)
        if by_token or (generates is not None and generates()) or not isinstance(dataset, Sized):
            return None
        return len(dataset)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.loop is not None
        self.loop.step = state.global_step
        self.loop.step_begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.loop is not None
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        clipped = (args.max_grad_norm or 0) > 0  # clipping has unscaled the gradients already
        self.loop.before_optimizer_step(1.0 if scaler is None or clipped else scaler.get_scale())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.loop is not None
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.loop.step_end()


def _grouped_optimizer(trainer: Trainer) -> tuple[type, dict[str, Any]]:
    """A factory of the optimizer that the Trainer's arguments ask for, over the method's groups."""

    class GroupedOptimizer:
        def __call__(self, model: nn.Module, **unused: Any) -> Optimizer:
            args = trainer.args
            optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(PreTrainedModel, model))
            options = {key: value for key, value in options.items() if key not in ("params", "model")}
            require_tuner(model)
            return optimizer_class(parameter_groups(model, args.learning_rate, args.weight_decay), **options)

    return GroupedOptimizer, {}


def _inner(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _log_statistics(trainer: Trainer, callback: BayesCallback) -> None:
    """Add the method's numbers to training logs before any reporter, or the history, sees them."""
    log = trainer.log

    def log_with_statistics(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and callback.loop is not None:
            with torch.no_grad():
                logs.update(callback.loop.statistics())
        log(logs, *args, **kwargs)

    trainer.log = log_with_statistics  # type: ignore[method-assign]
