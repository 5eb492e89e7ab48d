r"""Shared by the variational methods: a Gaussian inside each layer, its noise, and one evidence lower bound.

The loss is the mean negative log-likelihood plus $\frac{\beta}{N} \sum_{layers} \mathrm{KL}(q \| p)$, with N the
number of training examples and a linear warm-up of $\beta$. A layer draws fresh noise while it trains, uses the
posterior mean in evaluation, when merged and when it is described, and follows `bayeslora.sampling` wherever that is
in force.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.config import AdapterConfig
from bayeslora.methods.description import LayerDescription, PosteriorWidth
from bayeslora.methods.layer import BayesLayer, add_update
from bayeslora.methods.tuner import BayesTuner, ParameterRole, RunState, TrainingSetup, tuner_of
from bayeslora.posterior import SCOPES, Noise, PassDraws, Scope, kl_divergence


@dataclass
class VariationalConfig(AdapterConfig):
    """Configuration fields of every method with a Gaussian posterior."""

    prior_is_derived: ClassVar[bool] = False
    """True if `prior_std` may be None, so that `prior_of` derives it from the rank."""

    num_examples: int | None = field(
        default=None, metadata={"help": "N, the training examples that the divergence is divided by."}
    )
    kl_weight: float = field(default=1.0, metadata={"help": "beta, the weight of the divergence; 1 is the bound."})
    kl_warmup: float = field(default=0.1, metadata={"help": "Share of the steps in which beta rises from 0."})
    prior_std: float | None = field(default=0.2, metadata={"help": "Standard deviation of the prior."})
    noise_scope: Scope = field(
        default="example", metadata={"help": "What shares a draw in training: 'example', 'token' or 'batch'."}
    )
    antithetic: bool = field(default=False, metadata={"help": "Draw noise in pairs of opposite sign in training."})
    variance_lr_factor: float = field(
        default=5.0, metadata={"help": "Learning rate of the variances as a multiple of the weights'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("noise_scope", SCOPES)
        known = self.num_examples is None or self.num_examples >= 1
        self._check("num_examples", known, "at least 1", "give the length of the training set")
        self._check("kl_weight", self.kl_weight >= 0, "at least 0", "give 1 for the evidence lower bound")
        self._check("kl_warmup", 0 <= self.kl_warmup < 1, "at least 0 and below 1", "give a share of the steps")
        self._check_prior()
        self._check("variance_lr_factor", self.variance_lr_factor >= 0, "at least 0", "give 0 to fix the variances")
        if self.antithetic and self.noise_scope != "example":
            raise BayesLoraError(
                f"noise_scope is {self.noise_scope!r}, but must be 'example' for antithetic noise: drop antithetic"
            )

    def _check_prior(self) -> None:
        known = self.prior_is_derived if self.prior_std is None else self.prior_std > 0
        self._check("prior_std", known, "above 0", "give a standard deviation")

    def prior_of(self, rank: int) -> float:
        """Return the standard deviation of the prior in a new layer of rank `rank`."""
        assert self.prior_std is not None
        return self.prior_std


class VariationalLayer(BayesLayer):
    """A layer whose update depends on one Gaussian matrix; a method says which."""

    matrix_B: ClassVar[str]
    """Name of the container of B (d_out, r)."""

    other_param_names = (*BayesLayer.other_param_names, "prior_std", "_fresh")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.noise: Noise | None = None
        self.is_controlled = False  # whether `noise` (None: the mean) stands for what the mode would choose
        self.prior_std: dict[str, float] = {}
        self._fresh: dict[str, Noise] = {}
        self._trained: str | None = None

    def hidden(self, name: str, x: Tensor, noise: Noise | None) -> Tensor:
        """(..., r): the update's path up to, and without, B, for `x` (..., d_in); None: at the posterior mean."""
        raise NotImplementedError

    def posterior(self, name: str) -> tuple[Tensor, Tensor, Tensor | float]:
        """Mean and standard deviation of the Gaussian matrix, of one shape, and the prior's mean."""
        raise NotImplementedError

    def prior(self, name: str) -> float | Tensor:
        """Standard deviation of the prior."""
        return self.prior_std[name]

    @torch.no_grad()
    def posterior_to_prior(self, name: str) -> Tensor:
        """Posterior by prior standard deviation of every entry, of the matrix's shape, float32."""
        return self.posterior(name)[1].float() / self.prior(name)

    def describe(self, adapter_name: str, name: str) -> LayerDescription:
        found = super().describe(adapter_name, name)
        ratios = self.posterior_to_prior(adapter_name)
        if ratios.is_meta or not ratios.any():
            return found
        parts = torch.quantile(ratios.flatten().cpu(), torch.tensor([0.05, 0.5, 0.95])).tolist()
        return replace(found, posterior_to_prior=PosteriorWidth(float(ratios.mean()), *parts))

    def member_count(self, name: str) -> int:
        """Members of an adapter that is an ensemble by itself; 1 for others."""
        return 1

    def drawn_A(self, name: str, noise: Noise) -> Tensor:
        """The first factor (r, d_in) under the first draw of `noise`, float32."""
        raise NotImplementedError

    def add_common(self, adapter_name: str, config: VariationalConfig, rank: int) -> None:
        """Keep what every variational adapter has besides its tensors."""
        self.initial_rank[adapter_name] = rank
        self.prior_std[adapter_name] = config.prior_of(rank)
        self._fresh[adapter_name] = Noise(config.noise_scope, antithetic=config.antithetic)

    def draw_for(self, name: str, rows: int) -> None:
        """Let adapter `name` alone draw in training, once for the `rows` rows that make up an example of a batch."""
        self._trained, self._fresh[name].rows_per_example = name, rows
        self._fresh[name].of_pass = PassDraws()

    @property
    def pass_draws(self) -> list[PassDraws]:
        """Draws that the calls of one forward pass share, of every adapter that a run has trained."""
        return [noise.of_pass for noise in self._fresh.values() if noise.of_pass is not None]

    def noise_of(self, name: str, position: int = 0) -> Noise | None:
        """The noise of this forward pass under `name`, at `position` among the active ones; None is the mean."""
        if self.is_controlled:
            return None if self.noise is None else self.noise.for_adapter(position)
        is_drawn = self.training and self._trained in (None, name)  # not a reference beside the one that is trained
        return self._fresh[name] if is_drawn else None

    def adapted(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for position, name in enumerate(adapter_names):
            b = self.B(name)
            hidden = self.hidden(name, self.adapter_input(name, x, b.dtype), self.noise_of(name, position))
            result = add_update(result, hidden, b, self.scaling[name])
        return result

    def B(self, name: str) -> Tensor:  # noqa: N802 - the field's name
        """The second factor (d_out, r)."""
        return cast(Tensor, getattr(self, self.matrix_B)[name])

    def kept(self, adapter_name: str) -> Tensor:
        return torch.ones(self.B(adapter_name).shape[1], dtype=torch.bool)  # every rank contributes

    def shrink(self, adapter_name: str) -> int:
        return len(self.kept(adapter_name))


def stochastic_layers(model: nn.Module) -> dict[str, VariationalLayer]:
    """Return the layers that can draw weights, by their path in the base model; empty for a deterministic model."""
    root = getattr(tuner_of(model), "model", model)
    return {path: module for path, module in root.named_modules() if isinstance(module, VariationalLayer)}


def has_posterior(model: nn.Module) -> bool:
    """Return True if the model has an adapter that can draw weights."""
    return bool(stochastic_layers(model))


def member_count(model: nn.Module, adapter_name: str | None = None) -> int:
    """Return the number K of cores (ensemble members) of an adapter, by default the active one; 1 for other models."""
    counts = [
        layer.member_count(name)
        for layer in stochastic_layers(model).values()
        for name in ([adapter_name] if adapter_name else layer.active_adapters)
        if name in layer.adapter_names
    ]
    return max(counts, default=1)


@contextmanager
def sampling(
    model: nn.Module,
    scope: Scope = "example",
    seed: int | None = None,
    draws: int | Sequence[int] = 1,
    antithetic: bool = False,
    scale: float = 1.0,
) -> Iterator[None]:
    """Compute with drawn weights inside the context, in training mode and in evaluation mode alike.

    With K cores, draw d uses member d mod K (with `antithetic`, pair by pair), and so does row d in scope `example`:
    K draws use each member once.

    Args:
        model: a model with an adapter that has a posterior.
        scope: what shares one draw: each row of the batch (`example`), each token (`token`), or all rows (`batch`).
        seed: seed of the draws; the same seed gives the same function. None draws anew in every forward pass.
        draws: number of draws in a batch, or their numbers. More than one needs scope `batch`, and a batch of equal,
            consecutive groups of rows, one for each draw.
        antithetic: pair draws with opposite noise.
        scale: factor of the standard deviations. 0 gives the means: with several cores, the mean of each member.

    Raises:
        BayesLoraError: the model has no posterior, its mean is merged, the scope is unknown, or the draws do not fit.
    """
    numbers = range(draws) if isinstance(draws, int) else draws
    if any(layer.merged for layer in stochastic_layers(model).values()):
        raise BayesLoraError(
            "the adapter is merged into the base weights, where only its posterior mean is: call unmerge_adapter first"
        )
    if not has_posterior(model):
        raise BayesLoraError(
            f"{type(model).__name__} has no posterior, but sampling draws from one: train with "
            "bayeslora.MeLoraConfig or bayeslora.BlobConfig, or drop the sampling"
        )
    with _controlled(model, lambda path: Noise(scope, seed, path, numbers, antithetic, scale)):
        yield


@contextmanager
def posterior_mean(model: nn.Module) -> Iterator[None]:
    """Compute with the posterior mean inside the context, even in training mode; no effect on deterministic models."""
    with _controlled(model, lambda path: None):
        yield


@contextmanager
def _controlled(model: nn.Module, noise_of: Callable[[str], Noise | None]) -> Iterator[None]:
    layers = stochastic_layers(model)
    chosen = {path: noise_of(path) for path in layers}
    before = [(layer, layer.is_controlled, layer.noise) for layer in layers.values()]
    try:
        for path, layer in layers.items():
            layer.is_controlled, layer.noise = True, chosen[path]
        yield
    finally:
        for layer, controlled, noise in before:
            layer.is_controlled, layer.noise = controlled, noise


@dataclass(kw_only=True)
class VariationalRun(RunState):
    """Length of a run and of its warm-up, and the share of `kl_weight` in force in the current step."""

    total_steps: int
    warm_up_steps: int
    kl_warmup_factor: float = 1.0


class VariationalModel(BayesTuner):
    """A variational method over a whole model: its divergence and the schedule of its weight."""

    roles: ClassVar[dict[str, ParameterRole]]
    """Role of a parameter by the name of its container."""

    penalty_names = ("kl",)
    without_a_run = "nothing is learned about the posterior but its mean"
    _hooked = False

    def config_of(self, name: str) -> VariationalConfig:
        return cast(VariationalConfig, self.peft_config[name])

    def kl(self) -> Tensor:
        """KL divergence of the trained adapter's posterior from its prior, summed over layers, in nats.

        An entry with a deviation of 0 counts as one with the prior's: what is left is the penalty of its mean.
        """
        name = self.training_adapter()
        parts = [layer.posterior(name) for layer in self.adapted_layers(name)]
        # One pass over all layers' entries instead of a few operations a layer; in units of each layer's prior.
        priors = [layer.prior(name) for layer in self.adapted_layers(name)]
        offsets = _gathered(
            [(m.float() - centre) / prior for (m, _, centre), prior in zip(parts, priors, strict=True)]
        )
        stds = _gathered([std / prior for (_, std, _), prior in zip(parts, priors, strict=True)])
        return kl_divergence(offsets, torch.where(stds > 0, stds, 1.0), 0.0, 1.0)

    def penalty(self) -> dict[str, Tensor]:
        r"""$\beta / N$ times the divergence (`kl`), at the warm-up's present share."""
        config = self.config_of(self.training_adapter())
        if not config.num_examples:
            raise BayesLoraError("N, the number of training examples, is not known: give num_examples in the config")
        return {"kl": self.kl() * (config.kl_weight * self.kl_warmup_factor / config.num_examples)}

    def role_of(self, parameter_name: str) -> ParameterRole:
        return next((role for container, role in self.roles.items() if f".{container}." in parameter_name), "weights")

    def rate_factor(self, role: ParameterRole) -> float:
        return self.config_of(self.training_adapter()).variance_lr_factor if role == "variances" else 1.0

    @property
    def num_examples(self) -> int | None:
        return self.config_of(self.training_adapter()).num_examples

    def forget_counted(self) -> None:
        name = self.training_adapter()
        if self.counted is not None and self.counted == self.config_of(name).num_examples:
            self.peft_config[name] = replace(self.config_of(name), num_examples=None)

    def begin(self, setup: TrainingSetup) -> None:
        """Fix N and the length of the warm-up; raises `BayesLoraError` where N is unknown or given in two ways."""
        name = self.training_adapter()
        config = self.config_of(name)
        for layer in self.adapted_layers(name):
            layer.draw_for(name, self.rows_per_example)
        if "kl" in self.penalty_names:
            self._fix_num_examples(config, setup.num_examples)
        self._run = VariationalRun(
            total_steps=setup.total_steps, warm_up_steps=round(config.kl_warmup * setup.total_steps)
        )
        if not self._hooked:
            self.model.register_forward_pre_hook(self._begin_pass, with_kwargs=True)
            self.model.register_forward_hook(self._end_pass, always_call=True)
            self._hooked = True

    def _begin_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward pass in training: a layer has one draw of its weights in it, however often it runs."""
        if self._run is not None and self.training:
            for draws in self._pass_draws():
                draws.begin_pass()

    def _end_pass(self, *_: Any) -> None:
        for draws in self._pass_draws():
            draws.end_pass()

    def _pass_draws(self) -> Iterator[PassDraws]:
        return (draws for layer in self.adapted_layers() for draws in layer.pass_draws)

    def run_state(self) -> VariationalRun:
        return cast(VariationalRun, super().run_state())

    @property
    def kl_warmup_factor(self) -> float:
        """Share of `kl_weight` in force: all of it where no run has begun."""
        return 1.0 if self._run is None else self.run_state().kl_warmup_factor

    def _fix_num_examples(self, config: VariationalConfig, given: int | None) -> None:
        stated = config.num_examples
        if stated is None and given is None:
            raise BayesLoraError(
                "N, the number of training examples that the divergence is divided by, is not known, as of a stream "
                "or of a loss over tokens: give num_examples in the config, to attach or to BayesLoop"
            )
        if stated is not None and given not in (None, stated):
            raise BayesLoraError(f"num_examples is {given}, but the adapter's config says {stated}: drop one of them")
        if stated is None:
            known = copy.copy(config)  # the caller's may go on to serve another training set
            known.num_examples = given
            self.peft_config[self.training_adapter()] = known

    def step_begin(self, step: int, seed: int) -> None:
        run = self.run_state()
        run.kl_warmup_factor = min(1.0, (step + 1) / (run.warm_up_steps + 1))

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Return divergence in nats, its warm-up, mean deviation (also by the prior's) and signal to noise, to log."""
        name = self.training_adapter()
        parts = [layer.posterior(name) for layer in self.adapted_layers(name)]
        means, stds = (_gathered([part[index] for part in parts]) for index in (0, 1))
        if not len(stds):
            return {"kl": 0.0, "kl_warmup": self.kl_warmup_factor}
        ratios = _gathered([layer.posterior_to_prior(name) for layer in self.adapted_layers(name)])
        noise = {"signal_to_noise": float((means.abs() / stds).median())} if stds.any() else {}
        return {
            "kl": float(self.kl()),
            "kl_warmup": self.kl_warmup_factor,
            "posterior_std": float(stds.mean()),
            "posterior_to_prior": float(ratios.mean()),
            **noise,
        }


def _gathered(tensors: list[Tensor]) -> Tensor:
    """All entries in one float32 vector, on the first one's device: a model's layers may sit on several."""
    return torch.cat([tensor.float().flatten().to(tensors[0].device) for tensor in tensors])


def per_group(x: Tensor, groups: int, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """`apply` on `x` (rows, ..., d) seen as (groups, rows x ... / groups, d), and back to (rows, ..., d')."""
    share = math.prod(x.shape[:-1]) // max(1, groups)  # not -1, which an empty batch leaves open
    out = apply(x.reshape(groups, share, x.shape[-1]))
    return out.reshape(*x.shape[:-1], out.shape[-1])
