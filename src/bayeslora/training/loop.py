"""A method in a training loop: four calls around the optimizer's step."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from bayeslora.errors import BayesLoraError, counted
from bayeslora.methods.tuner import tuner_of
from bayeslora.optim import IVON
from bayeslora.posterior.draws import whole
from bayeslora.training.hooks import IvonHook, LoopHook, MethodHook


class BayesLoop:
    """Drive the method of `model`, the posterior of `optimizer`, or both, through a run of `total_steps` steps.

    ```python
    optimizer = torch.optim.AdamW(bayeslora.parameter_groups(model, lr=1e-3))
    loop = bayeslora.BayesLoop(model, optimizer, total_steps=1000)
    for batch in batches:
        loop.step_begin()
        model(**batch).loss.backward()      # any number of micro-batches
        loop.before_optimizer_step()        # adds the penalty's gradient, once
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
    ```

    Args:
        model: a PEFT model with one of this library's methods, possibly wrapped for distributed training; with
            IVON any model.
        optimizer: an optimizer built from `parameter_groups(model, …)`, so that each role has a group.
        total_steps: number of optimizer steps in the whole run.
        num_examples: N, the number of terms in the loss of the training set, for methods with a KL divergence.
        seed: seed of the noise that is drawn once per step.
        step: number of optimizer steps already taken, if a run is resumed.
        rows: rows per optimizer step, over all micro-batches and ranks. With it, B-LoRA can warn before training that
            there are too few; without it, B-LoRA counts them at its first decision.

    Raises:
        BayesLoraError: neither the adapter nor the optimizer comes from this library, the optimizer lacks the groups,
            or the method cannot work in this run (gates that cannot close, parameters that IVON cannot train).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        total_steps: int,
        num_examples: int | None = None,
        seed: int = 0,
        step: int = 0,
        rows: int | None = None,
    ) -> None:
        self.model, self.optimizer, self.step = model, optimizer, step
        self.tuner = tuner_of(model)
        self.hooks: list[LoopHook] = []
        if self.tuner is not None:
            self.hooks.append(MethodHook(self.tuner, model, optimizer, num_examples, seed, rows))
        if isinstance(optimizer, IVON):
            self.hooks.append(IvonHook(optimizer, model, self.tuner))
        if not self.hooks:
            raise BayesLoraError(
                f"{type(model).__name__} was given, but BayesLoop needs an adapter of bayeslora or IVON: wrap it with "
                "get_peft_model(model, bayeslora.BLoraConfig(…)) first"
            )
        for hook in self.hooks:
            hook.begin(total_steps)

    def step_begin(self) -> None:
        """Draw a step's noise and set the learning rates of gates and ranges; call before its first micro-batch."""
        for hook in self.hooks:
            hook.step_begin(self.step)

    def before_optimizer_step(self, scale: float = 1.0, backward_scale: float | None = None) -> None:
        """Add `scale` times the penalty's gradient to `.grad`; call after the last backward pass and after clipping.

        The penalty depends on the parameters alone, so this is exact under gradient accumulation and on any number of
        ranks; a penalty inside the loss would count once for each micro-batch and rank. `scale` is the loss scale of
        mixed precision that the gradients still have, `backward_scale` that of the backward passes, by default the
        same: after `scaler.unscale_(optimizer)` give `backward_scale=scaler.get_scale()`.
        """
        if self.tuner is not None:
            self.tuner.backward_scale = scale if backward_scale is None else backward_scale
        for hook in self.hooks:
            hook.before_step(self.step, scale)

    def step_end(self) -> None:
        """Allocate ranks, calibrate ranges or freeze gates where it is time; call after the optimizer's step."""
        try:
            for hook in self.hooks:
                hook.step_end(self.step)
        except RuntimeError:  # such as of a decomposition
            self.check_finite()
            raise
        self.step += 1

    def check_finite(self) -> None:
        """Raise `BayesLoraError` if a trained weight is not finite: training has diverged and cannot recover."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(whole(parameter)).all()):
                raise BayesLoraError(
                    f"{name} is not finite after {counted(self.step, 'step')}, but must be (training diverged): "
                    "lower the learning rate"
                )

    def restore(self) -> None:
        """Set the weights back to the mean; call instead of `step_end` after an interrupted or skipped step."""
        for hook in self.hooks:
            hook.restore()

    def statistics(self) -> dict[str, float]:
        """Return statistics to log with the loss: penalty terms, widths, ranks, bit operations, IVON's posterior."""
        return {name: value for hook in self.hooks for name, value in hook.statistics().items()}
