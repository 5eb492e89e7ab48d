r"""Me-LoRA: all of the randomness in a small core between the two low-rank matrices (Me-LoRA, abstract).

$$ y = W_0 x + b + s\, B\, C\, A x, \qquad C = M + \Omega \circ \epsilon, \quad \epsilon \sim N(0, 1)^{r \times r}, $$

with $\Omega = \mathrm{softplus}(\rho)$ and the prior $C \sim N(I, \sigma_p^2)$. Only the abstract has been published;
this is the reading under which its parameter count, r(d_in + d_out) + 2r², holds. Everything random happens in r
dimensions: one core for each sequence costs 2r² multiplications a token.

At the start B = 0 and M = I: the update is zero for every draw, and the mean path begins as ordinary LoRA. The
function is the same for (B T⁻¹)(T C)A with any invertible T, so the prior's scale sets a pace, not a limit; weight
decay on A and B fixes that gauge.

Learned by gradient from one draw, $\Omega$ hardly leaves the prior: the gradient's noise swamps it. With
`variance="closed_form"` it is set. One core for each row makes $\partial L / \partial C_b$ a gradient of single rows
at no cost. With $F$ the running mean of their squares, variational Gauss–Newton gives

$$ \Omega^2 = 1 / (N F / \beta + 1 / \sigma_p^2). $$

While B = 0 the output does not depend on the core and $\Omega$ is the prior's. Then noise falls where outputs depend
on the core, and stays elsewhere. With `core="diagonal"` the core is a vector, c = m + ω ∘ ε, which is the stochastic
subspace of ScalaBL (arXiv:2506.21408) without its fixed bases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from bayeslora._peft import BufferDict
from bayeslora.errors import BayesLoraError
from bayeslora.methods.tuner import TrainingSetup, batch_rows, summed_over_ranks
from bayeslora.methods.variational import VariationalConfig, VariationalLayer, VariationalModel, per_group
from bayeslora.posterior import Noise, inverse_softplus, local_reparametrization, standard_deviation

PRIOR_STD = 0.35
"""Default prior of a core whose deviations are learned."""

PRIOR_NOISE = 0.5
r"""Default noise over signal, $\sigma_p \sqrt{r}$, of the prior of a core whose deviations are set."""

FISHER_RATE = 0.05
"""Weight of one step in the running mean of squared gradients."""


@dataclass
class MeLoraConfig(VariationalConfig):
    """Configuration of Me-LoRA, on top of the fields shared with `peft.LoraConfig`."""

    method = "melora"
    prior_is_derived = True

    core: Literal["full", "diagonal"] = field(
        default="full", metadata={"help": "An r x r core (full), or a vector (diagonal, as in ScalaBL)."}
    )
    variance: Literal["learned", "closed_form"] = field(
        default="learned",
        metadata={
            "help": "Standard deviations of the core: learned by gradient, or set from gradients of single rows."
        },
    )
    prior_std: float | None = field(
        default=None,
        metadata={
            "help": "Standard deviation of the prior of the core's entries (0.35; with closed_form 0.5 / sqrt(r))."
        },
    )
    initial_std: float = field(default=0.35, metadata={"help": "Starting standard deviation of the core's entries."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("core", ("full", "diagonal"))
        self._check_choice("variance", ("learned", "closed_form"))
        self._check("initial_std", self.initial_std > 0, "above 0", "use plain LoRA for no noise")
        if self.variance == "closed_form":
            if self.noise_scope != "example":
                raise BayesLoraError(
                    f"noise_scope is {self.noise_scope!r}, but variance='closed_form' needs a core for each row: use "
                    "'example', or variance='learned'"
                )
            self._check("kl_weight", self.kl_weight > 0, "above 0 with variance='closed_form'", "give 1 for the bound")

    def prior_of(self, rank: int) -> float:
        if self.prior_std is not None:
            return self.prior_std
        return PRIOR_STD if self.variance == "learned" else PRIOR_NOISE / math.sqrt(max(1, rank))


class MeLoraLayer(VariationalLayer):
    """One linear layer under Me-LoRA; the same in plain torch on one page: `tests/oracles/melora.py`.

    Tensors of an adapter: `melora_A` (r, d_in), `melora_B` (d_out, r), `melora_M` and `melora_rho`, (r, r) for a full
    core and (r,) for a diagonal one. Where deviations are set, `melora_precision`, what N F / β is, takes the place of
    `melora_rho`.
    """

    other_param_names = (*VariationalLayer.other_param_names, "melora_precision", "_row_gradients")

    adapter_layer_names = ("melora_A", "melora_B", "melora_M", "melora_rho")
    matrix_B = "melora_B"

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.melora_A, self.melora_B = nn.ParameterDict(), nn.ParameterDict()
        self.melora_M, self.melora_rho = nn.ParameterDict(), nn.ParameterDict()
        self.melora_precision = BufferDict({}, persistent=True)
        self._row_gradients: dict[str, Tensor | None] = {}

    def add_adapter(self, adapter_name: str, config: MeLoraConfig, rank: int) -> None:
        self.add_common(adapter_name, config, rank)
        self.melora_A[adapter_name], self.melora_B[adapter_name] = self.initial_factors(config, rank)
        core = torch.eye(rank) if config.core == "full" else torch.ones(rank)
        self.melora_M[adapter_name] = nn.Parameter(core)
        if config.variance == "closed_form":
            self.melora_precision[adapter_name] = torch.zeros_like(core)
            self._row_gradients[adapter_name] = None
        else:
            self.melora_rho[adapter_name] = nn.Parameter(torch.full_like(core, inverse_softplus(config.initial_std)))

    def deviation(self, name: str) -> Tensor:
        r"""Return $\Omega$, of the core's shape, in float32."""
        if name not in self.melora_precision:
            return standard_deviation(self.melora_rho[name])
        return (self.melora_precision[name].float() + self.prior_std[name] ** -2).rsqrt()

    def take_row_gradients(self, name: str) -> Tensor:
        """Return the sum over rows of squared gradients of the core since the last call, of the core's shape."""
        found, self._row_gradients[name] = self._row_gradients[name], None
        return torch.zeros_like(self.melora_precision[name]) if found is None else found

    def posterior(self, name: str) -> tuple[Tensor, Tensor, Tensor | float]:
        mean = self.melora_M[name]
        prior = torch.eye(len(mean), device=mean.device) if mean.ndim == 2 else 1.0
        return mean, self.deviation(name), prior

    def hidden(self, name: str, x: Tensor, noise: Noise | None) -> Tensor:
        z = F.linear(x, self.melora_A[name])
        if z.shape[-1] == 0:
            return z
        core = self.melora_M[name]
        if noise is None:
            return F.linear(z, core) if core.ndim == 2 else z * core
        with torch.autocast(z.device.type, enabled=False):  # noise keeps its precision
            return self._drawn(name, z.float(), noise).to(z.dtype)

    def _drawn(self, name: str, z: Tensor, noise: Noise) -> Tensor:
        core, std = self.melora_M[name].float(), self.deviation(name)
        if noise.scope == "token":
            drawn = noise.normal_per_token(z.shape, z.device)
            return local_reparametrization(z, core, std, drawn) if core.ndim == 2 else z * (core + std * drawn)
        groups = noise.groups(len(z))
        cores = core + std * noise.normal(groups, core.shape, z.device)
        if self.training and torch.is_grad_enabled() and name in self._row_gradients:
            self._gather_gradients(name, cores)
        if core.ndim == 2:
            return per_group(z, groups, lambda rows: torch.bmm(rows, cores.transpose(1, 2)))
        return per_group(z, groups, lambda rows: rows * cores.unsqueeze(1))

    def _gather_gradients(self, name: str, cores: Tensor) -> None:
        """Add the squared gradients of each row's core when they arrive."""

        def gather(gradient: Tensor) -> None:
            squares = gradient.detach().float().square().sum(0)
            known = self._row_gradients[name]
            self._row_gradients[name] = squares if known is None else known + squares

        (cores if cores.requires_grad else cores.requires_grad_()).register_hook(gather)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """M A (r, d_in), ones (r,) and B (d_out, r): the posterior mean as plain LoRA, float32."""
        return self._through(adapter_name, self.melora_M[adapter_name].float())

    def _through(self, name: str, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self.melora_A[name].float(), self.melora_B[name].float()
        return (core @ a if core.ndim == 2 else core.unsqueeze(1) * a), a.new_ones(len(a)), b

    @torch.no_grad()
    def drawn_A(self, name: str, noise: Noise) -> Tensor:
        core, std = self.melora_M[name].float(), self.deviation(name)
        drawn = noise.normal(noise.groups(len(noise.draws)), core.shape, core.device)[0]
        return self._through(name, core + std * drawn)[0]


class Linear(MeLoraLayer):
    """The name PEFT's `all-linear` recognises an adapted layer by."""


class MeLoraModel(VariationalModel):
    """Me-LoRA over a whole model."""

    title = "Me-LoRA"
    prefix = "melora_"
    tuner_layer_cls = MeLoraLayer
    linear_class = Linear
    roles = {"melora_rho": "variances", "melora_M": "means"}
    _hooked = False
    _terms = 0

    def begin(self, setup: TrainingSetup) -> None:
        super().begin(setup)
        if self._sets_deviations and not self._hooked:
            self.model.register_forward_pre_hook(self._count_terms, with_kwargs=True)
            self._hooked = True

    @property
    def _sets_deviations(self) -> bool:
        return cast(MeLoraConfig, self.config_of(self.training_adapter())).variance == "closed_form"

    def _count_terms(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count what the mean loss is a mean of: rows, or labelled tokens."""
        if not (self.training and torch.is_grad_enabled()):
            return
        labels = kwargs.get("labels")
        if isinstance(labels, Tensor) and labels.ndim > 1 and not labels.is_floating_point():
            self._terms += int((labels != -100).sum())
            return
        self._terms += batch_rows(args, kwargs)

    def step_begin(self, step: int, seed: int) -> None:
        super().step_begin(step, seed)
        self._terms = 0
        if self._sets_deviations:
            name = self.training_adapter()
            for layer in self.adapted_layers(name):
                layer.take_row_gradients(name)  # of a step that was skipped

    @torch.no_grad()
    def observe(self, step: int, optimizer: Optimizer, scale: float = 1.0) -> None:
        super().observe(step, optimizer, scale)
        if not self._sets_deviations:
            return
        name = self.training_adapter()
        squares = [layer.take_row_gradients(name) / scale**2 for layer in self.adapted_layers(name)]
        # A rank's loss is the mean of its own terms: its gradients of single rows are 1 / terms of theirs.
        flat = _with_all_ranks(torch.cat([each.flatten().cpu() for each in squares]), self._terms)
        parts = flat.split([each.numel() for each in squares])
        self.run_state().found = [part.view_as(each).to(each) for part, each in zip(parts, squares, strict=True)]

    @torch.no_grad()
    def step_end(self, step: int) -> None:
        super().step_end(step)
        run, name = self.run_state(), self.training_adapter()
        if run.found is None:
            return
        config = self.config_of(name)
        for layer, fisher in zip(self.adapted_layers(name), run.found, strict=True):
            wanted = fisher * (cast(int, config.num_examples) / config.kl_weight)
            layer.melora_precision[name].lerp_(wanted, FISHER_RATE)
        run.found = None


def _with_all_ranks(squares: Tensor, terms: int) -> Tensor:
    """Return the mean over all ranks' terms of squared gradients, from each rank's sum of those of its mean loss."""
    flat = summed_over_ranks(torch.cat([squares * terms**2, torch.tensor([float(terms)])]))
    return flat[:-1] / flat[-1].clamp_min(1)
