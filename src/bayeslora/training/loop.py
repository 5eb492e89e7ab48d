"""What a training loop owes a method, in four calls around the optimizer's step."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from bayeslora.cost import relative_bops
from bayeslora.errors import BayesLoraError
from bayeslora.methods.tuner import BayesTuner, Schedule, tuner_of
from bayeslora.optim import IVON
from bayeslora.training.groups import ROLE
from bayeslora.training.ivon import check_ivon, posterior_statistics


class BayesLoop:
    """Drives the method of `model` through a run of `total_steps` optimizer steps.

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
        model: a PEFT model with one of this library's methods, possibly wrapped for distributed training.
        optimizer: over `parameter_groups(model, …)`, so that each role has a group of its own.
        total_steps: optimizer steps of the whole run.
        num_examples: N; only methods with a divergence need it.
        seed: of the noise drawn once a step.
        step: optimizer steps already taken, when a run is resumed.

    Raises:
        BayesLoraError: if the model has none of this library's adapters, the optimizer lacks the groups, or the method
            cannot work in this run (gates that cannot close).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        total_steps: int,
        num_examples: int | None = None,
        seed: int = 0,
        step: int = 0,
    ) -> None:
        self.tuner = require_tuner(model)
        self.model, self.optimizer, self.seed, self.step = model, optimizer, seed, step
        if isinstance(optimizer, IVON):
            check_ivon(self.tuner)
        self.penalties: dict[str, Tensor] = {}
        self.tuner.begin(Schedule(total_steps, num_examples, has_posterior=hasattr(optimizer, "posterior")))
        self._check_groups()
        self._share: tuple[object, dict[str, float]] | None = None

    def _check_groups(self) -> None:
        roles = {group.get(ROLE) for group in self.optimizer.param_groups}
        trained = {self.tuner.role_of(name) for name, p in self.tuner.named_parameters() if p.requires_grad}
        if missing := (trained | set(self.tuner.learning_rates)) - roles - {"weights"}:
            raise BayesLoraError(
                f"the optimizer has no group for the {', '.join(sorted(missing))}, which need a rate or decay of "
                "their own: build it from bayeslora.parameter_groups(model, lr=…)"
            )

    def step_begin(self) -> None:
        """Before the first micro-batch of an optimizer step: draws its noise, sets the rates of gates and ranges."""
        target = self.tuner.budget
        self.tuner.within_budget = target is not None and self.relative_bops()["attention"] <= target
        self.tuner.step_begin(self.step, self.seed)
        for group in self.optimizer.param_groups:
            rate = self.tuner.rate_of(group.get(ROLE, "weights"), self.step)
            if rate is not None:
                group["lr"] = rate
        if isinstance(self.optimizer, IVON):
            self.optimizer.sample(self.step)  # its step pairs the gradients with this noise, and ends at the mean

    def before_optimizer_step(self, scale: float = 1.0) -> None:
        """After the last backward pass and after clipping: adds `scale` times the penalty's gradient to `.grad`, once.

        The penalty depends on the parameters alone, so this is exact under gradient accumulation and on any number of
        ranks, where a penalty in the loss would count once for each micro-batch and rank. `scale` is the loss scale of
        mixed precision when the gradients have not been unscaled yet.
        """
        # The optimizer's groups are at hand; a walk over the model's tree would take longer than all that follows.
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        self.penalties = self.tuner.add_penalty(trained, scale)
        self.tuner.observe(self.step, self.optimizer, scale)

    def step_end(self) -> None:
        """After the optimizer's step: steers the budget, then allocates ranks, calibrates or freezes what is due."""
        target = self.tuner.budget
        if target is not None:
            share = self.relative_bops()["attention"]
            self.tuner.steer(share)
            if self.tuner.ends_learning(self.step):
                while share > target and self.tuner.close_weakest():
                    share = self.relative_bops()["attention"]
        self.tuner.allocate(self.step, self.optimizer)
        self.tuner.step_end(self.step)
        self.step += 1

    def relative_bops(self) -> dict[str, float]:
        """Present share of LoRA's bit operations by scope; computed again only when a rank or width has changed."""
        layers = self.tuner.describe()
        key = [(layer.rank, *layer.bits.values()) for layer in layers]
        if self._share is None or self._share[0] != key:
            self._share = (key, relative_bops(self.model, layers=layers))
        return self._share[1]

    def statistics(self) -> dict[str, float]:
        """What to log beside the loss: penalty terms, widths, ranks, bit operations."""
        values = {f"penalty_{name}": float(self.penalties.get(name, 0.0)) for name in self.tuner.penalty_names}
        values.update(self.tuner.statistics())
        values["relative_bops"] = self.relative_bops()["attention"]
        if isinstance(self.optimizer, IVON):
            values.update(posterior_statistics(self.optimizer))
        return values


def require_tuner(model: nn.Module) -> BayesTuner:
    """The tuner of `model`; raises `BayesLoraError` for a model without one of this library's adapters."""
    tuner = tuner_of(model)
    if tuner is None:
        raise BayesLoraError(
            f"{type(model).__name__} has no adapter of bayeslora to train: wrap it with "
            "get_peft_model(model, bayeslora.BLoraConfig(…)) first"
        )
    return tuner
