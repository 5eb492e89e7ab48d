r"""Bayesian AdaLoRA: a fixed budget of ranks, spent where the signal is strongest (arXiv:2303.10512, 2409.10673).

$$ y = W_0 x + b + s\, B\, \mathrm{diag}(E)\, A x, \qquad s = \alpha / r_0, $$

with $r_0$ = `init_r` ranks in every layer at the start. Each triplet (an entry of E, its row of A and its column of B)
has a score, and on a schedule the lowest entries of E over all layers are set to zero until `target_r` ranks a layer
are left on average. The scores come from the Gaussian posterior of an optimizer that keeps one (IVON), or from
AdamW's gradients (`sensitivity`, which is AdaLoRA itself). The penalty $\gamma\,\mathrm{mean}(\|A A^\top - I\|_F,
\|B^\top B - I\|_F)$ keeps A and B near orthogonal; as in AdaLoRA's code it is a mean of norms, where the paper has a
sum of squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayeslora.errors import BayesLoraError, counted
from bayeslora.methods.adalora.config import AdaLoraConfig
from bayeslora.methods.adalora.importance import (
    NEED_STD,
    budget_at,
    kept_ranks,
    score_of_posterior,
    sensitivities,
    triplet_scores,
    update_averages,
)
from bayeslora.methods.adalora.layer import AdaLoraLayer, Linear
from bayeslora.methods.adalora.orthogonality import distance_and_gradients, distance_from_orthogonal
from bayeslora.methods.tuner import BayesTuner, RunState, TrainingSetup, add_gradients, mean_ranks


@dataclass
class _Group:
    """Layers whose matrices have the same shapes, so that one operation does for all of them."""

    layers: list[AdaLoraLayer]
    A: list[nn.Parameter]
    E: list[nn.Parameter]
    B: list[nn.Parameter]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.A, *self.E, *self.B]


@dataclass(kw_only=True)
class AdaLoraRun(RunState):
    """The budget's schedule, and what the latest steps have shown.

    Attributes:
        warm_up_end, final_step: steps between which the budget falls, from `initial_budget` to `target_budget` ranks.
        rank_budget: ranks allowed at present.
        groups: the layers by shape, kept because three calls a step ask for them; None after a change of the model.
        observed: parameters and their |w g| in the latest step.
        kept: masks of the latest allocation, by the identity of their layer.
        variation: coefficient of variation of the posterior's deviations at the latest allocation.
        cut_before: ranks that were cut before the run began; later weights may carry noise.
    """

    warm_up_end: int
    final_step: int
    groups: list[_Group] | None
    initial_budget: int
    target_budget: int
    rank_budget: int
    observed: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    variation: Tensor | None = None
    cut_before: list[tuple[AdaLoraLayer, Tensor]] = field(default_factory=list)


class AdaLoraModel(BayesTuner):
    """Bayesian AdaLoRA over a whole model: its budget, its scores and its penalty."""

    title = "Bayesian AdaLoRA"
    without_a_run = "no rank is pruned"
    prefix = "bayes_adalora_"
    tuner_layer_cls = AdaLoraLayer
    linear_class = Linear
    trains_sharded = False
    least_travel = 0.5
    """The diagonal begins at zero, between factors of size 0.02: on SST-2 a travel of 0.3 left MiniLM at 69%, 1.2 took
    it to 84%, 1.5 to 86%."""

    def config_of(self, name: str) -> AdaLoraConfig:
        return cast(AdaLoraConfig, self.peft_config[name])

    @property
    def penalty_names(self) -> tuple[str, ...]:
        return ("orthogonality",) if self.config_of(self.training_adapter()).orth_reg_weight else ()

    def penalty(self) -> dict[str, Tensor]:
        r"""$\gamma$ times the mean over all A and B of their distance from orthonormal rows and columns."""
        weight = self.config_of(self.training_adapter()).orth_reg_weight
        if not weight:
            return {}
        return {"orthogonality": weight * distance_from_orthogonal(*self._rows_and_columns())}

    @torch.no_grad()
    def add_penalty(self, parameters: Sequence[nn.Parameter], scale: float = 1.0) -> dict[str, Tensor]:
        weight = self.config_of(self.training_adapter()).orth_reg_weight
        if not weight:
            return {}
        distance, pairs = distance_and_gradients(*self._rows_and_columns(), scale * weight)
        trained = {id(parameter) for parameter in parameters}
        add_gradients([(matrix, gradient) for matrix, gradient in pairs if id(matrix) in trained])
        return {"orthogonality": distance * weight}

    def _rows_and_columns(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """All A, whose rows are to be orthonormal, and all B, of which it is the columns."""
        groups = self._groups()
        return [a for group in groups for a in group.A], [b for group in groups for b in group.B]

    def begin(self, setup: TrainingSetup) -> None:
        """Fit the budget's schedule into the run; raises `BayesLoraError` where it cannot work."""
        name, total = self.training_adapter(), setup.total_steps
        config = self.config_of(name)
        if config.importance in NEED_STD and not setup.has_posterior:
            raise BayesLoraError(
                f"importance {config.importance!r} needs the posterior of the weights, which this optimizer does not "
                "keep: train with bayeslora.IVON (--optim ivon), or use importance 'sensitivity' or 'magnitude'"
            )
        warm_up_end = total // 10 if config.tinit is None else config.tinit
        final = 4 * total // 10 if config.tfinal is None else config.tfinal
        final_step = total - final
        if final_step <= warm_up_end:
            raise BayesLoraError(
                f"tinit {warm_up_end} and tfinal {final} leave none of {total} steps to allocate ranks in: keep "
                "their sum below the steps, or train longer"
            )
        groups = self._find_groups()
        initial = sum(e.numel() for group in groups for e in group.E)
        target = config.target_r * sum(len(group.E) for group in groups)
        if target >= initial:
            raise BayesLoraError(
                f"the layers have {counted(initial, 'rank')} and target_r {config.target_r} leaves {target}, "
                "but some must be cut"
                ": lower target_r"
            )
        run = self._run = AdaLoraRun(
            warm_up_end=warm_up_end,
            final_step=final_step,
            groups=groups,
            initial_budget=initial,
            target_budget=target,
            rank_budget=initial,
        )
        for layer in self._layers():
            e = layer.bayes_adalora_E[name].detach()
            run.cut_before.append((layer, (e != 0).to(e.dtype)))
            if name in layer.adalora_mask:
                del layer.adalora_mask[name]

    def run_state(self) -> AdaLoraRun:
        return cast(AdaLoraRun, super().run_state())

    def step_begin(self, step: int, seed: int) -> None:
        run = self.run_state()
        if run.cut_before:
            self._resume(step)
        run.cut_before = []

    def _resume(self, done: int) -> None:
        """Take up the allocations of a run that goes on after `done` steps: the budget, and which ranks were cut."""
        run, interval = self.run_state(), self.config_of(self.training_adapter()).deltaT
        latest = run.final_step if done >= run.final_step else done // interval * interval
        if latest > run.warm_up_end:
            run.rank_budget = budget_at(latest, run.warm_up_end, run.final_step, run.initial_budget, run.target_budget)
            run.kept = {id(layer): mask for layer, mask in run.cut_before}
        if done >= run.final_step:
            self._freeze(run.cut_before)

    def _freeze(self, masks: Sequence[tuple[AdaLoraLayer, Tensor]]) -> None:
        name = self.training_adapter()
        for layer, mask in masks:
            layer.adalora_mask[name] = mask

    def observe(self, step: int, optimizer: Optimizer, scale: float = 1.0) -> None:
        """Note |w g| of step `step`; the averages move in `allocate`, when the optimizer has made its own state."""
        run = self.run_state()
        run.observed = []
        if self.config_of(self.training_adapter()).importance != "sensitivity" or step + 1 >= run.final_step:
            return
        seen = [p for group in self._groups() for p in group.parameters if p.grad is not None]
        if seen:
            gradients = [cast(Tensor, p.grad) for p in seen]
            found = sensitivities(seen, gradients, scale)
            # Of a step that the loss scale skips it is not finite.
            if self.backward_scale == 1.0 or bool(torch.stack([each.isfinite().all() for each in found]).all()):
                run.observed = list(zip(seen, found, strict=True))

    @torch.no_grad()
    def allocate(self, step: int, optimizer: Optimizer) -> None:
        """Set the least important entries of E to zero where optimizer step `step` (from 0) is one to do so.

        They may grow again until the last allocation, at `total_steps - tfinal`; afterwards they stay zero.
        """
        self._move_averages(optimizer)
        run, config, done = self.run_state(), self.config_of(self.training_adapter()), step + 1
        if done > run.final_step:
            name = self.training_adapter()
            layers = [layer for layer in self._layers() if name in layer.adalora_mask]
            entries = [layer.bayes_adalora_E[name] for layer in layers]
            _multiply(entries, [cast(Tensor, layer.adalora_mask[name]) for layer in layers], optimizer)
        elif done == run.final_step or (done > run.warm_up_end and done % config.deltaT == 0):
            masks = self._cut(optimizer, done)
            if done == run.final_step:
                self._freeze(list(zip(self._layers(), masks, strict=True)))

    @property
    def is_final(self) -> bool:
        """True after the last allocation; an earlier model has more ranks than the budget allows."""
        return all(self.training_adapter() in layer.adalora_mask for layer in self._layers())

    @property
    def final_from(self) -> int:
        return self.run_state().final_step

    def _move_averages(self, optimizer: Optimizer) -> None:
        observed = self.run_state().observed
        if not observed:
            return
        config = self.config_of(self.training_adapter())
        states = [optimizer.state[p] for p, _ in observed]
        for state, (_, seen) in zip(states, observed, strict=True):
            if "importance" not in state:
                state["importance"], state["uncertainty"] = torch.zeros_like(seen), torch.zeros_like(seen)
        averages = [state["importance"] for state in states], [state["uncertainty"] for state in states]
        update_averages(*averages, [seen for _, seen in observed], config.beta1, config.beta2)
        self.run_state().observed = []

    def _cut(self, optimizer: Optimizer, done: int) -> list[Tensor]:
        """Zero what the budget after `done` steps does not allow; a mask for each layer, in the groups' order."""
        run = self.run_state()
        run.rank_budget = budget_at(done, run.warm_up_end, run.final_step, run.initial_budget, run.target_budget)
        groups = self._groups()
        scored = [self._scores(group, optimizer) for group in groups]
        scores = [score for score, _ in scored]
        device = scores[0].device
        keep = kept_ranks(torch.cat([score.flatten().to(device) for score in scores]), run.rank_budget)
        masks: list[Tensor] = []
        parts = keep.split([score.numel() for score in scores])
        for group, score, part in zip(groups, scores, parts, strict=True):
            masks += part.view(score.shape).to(score.device, group.E[0].dtype).unbind()
        _multiply([e for group in groups for e in group.E], masks, optimizer)
        run.kept = {id(layer): mask for layer, mask in zip(self._layers(), masks, strict=True)}
        run.variation = _variation([std.flatten().to(device) for _, stds in scored for std in stds])
        return masks

    def _scores(self, group: _Group, optimizer: Optimizer) -> tuple[Tensor, list[Tensor]]:
        """Score (layers, r) of every triplet of `group`, and the posterior's deviations, where there is one."""
        importance = self.config_of(self.training_adapter()).importance
        matrices = group.A, group.E, group.B
        if not hasattr(optimizer, "posterior"):
            if importance == "sensitivity":
                return triplet_scores(*[_averaged(parameters, optimizer) for parameters in matrices]), []
            means = [torch.stack([p.float() for p in parameters]) for parameters in matrices]
            return triplet_scores(*[score_of_posterior(importance, mean, None) for mean in means]), []
        moments = [_stacked_posterior(parameters, optimizer) for parameters in matrices]
        if importance == "sensitivity":
            elements = [_averaged(parameters, optimizer) for parameters in matrices]
        else:
            elements = [score_of_posterior(importance, mean, std) for mean, std in moments]
        return triplet_scores(*elements), [std for _, std in moments]

    def _groups(self) -> list[_Group]:
        """The trained adapter's layers by shape; kept for the length of a run, for three calls a step ask for it."""
        known = None if self._run is None else self.run_state().groups
        return known if known is not None else self._find_groups()

    def _forget_groups(self) -> None:
        if self._run is not None:
            self.run_state().groups = None

    def _find_groups(self) -> list[_Group]:
        name = self.training_adapter()
        found: dict[Any, _Group] = {}
        for layer in self.adapted_layers(name):
            a, e, b = layer.triplets(name)
            group = found.setdefault((a.shape, b.shape, a.device, a.dtype), _Group([], [], [], []))
            group.layers.append(layer)
            group.A.append(a)
            group.E.append(e)
            group.B.append(b)
        return list(found.values())

    def _layers(self) -> list[AdaLoraLayer]:
        return [layer for group in self._groups() for layer in group.layers]

    def shrink(self, adapter_name: str | None = None) -> dict[str, int]:
        self._forget_groups()
        return super().shrink(adapter_name)

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._forget_groups()
        super().inject_adapter(*args, **kwargs)

    def statistics(self) -> dict[str, float]:
        """Return the budget and the ranks left by the latest allocation, to log with the loss.

        With a posterior also `std_variation`, the coefficient of variation of all deviations at the latest allocation:
        near 0, every score is a function of the means alone.
        """
        run, layers = self.run_state(), self.named_layers(self.training_adapter())
        kept = {path: run.kept.get(id(layer)) for path, layer in layers.items()}
        ranks = {
            path: float(layer.bayes_adalora_E[self.training_adapter()].numel() if mask is None else mask.sum())
            for (path, mask), layer in zip(kept.items(), layers.values(), strict=True)
        }
        values = {"rank_budget": float(run.rank_budget), **mean_ranks(ranks)}
        if run.variation is not None:
            values["std_variation"] = float(run.variation)
        return values


def _averaged(parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> Tensor:
    """Averaged sensitivity times averaged deviation, stacked; zero where no gradient has been seen."""
    found = []
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if "importance" in state:
            found.append(state["importance"] * state["uncertainty"])
        else:
            found.append(torch.zeros_like(parameter))
    return torch.stack(found)


def _multiply(entries: Sequence[nn.Parameter], masks: Sequence[Tensor], optimizer: Optimizer) -> None:
    """Multiply E by its mask, and the optimizer's own copy of it where low-precision weights have one."""
    if not entries:
        return
    torch._foreach_mul_(list(entries), list(masks))
    for entry, mask in zip(entries, masks, strict=True):
        mean = optimizer.state.get(entry, {}).get("mean")
        if mean is not None:
            mean.mul_(mask)


def _stacked_posterior(parameters: Sequence[nn.Parameter], optimizer: Any) -> tuple[Tensor, Tensor]:
    """Means and deviations of parameters of one shape, stacked."""
    moments = [optimizer.posterior(p) for p in parameters]
    return torch.stack([mean for mean, _ in moments]), torch.stack([std for _, std in moments])


def _variation(deviations: Sequence[Tensor]) -> Tensor | None:
    """Coefficient of variation of the posterior's deviations, over all elements; None where there is no posterior."""
    if not deviations:
        return None
    std, mean = torch.std_mean(torch.cat(list(deviations)))
    return std / mean
