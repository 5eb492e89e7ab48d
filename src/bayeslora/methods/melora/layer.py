"""One linear layer under Me-LoRA: its cores, its draws, and the gradients of single rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslora._peft import BufferDict
from bayeslora.errors import BayesLoraError
from bayeslora.methods.melora.config import INITIAL_STD, MeLoraConfig
from bayeslora.methods.melora.cores import Deal, in_turn, starting_cores
from bayeslora.methods.melora.row_gradients import RowGradients
from bayeslora.methods.variational import VariationalLayer, per_group
from bayeslora.posterior import Noise, inverse_softplus, local_reparametrization, standard_deviation
from bayeslora.quantization import Float32Module

FISHER_RATE = 0.05
"""Weight of one step in the running mean of squared gradients, and in that of the prior's evidence."""

LEAST_PRIOR = 1e-3
"""Smallest standard deviation of a prior from the evidence."""


class Float32Buffers(Float32Module, BufferDict):
    """Buffers by adapter that stay float32: a running mean moves by less than bfloat16 resolves."""

    def __setitem__(self, name: str, buffer: Tensor) -> None:
        super().__setitem__(name, buffer.float())  # PEFT gives it the base's type


class MeLoraLayer(VariationalLayer):
    """One linear layer under Me-LoRA; the same in plain torch on one page: `tests/oracles/melora.py`.

    Tensors of an adapter: `melora_A` (r, d_in), `melora_B` (d_out, r), `melora_M` and `melora_rho`, (r, r) for a full
    core and (r,) for a diagonal one; K > 1 cores are stacked, (K, r, r) or (K, r). Where deviations are set,
    `melora_precision`, what N F / β is, takes the place of `melora_rho`. A prior from the evidence is `melora_prior`
    (1,).

    Attributes:
        cores: K, by adapter.
        deals: members of the rows of a training batch, by adapter; where no run has begun, rows take members in turn.
            An input that rows of several members share has the mean of the cores.
    """

    other_param_names = (
        *VariationalLayer.other_param_names,
        *("melora_precision", "melora_prior", "cores", "deals", "_start", "_row_gradients"),
    )

    adapter_layer_names = ("melora_A", "melora_B", "melora_M", "melora_rho")
    matrix_B = "melora_B"

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.melora_A, self.melora_B = nn.ParameterDict(), nn.ParameterDict()
        self.melora_M, self.melora_rho = nn.ParameterDict(), nn.ParameterDict()
        self.melora_precision = Float32Buffers({}, persistent=True)
        self.melora_prior = Float32Buffers({}, persistent=True)
        self._start: dict[str, tuple[int, int, float, bool]] = {}
        self.cores: dict[str, int] = {}
        self.deals: dict[str, Deal] = {}
        self._row_gradients: dict[str, RowGradients] = {}

    def add_adapter(self, adapter_name: str, config: MeLoraConfig, rank: int) -> None:
        self.add_common(adapter_name, config, rank)
        self.melora_A[adapter_name], self.melora_B[adapter_name] = self.initial_factors(config, rank)
        self.cores[adapter_name] = config.cores
        self._start[adapter_name] = (config.cores, rank, config.core_spread, config.core == "diagonal")
        core = starting_cores(*self._start[adapter_name], torch.device("cpu"))
        self.melora_M[adapter_name] = nn.Parameter(core.clone())
        if config.variance == "closed_form":
            self.melora_precision[adapter_name] = torch.zeros_like(core)
            self._row_gradients[adapter_name] = RowGradients(core.shape)
        elif config.variance == "learned":
            self.melora_rho[adapter_name] = nn.Parameter(
                torch.full_like(core, inverse_softplus(config.initial_std or INITIAL_STD))
            )
        if config.prior_std == "evidence":
            self.melora_prior[adapter_name] = torch.full((1,), self.prior_std[adapter_name])

    def prior(self, name: str) -> float | Tensor:
        return self.melora_prior[name] if name in self.melora_prior else self.prior_std[name]

    def deviation(self, name: str) -> Tensor:
        r"""Return $\Omega$, of the core's shape, in float32; zeros for members without noise."""
        if name in self.melora_precision:
            return (self.melora_precision[name].float() + self.prior(name) ** -2).rsqrt()
        if name in self.melora_rho:
            return standard_deviation(self.melora_rho[name])
        return torch.zeros_like(self.melora_M[name], dtype=torch.float32)

    def member_count(self, name: str) -> int:
        return self.cores[name]

    def mean_core(self, name: str) -> Tensor:
        """Return the mean of the members' means (r, r) or (r,): the core of a pass without noise."""
        mean = self.melora_M[name]
        return mean if self.cores[name] == 1 else mean.mean(0)

    def set_noise(self, name: str, share: float) -> None:
        """Set the share of the deviations, from 0 to 1, that noise has in training."""
        self._fresh[name].scale = share

    @torch.no_grad()
    def set_precision(self, name: str, wanted: Tensor, seen: Sequence[bool]) -> None:
        """Follow `wanted`, what N F / β is in this step, for the members that were seen, and the prior's evidence."""
        precision = self.melora_precision[name]
        if self.cores[name] == 1:
            precision.lerp_(wanted, FISHER_RATE)
        else:
            for member in (index for index, was_seen in enumerate(seen) if was_seen):
                precision[member].lerp_(wanted[member], FISHER_RATE)
        if name in self.melora_prior:
            mean, std, start = self.posterior(name)
            evidence = (std.square() + (mean - start).square()).mean()
            variance = torch.lerp(self.melora_prior[name].square(), evidence, FISHER_RATE)
            self.melora_prior[name].copy_(variance.sqrt().clamp_min(LEAST_PRIOR))

    def take_row_gradients(self, name: str) -> Tensor:
        """Return the sum over rows of squared gradients of the core since the last call, of the core's shape."""
        found = self._row_gradients[name].take()
        return torch.zeros_like(self.melora_precision[name]) if found is None else found

    def posterior(self, name: str) -> tuple[Tensor, Tensor, Tensor | float]:
        mean = self.melora_M[name]
        return mean, self.deviation(name), starting_cores(*self._start[name], mean.device)

    def hidden(self, name: str, x: Tensor, noise: Noise | None) -> Tensor:
        z = F.linear(x, self.melora_A[name])
        if z.shape[-1] == 0:
            return z
        if noise is None:
            core = self.mean_core(name)
            return F.linear(z, core) if core.ndim == 2 else z * core
        with torch.autocast(z.device.type, enabled=False):  # noise keeps its precision
            return self._drawn(name, z.float(), noise).to(z.dtype)

    def _drawn(self, name: str, z: Tensor, noise: Noise) -> Tensor:
        core, std = self.melora_M[name].float(), self.deviation(name)
        if noise.scope == "token":
            if self.cores[name] > 1:
                raise BayesLoraError(
                    f"scope is 'token', but a token cannot choose among {self.cores[name]} cores: use 'example' or "
                    "'batch'"
                )
            drawn = noise.normal_per_token(z.shape, z.device)
            return local_reparametrization(z, core, std, drawn) if core.ndim == 2 else z * (core + std * drawn)
        groups = noise.groups(len(z))
        if self._is_shared(name, groups):
            core = self.mean_core(name).float()
            return F.linear(z, core) if core.ndim == 2 else z * core
        members = self._members(name, groups, noise)
        cores = self._draw(name, groups, members, noise)
        if self.training and torch.is_grad_enabled() and name in self._row_gradients:
            self._gather_gradients(name, cores, members)
        if cores.ndim == 3:
            return per_group(z, groups, lambda rows: torch.bmm(rows, cores.transpose(1, 2)))
        return per_group(z, groups, lambda rows: rows * cores.unsqueeze(1))

    def _is_shared(self, name: str, groups: int) -> bool:
        """Return True if rows of several members share this input, such as DeBERTa's table of positions."""
        deal = self.deals.get(name)
        return self.cores[name] > 1 and groups == 1 and not self.is_controlled and deal is not None and deal.is_mixed

    def _draw(self, name: str, groups: int, members: Tensor | None, noise: Noise) -> Tensor:
        """Draw a core for each group, (groups, r, r) or (groups, r) in float32, from its member or the only one."""
        core, std = self._means(name).float(), self.deviation(name)
        if members is not None:
            core, std = core[members], std[members]
        if name not in self.melora_precision and name not in self.melora_rho:
            return core
        return core + std * noise.normal(groups, core.shape[members is not None :], core.device)

    def _means(self, name: str) -> Tensor:
        """Return the means of the cores; a single one without a gradient by it in training before the noise.

        It then is still the identity, so that training is LoRA's until the noise begins.
        """
        means = self.melora_M[name]
        if not (self.training and self.cores[name] == 1 and self._fresh[name].scale == 0.0):
            return means
        return means.detach() + 0.0 * means  # zero, not None: distributed training waits for it

    def _members(self, name: str, groups: int, noise: Noise) -> Tensor | None:
        """Return the members (groups,) that the groups of rows belong to; None with one core."""
        count, device = self.cores[name], self.melora_M[name].device
        if count == 1:
            return None
        if noise.scope == "batch":  # a pair of opposite draws belongs to one member
            members = torch.tensor(list(noise.draws)) // (2 if noise.antithetic else 1) % count
        elif name in self.deals and not self.is_controlled:
            members = self.deals[name].of_rows(groups)
        else:
            members = in_turn(groups, count)
        return members.to(device)

    def _gather_gradients(self, name: str, cores: Tensor, members: Tensor | None) -> None:
        """Add the gradients of each row's core, by member, when they arrive."""
        fresh, draws = self._fresh[name], self._fresh[name].of_pass
        number = 0 if draws is None else draws.number

        def gather(gradient: Tensor) -> None:
            examples = gradient.detach().float().unflatten(0, (fresh.rows_per_example, -1)).sum(0)
            repeats = draws is not None and draws.repeats
            self._row_gradients[name].add(examples, members, number if repeats else None)

        (cores if cores.requires_grad else cores.requires_grad_()).register_hook(gather)

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        """M A (r, d_in), ones (r,) and B (d_out, r): the posterior mean as plain LoRA, float32.

        M is the mean of several cores.
        """
        return self._through(adapter_name, self.mean_core(adapter_name).float())

    def _through(self, name: str, core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = self.melora_A[name].float(), self.melora_B[name].float()
        return (core @ a if core.ndim == 2 else core.unsqueeze(1) * a), a.new_ones(len(a)), b

    @torch.no_grad()
    def drawn_A(self, name: str, noise: Noise) -> Tensor:
        groups = len(noise.draws)
        return self._through(name, self._draw(name, groups, self._members(name, groups, noise), noise)[0])[0]


class Linear(MeLoraLayer):
    """The name PEFT's `all-linear` recognises an adapted layer by."""
