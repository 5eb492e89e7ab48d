"""The best checkpoint of a Trainer's run: one of those whose adapter has its final form."""

from __future__ import annotations

import warnings

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from bayeslora.errors import BayesLoraError, counted
from bayeslora.methods.tuner import BayesTuner


def check_best_model(args: TrainingArguments, state: TrainerState, tuner: BayesTuner | None) -> None:
    """Check that a run that ends with its best model evaluates at least one with its final form.

    A Trainer with an evaluation strategy evaluates and saves the last step as well, unless `eval_delay` prevents it.

    Raises:
        BayesLoraError: `load_best_model_at_end` is set, but no such model is evaluated.
    """
    if tuner is None or not args.load_best_model_at_end or tuner.final_from == 0:
        return
    last = state.num_train_epochs if args.eval_strategy == IntervalStrategy.EPOCH else state.max_steps
    if args.eval_strategy != IntervalStrategy.NO and args.eval_delay <= last:
        return
    steps = max(1, (state.max_steps - tuner.final_from) // 2)
    raise BayesLoraError(
        f"load_best_model_at_end is set, but no evaluation falls in steps {tuner.final_from} to {state.max_steps}, in "
        f"which {tuner.title} has its final form: use eval_strategy and save_strategy 'steps' with eval_steps and "
        f"save_steps {steps}, and an eval_delay of at most {state.max_steps}"
    )


def tell_unfinished(state: TrainerState, tuner: BayesTuner | None) -> None:
    """Warn if a run was stopped, such as by a callback, before the adapter has its final form."""
    if tuner is not None and state.global_step < state.max_steps and not tuner.is_final:
        warnings.warn(
            f"training was stopped after {state.global_step} of {counted(state.max_steps, 'step')}, but "
            f"{tuner.title} has its final ranks and widths from step {tuner.final_from}: resume it from a checkpoint, "
            "or set max_steps to what there is time for",
            stacklevel=2,
        )


def forget_early_best(state: TrainerState, tuner: BayesTuner | None) -> None:
    """Clear the best model in `state` if the adapter does not have its final form yet.

    A B-LoRA in its warm-up is not quantized and has all ranks, so its loss is often the lowest of the run.
    """
    if tuner is None or tuner.is_final:
        return
    state.best_metric = None
    state.best_global_step = None
    state.best_model_checkpoint = None
