r"""BLoB: Bayesian low-rank adaptation by backpropagation (arXiv:2406.11675), the first factor a Gaussian matrix.

$$ y = W_0 x + b + s\, B A x, \qquad A_{ij} \sim N(M_{ij}, \Omega_{ij}^2), \quad \Omega = G \circ G, $$

with B deterministic and the prior $A_{ij} \sim N(0, \sigma_p^2)$. Training uses flipout (scope `token`): one draw of
$\Omega \circ \epsilon$, decorrelated by random signs r and t on the input and on the hidden side,
$((x \circ r)(\Omega \circ \epsilon)^\top) \circ t$. The default loss is one evidence lower bound.
`kl_schedule="blob"` is the published alternation instead: after each step on the likelihood, one of plain gradient
descent on the divergence of M and G, weighted within cycles of K steps by $\pi_i = 2^i / (2^K - 1)$, i = 0 … K - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.tuner import TrainingSetup
from bayeslora.methods.variational import VariationalConfig, VariationalLayer, VariationalModel, per_group
from bayeslora.posterior import Noise, Scope


@dataclass
class BlobConfig(VariationalConfig):
    """Configuration of BLoB, on top of the fields shared with `peft.LoraConfig`."""

    method = "blob"

    noise_scope: Scope = field(
        default="token", metadata={"help": "Draws in training: 'token' (flipout), 'example' or 'batch'."}
    )
    initial_scale: float = field(
        default=0.05, metadata={"help": "G starts uniform in [this / sqrt(2), this]; deviations are its square."}
    )
    kl_schedule: Literal["elbo", "blob"] = field(
        default="elbo", metadata={"help": "One bound (elbo), or the published alternating steps (blob)."}
    )
    kl_cycle: int | None = field(default=None, metadata={"help": "Steps in a cycle of kl_schedule 'blob'."})
    kl_learning_rate: float = field(default=0.01, metadata={"help": "Rate of the divergence's own steps ('blob')."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("kl_schedule", ("elbo", "blob"))
        self._check("initial_scale", self.initial_scale > 0, "above 0", "give such as 0.05, because 0 has no gradient")
        if self.kl_schedule == "elbo" and self.kl_cycle is not None:
            raise BayesLoraError(f"kl_cycle is {self.kl_cycle}, but belongs to kl_schedule='blob': drop it")
        self._check("kl_cycle", self.kl_cycle is None or self.kl_cycle >= 1, "at least 1", "give a number of steps")


class BlobLayer(VariationalLayer):
    """One linear layer under BLoB: `blob_M` and `blob_G` (r, d_in), `blob_B` (d_out, r).

    The same in plain torch on one page: `tests/oracles/blob.py`.
    """

    adapter_layer_names = ("blob_M", "blob_G", "blob_B")
    matrix_B = "blob_B"

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.blob_M, self.blob_G, self.blob_B = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()

    def add_adapter(self, adapter_name: str, config: BlobConfig, rank: int) -> None:
        self.add_common(adapter_name, config, rank)
        self.blob_M[adapter_name], self.blob_B[adapter_name] = self.initial_factors(config, rank)
        scale = torch.empty(rank, self.in_features).uniform_(config.initial_scale / math.sqrt(2), config.initial_scale)
        self.blob_G[adapter_name] = nn.Parameter(scale)

    def posterior(self, name: str) -> tuple[Tensor, Tensor, Tensor | float]:
        return self.blob_M[name], self.blob_G[name].float().square(), 0.0

    def hidden(self, name: str, x: Tensor, noise: Noise | None) -> Tensor:
        mean = self.blob_M[name]
        if noise is None or not len(mean):
            return F.linear(x, mean)
        std = self.blob_G[name].float().square()
        if noise.scope == "token":
            perturbation = (std * noise.normal(1, mean.shape, x.device)[0]).to(mean.dtype)
            signs = noise.signs(x.shape, x.device, "in").to(x.dtype)
            hidden = F.linear(x, mean)
            flipped = noise.signs(hidden.shape, x.device, "out").to(hidden.dtype)
            return hidden + F.linear(x * signs, perturbation) * flipped
        groups = noise.groups(len(x))
        drawn = (mean.float() + std * noise.normal(groups, mean.shape, x.device)).to(mean.dtype)
        return per_group(x, groups, lambda rows: torch.bmm(rows, drawn.transpose(1, 2)))

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """M (r, d_in), ones (r,) and B (d_out, r): the posterior mean as plain LoRA, float32."""
        a = self.blob_M[adapter_name].float()
        return a, a.new_ones(len(a)), self.blob_B[adapter_name].float()

    @torch.no_grad()
    def drawn_A(self, name: str, noise: Noise) -> Tensor:
        mean, std = self.blob_M[name].float(), self.blob_G[name].float().square()
        return mean + std * noise.normal(noise.groups(len(noise.draws)), mean.shape, mean.device)[0]


class Linear(BlobLayer):
    """The name PEFT's `all-linear` recognises an adapted layer by."""


class BlobModel(VariationalModel):
    """BLoB over a whole model."""

    title = "BLoB"
    prefix = "blob_"
    tuner_layer_cls = BlobLayer
    linear_class = Linear
    roles = {"blob_G": "variances", "blob_M": "means"}

    def _blob_config(self) -> BlobConfig:
        return cast(BlobConfig, self.config_of(self.training_adapter()))

    @property
    def penalty_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("kl",) if self._blob_config().kl_schedule == "elbo" else ()

    def penalty(self) -> dict[str, Tensor]:
        return super().penalty() if self._blob_config().kl_schedule == "elbo" else {}

    def begin(self, setup: TrainingSetup) -> None:
        config = self._blob_config()
        if config.kl_schedule == "blob" and config.kl_cycle is None:
            raise BayesLoraError(
                "kl_schedule 'blob' needs kl_cycle, the steps in a cycle: the published code takes "
                "int(100 * N ** (pi / 8) / batch size)"
            )
        super().begin(setup)

    def step_end(self, step: int) -> None:
        """With `kl_schedule="blob"`: one step of gradient descent on the weighted divergence of M and G."""
        config = self._blob_config()
        if config.kl_schedule != "blob" or config.kl_cycle is None:
            return
        weight = 2.0 ** (step % config.kl_cycle - config.kl_cycle) / (1.0 - 2.0**-config.kl_cycle)
        name = self.training_adapter()
        parameters = [p for layer in self.adapted_layers(name) for p in (layer.blob_M[name], layer.blob_G[name])]
        gradients = torch.autograd.grad(self.kl(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=self._kl_rate(step) * weight)

    def _kl_rate(self, step: int) -> float:
        """Linear warm-up over 6% of the steps, then linear decay to 0, as published."""
        total = self.run_state().total_steps
        warm = max(1, round(0.06 * total))
        rising, falling = (step + 1) / warm, (total - step) / max(1, total - warm)
        return self._blob_config().kl_learning_rate * min(1.0, rising, falling)
