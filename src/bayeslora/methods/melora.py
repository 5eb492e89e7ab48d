r"""Me-LoRA: all of the randomness in a small core between the two low-rank matrices (Me-LoRA, abstract).

$$ y = W_0 x + b + s\, B\, C\, A x, \qquad C = M + \Omega \circ \epsilon, \quad \epsilon \sim N(0, 1)^{r \times r}, $$

with $\Omega = \mathrm{softplus}(\rho)$ and the prior $C \sim N(I, \sigma_p^2)$. Only the abstract has been published;
this is the reading under which its parameter count, r(d_in + d_out) + 2r², holds. Everything random happens in r
dimensions: one core for each sequence costs 2r² multiplications a token.

At the start B = 0 and M = I: the update is zero for every draw, and the mean path begins as ordinary LoRA. The
function is the same for (B T⁻¹)(T C)A with any invertible T, so the prior's scale sets a pace, not a limit; weight
decay on A and B fixes that gauge. With `core="diagonal"` the core is a vector, c = m + ω ∘ ε, which is the stochastic
subspace of ScalaBL (arXiv:2506.21408) without its fixed bases.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslora.methods.variational import VariationalConfig, VariationalLayer, VariationalModel, per_group
from bayeslora.posterior import Noise, inverse_softplus, local_reparametrization, standard_deviation


@dataclass
class MeLoraConfig(VariationalConfig):
    """Configuration of Me-LoRA, on top of the fields shared with `peft.LoraConfig`."""

    method = "melora"

    core: Literal["full", "diagonal"] = field(
        default="full", metadata={"help": "An r x r core (full), or a vector (diagonal, as in ScalaBL)."}
    )
    prior_std: float = field(default=0.35, metadata={"help": "Standard deviation of the prior of the core's entries."})
    initial_std: float = field(default=0.35, metadata={"help": "Starting standard deviation of the core's entries."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("core", ("full", "diagonal"))
        self._check("initial_std", self.initial_std > 0, "above 0", "use plain LoRA for no noise")


class MeLoraLayer(VariationalLayer):
    """One linear layer under Me-LoRA; the same in plain torch on one page: `tests/oracles/melora.py`.

    Tensors of an adapter: `melora_A` (r, d_in), `melora_B` (d_out, r), `melora_M` and `melora_rho`, (r, r) for a full
    core and (r,) for a diagonal one.
    """

    adapter_layer_names = ("melora_A", "melora_B", "melora_M", "melora_rho")
    matrix_B = "melora_B"

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.melora_A, self.melora_B = nn.ParameterDict(), nn.ParameterDict()
        self.melora_M, self.melora_rho = nn.ParameterDict(), nn.ParameterDict()

    def add_adapter(self, adapter_name: str, config: MeLoraConfig, rank: int) -> None:
        self.add_common(adapter_name, config, rank)
        self.melora_A[adapter_name], self.melora_B[adapter_name] = self.initial_factors(config, rank)
        core = torch.eye(rank) if config.core == "full" else torch.ones(rank)
        self.melora_M[adapter_name] = nn.Parameter(core)
        self.melora_rho[adapter_name] = nn.Parameter(torch.full_like(core, inverse_softplus(config.initial_std)))

    def posterior(self, name: str) -> tuple[Tensor, Tensor, Tensor | float]:
        mean = self.melora_M[name]
        prior = torch.eye(len(mean), device=mean.device) if mean.ndim == 2 else 1.0
        return mean, standard_deviation(self.melora_rho[name]), prior

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
        core, std = self.melora_M[name].float(), standard_deviation(self.melora_rho[name])
        if noise.scope == "token":
            drawn = noise.normal_per_token(z.shape, z.device)
            return local_reparametrization(z, core, std, drawn) if core.ndim == 2 else z * (core + std * drawn)
        groups = noise.groups(len(z))
        cores = core + std * noise.normal(groups, core.shape, z.device)
        if core.ndim == 2:
            return per_group(z, groups, lambda rows: torch.bmm(rows, cores.transpose(1, 2)))
        return per_group(z, groups, lambda rows: rows * cores.unsqueeze(1))

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """M A (r, d_in), ones (r,) and B (d_out, r): the posterior mean as plain LoRA, float32."""
        return self._through(adapter_name, self.melora_M[adapter_name].float())

    def _through(self, name: str, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self.melora_A[name].float(), self.melora_B[name].float()
        return (core @ a if core.ndim == 2 else core.unsqueeze(1) * a), a.new_ones(len(a)), b

    @torch.no_grad()
    def drawn_A(self, name: str, noise: Noise) -> Tensor:
        core, std = self.melora_M[name].float(), standard_deviation(self.melora_rho[name])
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
