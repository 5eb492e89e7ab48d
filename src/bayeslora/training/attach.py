"""One call that teaches a `transformers.Trainer` to train a Bayesian adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bayeslora.errors import BayesLoraError
from bayeslora.methods.tuner import tuner_of
from bayeslora.optim import IVON
from bayeslora.posterior import save_posterior, unwrapped
from bayeslora.training.groups import parameter_groups
from bayeslora.training.ivon import (
    IvonLoop,
    OptimizerFactory,
    check_trainer,
    factory_of,
    posterior_optimizer,
    restore_after_training,
    training_examples,
    uses_ivon,
    warn_of_short_travel,
)
from bayeslora.training.loop import BayesLoop, require_tuner
from bayeslora.training.loss_scale import correct_loss_scale

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def attach(
    trainer: AnyTrainer, num_examples: int | None = None, optimizer: str | OptimizerFactory | None = None
) -> AnyTrainer:
    """Attach the method of `trainer.model` to `trainer` and return it; works with any Trainer, TRL's included.

    It adds one callback (first in line), gives the optimizer a group for each role of the method's parameters, and
    adds the method's numbers to what the Trainer logs. The evaluation loss stays the task's alone. A model without one
    of this library's adapters (plain LoRA, a full model) is left to the Trainer as it is, unless IVON trains it; only
    the scale of its loss under gradient accumulation, and on several devices, is corrected for every model.

    With IVON the weights are a draw from the posterior from the first micro-batch of an optimizer step to its end, and
    the mean at any other time: whenever the Trainer evaluates, saves, logs or stops, for whatever reason. Checkpoints
    hold the posterior in `posterior.safetensors`.

    Args:
        trainer: constructed but not yet trained.
        num_examples: N, for methods with a divergence: the number of terms that the loss is a mean of over the whole
            training set. By default what the configuration says, or else the length of the training set; the loss of
            a language model, or of a token classifier, is a mean over tokens, so there it has to be given.
        optimizer: `"ivon"`, or `functools.partial(bayeslora.IVON, hess_init=…, …)`, to train with IVON; learning rate,
            weight decay and seed are those of the Trainer's arguments, and `ess` is N, each unless the partial has
            it. None leaves the choice to the Trainer's arguments.

    Raises:
        BayesLoraError: under DeepSpeed, which owns the gradients; if the trainer was given an optimizer that lacks the
            method's groups, or one beside `optimizer`; if N contradicts the configuration; for IVON under FSDP1, with
            several Monte-Carlo samples, or for an adapter with other parameters than weights.
    """
    by_ivon = optimizer is not None or uses_ivon(trainer)
    if trainer.model is None:
        return trainer
    correct_loss_scale(trainer)
    if tuner_of(trainer.model) is None and not by_ivon:
        return trainer
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise BayesLoraError("DeepSpeed keeps gradients to itself, which these methods need: use DDP or FSDP2 instead")
    free = trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None
    if optimizer is not None:
        if not free:
            raise BayesLoraError("the trainer has an optimizer, and attach is given another one: drop one of them")
        trainer.optimizer_cls_and_kwargs = posterior_optimizer(trainer, factory_of(optimizer), num_examples)
    elif free:
        trainer.optimizer_cls_and_kwargs = _grouped_optimizer(trainer)
    if by_ivon and trainer.is_fsdp_enabled and not getattr(trainer.accelerator, "is_fsdp2", False):
        raise BayesLoraError("FSDP1 hides which weights a rank has, which IVON's noise needs: use FSDP2 or DDP")
    tuner = tuner_of(trainer.model)
    stated = None if tuner is None else tuner.num_examples
    if stated is not None and num_examples not in (None, stated):
        raise BayesLoraError(
            f"num_examples is {num_examples}, but the adapter's config says {stated}: drop one of them"
        )
    callback = BayesCallback(trainer, num_examples)
    trainer.callback_handler.callbacks.insert(0, callback)
    if by_ivon:
        restore_after_training(trainer, callback.restore)
    _log_statistics(trainer, callback)
    return trainer


class BayesCallback(TrainerCallback):
    """The Trainer's events, handed to a `BayesLoop`, or to an `IvonLoop` where IVON is all that there is."""

    def __init__(self, trainer: Trainer, num_examples: int | None = None) -> None:
        self.trainer, self.num_examples = trainer, num_examples
        self.loop: BayesLoop | IvonLoop | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = self.trainer.model, unwrapped(kwargs["optimizer"])
        assert model is not None
        tuner = tuner_of(model)
        if isinstance(optimizer, IVON):
            check_trainer(optimizer)
            warn_of_short_travel(optimizer, state.max_steps, tuner)
            if tuner is None:
                self.loop = IvonLoop(optimizer, state.global_step)
                return
        self.loop = BayesLoop(
            model,
            optimizer,
            total_steps=state.max_steps,
            num_examples=self.num_examples or require_tuner(model).num_examples or training_examples(self.trainer),
            seed=args.seed,
            step=state.global_step,
        )

    def restore(self) -> None:
        """Set the weights to the mean where an interrupted or skipped step has left IVON's draw."""
        if self.loop is not None and isinstance(self.loop.optimizer, IVON):
            self.loop.optimizer.restore()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.loop is not None and isinstance(self.loop.optimizer, IVON):
            assert self.trainer.model is not None and args.output_dir is not None
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_posterior(self.trainer.model, self.loop.optimizer, folder)

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
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.restore()
        else:
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


def _log_statistics(trainer: Trainer, callback: BayesCallback) -> None:
    """Add the method's numbers to training logs before any reporter, or the history, sees them."""
    log = trainer.log

    def log_with_statistics(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and callback.loop is not None:
            with torch.no_grad():
                logs.update(callback.loop.statistics())
        log(logs, *args, **kwargs)

    trainer.log = log_with_statistics  # type: ignore[method-assign]
