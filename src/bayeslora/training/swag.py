r"""SWAG: a Gaussian over the weights from the last iterates of a run (Maddox et al., 2019, arXiv:1902.02476).

From iterates $\theta_i$ of the last part of training, with mean $\bar\theta$, elementwise variance $\sigma^2$ over all
of them and the deviations $D$ of the last K from the mean, a draw is

$$ \theta = \bar\theta + a \Bigl( \tfrac{1}{\sqrt2}\, \sigma \circ z_1 + \tfrac{1}{\sqrt{2 (K - 1)}}\, D z_2 \Bigr),
\qquad z_1 \sim N(0, I), \quad z_2 \sim N(0, I_K), $$

with the scale a, 1 in the paper. The paper subtracts the running mean of the time from each iterate; here the iterates
are kept, and the final mean is subtracted, so that the second term has exactly half of their sample covariance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bayeslora.errors import BayesLoraError, counted, one_line
from bayeslora.files import write_atomically
from bayeslora.methods.tuner import tuner_of
from bayeslora.posterior import GaussianParameter, drawn_weights
from bayeslora.posterior.iterates import IterateMoments
from bayeslora.posterior.saved import check_unmerged
from bayeslora.training.groups import ROLE

SWAG_FILE = "swag.safetensors"
"""File in a checkpoint with the moments so far."""
_WEIGHT_ROLES = ("weights", "means")


class SWAG(TrainerCallback):
    """Callback that fits a Gaussian posterior over the trained weights to the last part of a Trainer's run.

    ```python
    swag = bayeslora.SWAG(model)
    trainer.add_callback(swag)
    trainer.train()
    bayeslora.predict(model, batch, samples=10, optimizer=swag)
    bayeslora.save_posterior(model, swag, folder)               # for load_posterior(model, folder)
    ```

    The posterior covers all trained weights of the adapter and the head, or of a full model; the gates, ranges and
    deviations of this library's methods are not sampled. After training, the weights are the mean of the iterates.
    Moments are float32 on the CPU, 4 (K + 2) bytes for each weight, whatever the weights' type. Checkpoints after
    `start` hold them in `swag.safetensors`, so a resumed run ends with the posterior of an uninterrupted one.

    Args:
        model: the model that the Trainer trains.
        start: share of the steps after which iterates (the weights after a step) are collected, at least 0, below 1.
        every: number of steps between iterates; by default chosen to give `rank` iterates.
        rank: K, the number of last iterates whose deviations from the mean are kept, at least 2.
        scale: a, the factor of every deviation from the mean, at least 0.
        hold_rate: keep the learning rate at its value at `start` while iterates are collected. With a learning rate
            that falls to zero, the spread of the iterates would shrink with the schedule.

    Raises:
        BayesLoraError: an argument is out of range, or, at the start of training, does not fit the run or the adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        start: float = 0.75,
        every: int | None = None,
        rank: int = 20,
        scale: float = 1.0,
        hold_rate: bool = True,
    ) -> None:
        if not 0 <= start < 1:
            raise BayesLoraError(f"start is {start}, but must be at least 0 and below 1: give start=0.75")
        for name, value, least in (("every", every, 1), ("rank", rank, 2)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise BayesLoraError(f"{name} is {value!r}, but must be a whole number of at least {least}: give one")
        if not scale >= 0:
            raise BayesLoraError(f"scale is {scale}, but must be at least 0: give 1 for the paper's")
        self.model, self.start, self.every, self.rank = model, start, every, rank
        self.scale, self.hold_rate = scale, hold_rate
        self._moments = IterateMoments(rank)
        self._parameters: list[nn.Parameter] = []
        self._first, self._every = 0, 1
        self._rates: list[float] | None = None

    @property
    def count(self) -> int:
        """Number of iterates collected so far."""
        return self._moments.count

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._parameters = trained_weights(self.model)
        self._first = int(self.start * state.max_steps)
        left = state.max_steps - self._first
        self._every = self.every or max(1, left // self.rank)
        if left // self._every < 2:
            raise BayesLoraError(
                f"SWAG would collect {counted(left // self._every, 'iterate')} in the last {left} of "
                f"{state.max_steps} steps, but needs at least 2: train for longer, or lower start or every"
            )
        self._check(args, kwargs["model"])
        self._moments, self._rates = IterateMoments(self.rank), None
        if state.global_step > self._first:
            assert args.output_dir is not None
            self._resume(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def _check(self, args: TrainingArguments, trained: nn.Module) -> None:
        known = {id(parameter) for parameter in trained.parameters()}
        sharded = any(hasattr(parameter, "device_mesh") for parameter in self._parameters)
        if args.deepspeed or sharded or not known.issuperset(map(id, self._parameters)):
            raise BayesLoraError(
                "the Trainer divides or replaces the model's parameters, but SWAG reads whole ones of the model it "
                "was given: give it the Trainer's model, and train with DDP or in one process"
            )
        if args.load_best_model_at_end:
            raise BayesLoraError(
                "load_best_model_at_end is True, but SWAG averages the last iterates: leave one of the two out"
            )
        tuner, first = tuner_of(self.model), self._first + self._every
        if tuner is not None and tuner.final_from > first:  # a mean over two bases is the weights of no model
            raise BayesLoraError(
                f"SWAG averages the weights from step {first}, but {tuner.title} changes their basis or ranks up to "
                f"step {tuner.final_from}: end that sooner (freeze_fraction=0.3, for AdaLoRA tfinal), or raise start"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.hold_rate or state.global_step < self._first:
            return
        groups = kwargs["optimizer"].param_groups
        if self._rates is None:
            self._rates = [float(group["lr"]) for group in groups]
        tuner = tuner_of(self.model)
        for group, rate in zip(groups, self._rates, strict=True):
            if tuner is None or tuner.rate_of(group.get(ROLE, "weights"), state.global_step) is None:
                group["lr"] = rate

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > self._first and (state.global_step - self._first) % self._every == 0:
            self._moments.add(torch.cat([parameter.detach().float().flatten() for parameter in self._parameters]))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Replace the schedule's learning rate in the log by the one that is held."""
        if self._rates is not None and "learning_rate" in kwargs["logs"]:
            for log in (kwargs["logs"], state.log_history[-1]):
                log["learning_rate"] = self._rates[0]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the weights to the mean of the iterates."""
        if self.count >= 2:
            for parameter, mean in zip(self._parameters, self._split(self._moments.mean), strict=True):
                parameter.data.copy_(mean)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero or state.global_step <= self._first:
            return
        assert args.output_dir is not None
        tensors = self._moments.tensors() if self.count else {}
        facts = {"count": self.count, "rates": self._rates, "weights": self._digest(), "every": self._every}
        with write_atomically(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / SWAG_FILE) as p:
            save_file(tensors, p, metadata={"swag": json.dumps(facts)})

    def _resume(self, folder: Path) -> None:
        """Continue from the moments in a checkpoint, after checking that the weights are those of that checkpoint."""
        try:
            with safe_open(folder / SWAG_FILE, framework="pt") as file:
                facts = json.loads(file.metadata()["swag"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise BayesLoraError(
                f"{folder / SWAG_FILE} cannot be read ({one_line(error)}), but a run that is resumed while SWAG "
                "collects needs it: resume from an earlier checkpoint, or start again"
            ) from error
        if facts["weights"] != self._digest() or facts["every"] != self._every:
            raise BayesLoraError(
                f"{folder / SWAG_FILE} belongs to other weights or another interval, but must be of the checkpoint "
                "that is resumed: resume with the arguments and the output folder of the first run"
            )
        self._rates = facts["rates"]
        if facts["count"]:
            self._moments.restore(facts["count"], tensors)

    def _digest(self) -> str:
        """Return a digest of the weights, which tells whether moments belong to them."""
        found = hashlib.blake2b(digest_size=16)
        for parameter in self._parameters:
            found.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def gaussians(self) -> list[GaussianParameter]:
        """Return the Gaussian of every weight, in the order of the model's parameters.

        Raises:
            BayesLoraError: fewer than two iterates have been collected.
        """
        if self.count < 2:
            raise BayesLoraError(
                f"SWAG has {counted(self.count, 'iterate')}, but a posterior needs at least 2: add it to a "
                "Trainer as a callback, and train"
            )
        columns = self._moments.deviations()
        columns *= self.scale * (2 * (len(columns) - 1)) ** -0.5
        deviation = self.scale * (self._moments.variance() / 2).sqrt()
        parts = (self._split(flat) for flat in (self._moments.mean, deviation, columns))
        return [
            GaussianParameter(parameter.numel(), parameter, *found)
            for parameter, *found in zip(self._parameters, *parts, strict=True)
        ]

    @contextmanager
    def sampled(self, seed: int = 0, draw: int = 0, antithetic: bool = False) -> Iterator[None]:
        """Set the weights to draw number `draw` inside the context, and restore them bit for bit afterwards."""
        check_unmerged(self.model)
        with drawn_weights(self.gaussians(), seed, draw, antithetic):
            yield

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Return the parameters' parts of (..., N) numbers, in their shapes."""
        sizes = [parameter.numel() for parameter in self._parameters]
        pairs = zip(flat.split(sizes, dim=-1), self._parameters, strict=True)
        return [part.reshape(*part.shape[:-1], *parameter.shape) for part, parameter in pairs]


def trained_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters of `model` that are weights or means of weights, in the model's order."""
    tuner = tuner_of(model)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (tuner is None or tuner.role_of(name) in _WEIGHT_ROLES)
    ]
