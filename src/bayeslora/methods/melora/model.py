"""Me-LoRA over a whole model: the deal of the rows, the fade-in of the noise, and deviations that are set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayeslora.errors import BayesLoraError
from bayeslora.methods.melora.config import MeLoraConfig
from bayeslora.methods.melora.cores import Deal
from bayeslora.methods.melora.layer import Linear, MeLoraLayer
from bayeslora.methods.tuner import TrainingSetup, batch_rows, summed_over_ranks
from bayeslora.methods.variational import VariationalModel, VariationalRun


@dataclass(kw_only=True)
class MeLoraRun(VariationalRun):
    """Members of the present batch, and, where deviations are set, what the present step says about them.

    Attributes:
        deal: members of the rows.
        terms: (K,) terms of the loss in this step, rows or labelled tokens, by member.
        found: mean squared gradients of single rows, by layer, once they are known.
        seen: which members had terms on any rank.
    """

    deal: Deal
    terms: Tensor
    found: list[Tensor] | None = None
    seen: Sequence[bool] = ()


class MeLoraModel(VariationalModel):
    """Me-LoRA over a whole model."""

    title = "Me-LoRA"
    prefix = "melora_"
    tuner_layer_cls = MeLoraLayer
    linear_class = Linear
    trains_sharded = False
    roles = {"melora_rho": "variances", "melora_M": "means"}

    def config_of(self, name: str) -> MeLoraConfig:
        return cast(MeLoraConfig, super().config_of(name))

    def kl(self) -> Tensor:
        """KL divergence from the prior in nats, summed over layers; of several cores the mean over members."""
        return super().kl() / self.config_of(self.training_adapter()).cores

    def begin(self, setup: TrainingSetup) -> None:
        super().begin(setup)
        name = self.training_adapter()
        config = self.config_of(name)
        self._run = MeLoraRun(**vars(super().run_state()), deal=Deal(config.cores), terms=torch.zeros(config.cores))
        if config.cores > 1:
            for layer in self.adapted_layers(name):
                layer.deals[name] = self._run.deal

    def run_state(self) -> MeLoraRun:
        return cast(MeLoraRun, super().run_state())

    @property
    def _sets_deviations(self) -> bool:
        return self.config_of(self.training_adapter()).variance == "closed_form"

    def _begin_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Deal the rows, and count by member what the mean loss is a mean of: rows, or labelled tokens."""
        super()._begin_pass(model, args, kwargs)
        if self._run is None or not (self.training and torch.is_grad_enabled()):
            return
        run = self.run_state()
        rows, copies = batch_rows(args, kwargs), self.rows_per_example
        members = run.deal.begin_pass(rows // copies, copies)
        if self._sets_deviations:
            run.terms.index_add_(0, members, self.terms_in(kwargs, rows))

    def _end_pass(self, *_: Any) -> None:
        super()._end_pass()
        if self._run is not None:
            self.run_state().deal.end_pass()

    def step_begin(self, step: int, seed: int) -> None:
        super().step_begin(step, seed)
        run, name = self.run_state(), self.training_adapter()
        config = self.config_of(name)
        run.terms.zero_()
        run.deal.begin_step(seed, step)
        share = config.noise_at(step, run.total_steps)
        for layer in self.adapted_layers(name):
            layer.set_noise(name, share)
            if self._sets_deviations:
                layer.take_row_gradients(name)  # of a step that was skipped

    @torch.no_grad()
    def observe(self, step: int, optimizer: Optimizer, scale: float = 1.0) -> None:
        super().observe(step, optimizer, scale)
        if not self._sets_deviations:
            return
        run, name = self.run_state(), self.training_adapter()
        squares = [layer.take_row_gradients(name) / self.backward_scale**2 for layer in self.adapted_layers(name)]
        count = len(run.terms)
        # A rank's loss is the mean of its own terms: its gradients of single rows are 1 / terms of theirs.
        # One copy from and to an accelerator, and not one for each layer.
        device = squares[0].device if len({each.device for each in squares}) == 1 else torch.device("cpu")
        joined = torch.cat([each.view(count, -1).to(device) for each in squares], dim=1).cpu()
        if not run.terms.any() and joined.any():
            raise BayesLoraError(
                f"the training passes of step {step + 1} went past the adapted model, but it counts their rows: call "
                "the model itself, not its forward or its parts"
            )
        flat, run.seen = _with_all_ranks(joined, run.terms)
        if not bool(flat.isfinite().all()):  # of a step that the loss scale skips it is not
            return
        parts = flat.to(device).split([each.numel() // count for each in squares], dim=1)
        run.found = [part.reshape(each.shape).to(each) for part, each in zip(parts, squares, strict=True)]

    @torch.no_grad()
    def step_end(self, step: int) -> None:
        super().step_end(step)
        run, name = self.run_state(), self.training_adapter()
        if run.found is None:
            return
        config = self.config_of(name)
        for layer, fisher in zip(self.adapted_layers(name), run.found, strict=True):
            layer.set_precision(name, fisher * (cast(int, config.num_examples) / config.kl_weight), run.seen)
        run.found = None


def _with_all_ranks(squares: Tensor, terms: Tensor) -> tuple[Tensor, Sequence[bool]]:
    """Return means over all ranks' terms of squared gradients, by member, and which members had terms.

    Args:
        squares: (K, n) sums of squares of the gradients of this rank's mean loss.
        terms: (K,) terms of that loss.
    """
    gathered = torch.cat([squares * terms.sum() ** 2, terms.unsqueeze(1)], dim=1)
    flat = summed_over_ranks(gathered)
    return flat[:, :-1] / flat[:, -1:].clamp_min(1), (flat[:, -1] > 0).tolist()
