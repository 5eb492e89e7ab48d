"""One call that teaches a `transformers.Trainer` to train a Bayesian adapter."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch.amp.grad_scaler import OptState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bayeslora.errors import BayesLoraError, counted
from bayeslora.methods.tuner import BayesTuner, check_has_tuner, tuner_of
from bayeslora.posterior import unwrapped
from bayeslora.posterior.saved import check_unmerged
from bayeslora.training.best_model import check_best_model, forget_early_best, tell_unfinished
from bayeslora.training.hooks import check_sharding
from bayeslora.training.loop import BayesLoop
from bayeslora.training.loss_scale import correct_loss_scale
from bayeslora.training.optimizers import (
    OptimizerFactory,
    compares_pairs,
    grouped_optimizer,
    posterior_optimizer,
    training_examples,
    uses_ivon,
)

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def attach(
    trainer: AnyTrainer, num_examples: int | None = None, optimizer: str | OptimizerFactory | None = None
) -> AnyTrainer:
    """Attach the method of `trainer.model` to `trainer`, and return `trainer`; any Trainer works, including TRL's.

    This adds one callback before all others, gives the optimizer a parameter group for each role of the method's
    parameters, and adds the method's statistics to the Trainer's logs. The evaluation loss stays the task's own loss.
    A model without an adapter of this library (plain LoRA, a full model) trains as usual, unless IVON trains it. For
    every model, the scale of the loss under gradient accumulation and on several devices is corrected.

    With IVON, the weights are a draw from the posterior during an optimizer step, from its first micro-batch to its
    end. At all other times they are the mean: when the Trainer evaluates, saves, logs or stops, even by an exception.
    Checkpoints hold the posterior in `posterior.safetensors`. A second call with the same arguments changes nothing.

    Args:
        trainer: a Trainer whose training has not begun.
        num_examples: N, for methods with a KL divergence: the number of terms over which the loss of the whole
            training set is averaged. Defaults to the value in the adapter's configuration, or else to the length of
            the training set. Required for language models and token classifiers, whose loss is a mean over tokens.
        optimizer: `"ivon"`, or `functools.partial(bayeslora.IVON, hess_init=…, …)`, to train with IVON. Learning rate,
            weight decay and seed come from the Trainer's arguments, and `ess` is N, unless the partial sets them. None
            keeps the optimizer in the Trainer's arguments.

    Raises:
        BayesLoraError: DeepSpeed is used, which owns the gradients; the trainer's optimizer lacks the method's groups,
            or was given in addition to `optimizer`; N contradicts the configuration; B-LoRA or IVON is used under
            FSDP1; IVON has several Monte-Carlo samples, or the adapter has parameters other than weights; an earlier
            call had other arguments; or several GPUs would share one process. During training: a weight is no longer
            finite (raised at the next log).
    """
    arguments = (num_examples, optimizer)
    attached = [each for each in trainer.callback_handler.callbacks if isinstance(each, BayesCallback)]
    if attached and attached[0].arguments != arguments:
        raise BayesLoraError("attach was called before with other arguments, but works once: build a new Trainer")
    if trainer.model is None or attached:
        return trainer
    check_has_tuner(trainer.model)
    by_ivon = optimizer is not None or uses_ivon(trainer)
    correct_loss_scale(trainer)
    tuner = tuner_of(trainer.model)
    if tuner is None and not by_ivon:
        return trainer
    _check_distribution(trainer, tuner, by_ivon)
    check_unmerged(trainer.model)
    if tuner is not None:
        _prepare(trainer, tuner)
    _choose_optimizer(trainer, num_examples, optimizer)
    stated = None if tuner is None else tuner.num_examples
    if stated is not None and num_examples not in (None, stated):
        raise BayesLoraError(
            f"num_examples is {num_examples}, but the adapter's config says {stated}: drop one of them"
        )
    callback = BayesCallback(trainer, arguments)
    trainer.callback_handler.callbacks.insert(0, callback)
    if by_ivon:
        _restore_after_training(trainer, callback)
    return trainer


def _check_distribution(trainer: Trainer, tuner: BayesTuner | None, by_ivon: bool) -> None:
    if trainer.args.n_gpu > 1:
        raise BayesLoraError(
            f"{trainer.args.n_gpu} GPUs would share one process (DataParallel), but its copies of the model lose what "
            "a step draws and counts: start with torchrun, or set CUDA_VISIBLE_DEVICES=0"
        )
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise BayesLoraError("DeepSpeed hides the gradients, but methods need them: use DDP or FSDP2 instead")
    if trainer.is_fsdp_enabled and tuner is not None:
        check_sharding(tuner)
    if not trainer.is_fsdp_enabled or getattr(trainer.accelerator, "is_fsdp2", False):
        return
    if by_ivon:
        raise BayesLoraError("FSDP1 hides which weights a rank has, but IVON's noise depends on it: use FSDP2 or DDP")
    if tuner is not None and tuner.needs_whole_factors:
        raise BayesLoraError(f"FSDP1 flattens the factors, but {tuner.title} rotates them: use FSDP2 or DDP")


def _prepare(trainer: Trainer, tuner: BayesTuner) -> None:
    """Check that the adapter can be trained, and let its method know what the trainer's batches are."""
    _check_trainable(trainer.model, tuner)
    _show_labels(trainer, tuner)
    tuner.forget_counted()


def _show_labels(trainer: Trainer, tuner: BayesTuner) -> None:
    """Let the method see labels that the trainer takes out of the batch, as for label smoothing."""
    compute_loss = trainer.compute_loss

    @functools.wraps(compute_loss)
    def shown(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        current = tuner_of(cast(Any, trainer.model)) or tuner  # `model_init` gives every run a model of its own
        current.kept_labels = inputs.get("labels")
        try:
            return compute_loss(model, inputs, *args, **kwargs)
        finally:
            current.kept_labels = None

    trainer.compute_loss = shown  # type: ignore[method-assign]


def _check_trainable(model: Any, tuner: BayesTuner) -> None:
    own = [parameter for name, parameter in model.named_parameters() if tuner.prefix in name]
    if own and not any(parameter.requires_grad for parameter in own):
        raise BayesLoraError(
            "the adapter's weights are frozen, but training changes them: load the adapter with is_trainable=True, or "
            "leave inference_mode out of its config"
        )


def _choose_optimizer(trainer: Trainer, num_examples: int | None, optimizer: str | OptimizerFactory | None) -> None:
    free = trainer.optimizer is None and trainer.optimizer_cls_and_kwargs is None
    if optimizer is not None:
        if not free:
            raise BayesLoraError("the trainer has an optimizer, but attach was given another one: drop one of them")
        trainer.optimizer_cls_and_kwargs = posterior_optimizer(trainer, optimizer, num_examples)
    elif free:
        trainer.optimizer_cls_and_kwargs = grouped_optimizer(trainer)


class BayesCallback(TrainerCallback):
    """Callback that passes the Trainer's events to a `BayesLoop`."""

    def __init__(self, trainer: Trainer, arguments: tuple[int | None, str | OptimizerFactory | None]) -> None:
        self.trainer, self.arguments = trainer, arguments
        self._loop: BayesLoop | None = None

    @property
    def loop(self) -> BayesLoop:
        """Loop of the current run, which begins with `trainer.train()`."""
        if self._loop is None:
            raise BayesLoraError("the loop is asked for, but training has not begun: call trainer.train() first")
        return self._loop

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = self.trainer.model
        assert model is not None
        tuner = tuner_of(model)
        if tuner is not None:
            tuner.rows_per_example = 2 if compares_pairs(self.trainer) else 1
            tuner.forget_counted()
        stated = self.arguments[0] or (tuner.num_examples if tuner is not None else None)
        self._tell_of_other_data(stated)
        self._loop = BayesLoop(
            model,
            unwrapped(kwargs["optimizer"]),
            total_steps=state.max_steps,
            num_examples=stated or training_examples(self.trainer),
            seed=args.seed,
            step=state.global_step,
            rows=self.trainer.get_total_train_batch_size(args),
        )
        for hook in self._loop.hooks:
            hook.check_trainer()
        if tuner is not None and stated is None:
            tuner.counted = tuner.num_examples
        if state.global_step and not unwrapped(kwargs["optimizer"]).state:
            warnings.warn(
                f"training goes on after {counted(state.global_step, 'step')} without the optimizer's state, as the "
                "checkpoint was saved by save_only_model: it does not end where an uninterrupted run would",
                stacklevel=2,
            )
        check_best_model(args, state, tuner)

    def _tell_of_other_data(self, stated: int | None) -> None:
        rows = training_examples(self.trainer)
        if stated is not None and rows not in (None, stated) and self.arguments[0] is None:
            warnings.warn(
                f"num_examples is {stated} in the adapter's config, but the training loss has {counted(rows, 'term')}"
                ": set it to None there to count them, or give it to attach",
                stacklevel=2,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loop.step = state.global_step
        self.loop.step_begin()
        forget_early_best(state, self.loop.tuner)  # of an evaluation without a save, or of the checkpoint resumed

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loop.before_optimizer_step(*_loss_scales(kwargs["optimizer"]))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            self.loop.restore()
        self.loop.step_end()  # the Trainer counts a skipped step, so that what is due in it is due now

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget earlier evaluations before `EarlyStoppingCallback` compares with them, until the form is final."""
        if self._loop is not None:
            forget_early_best(state, self._loop.tuner)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert args.output_dir is not None
        for hook in self.loop.hooks:
            hook.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        forget_early_best(state, self.loop.tuner)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.loop.check_finite()
        tell_unfinished(state, self.loop.tuner)

    def restore(self) -> None:
        """Set the weights back to the mean after an interrupted step."""
        if self._loop is not None:
            self._loop.restore()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the method's numbers to training logs before any reporter sees them, and to the history."""
        if self._loop is not None and "loss" in kwargs["logs"]:
            self._loop.check_finite()
            with torch.no_grad():
                found = self._loop.statistics()
            # A trainer may log a number of its own by the same name, such as TRL's divergence from a reference.
            found = {name if name not in kwargs["logs"] else f"bayeslora_{name}": v for name, v in found.items()}
            kwargs["logs"].update(found)
            state.log_history[-1].update(found)


def _loss_scales(optimizer: Any) -> tuple[float, float]:
    """Return the loss scale that gradients still have, as some trainers unscale them, and that of the passes."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None:
        return 1.0, 1.0
    scale, state = scaler.get_scale(), scaler._per_optimizer_states[id(unwrapped(optimizer))]
    return (1.0 if state["stage"] == OptState.UNSCALED else scale), scale


def _restore_after_training(trainer: Trainer, callback: BayesCallback) -> None:
    """Set the weights back to the mean at the end of `trainer.train`, even after an exception."""
    train = trainer.train

    @functools.wraps(train)
    def train_and_restore(*args: Any, **kwargs: Any) -> Any:
        try:
            return train(*args, **kwargs)
        finally:
            callback.restore()

    trainer.train = train_and_restore  # type: ignore[method-assign]
