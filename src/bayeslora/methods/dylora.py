r"""DyLoRA: all ranks up to r trained together, any of them cut out afterwards without retraining (arXiv:2210.07558).

$$ y = W_0 x + b + \frac{\alpha}{k}\, B_{:, \le k}\, A_{\le k, :}\, x $$

In every training step k is drawn uniformly from `min_rank` to r, for all layers at once, so that the first k rows of A
and columns of B learn to be an adapter of rank k by themselves, whatever k is. Evaluation takes all r, or the rank
that `at_rank` or `set_rank` says. With `frozen`, the paper's variant, a step trains row and column k alone and takes
those before it as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError
from bayeslora.methods.config import AdapterConfig
from bayeslora.methods.layer import BayesLayer, add_update
from bayeslora.methods.tuner import BayesTuner, TrainingSetup, step_generator, tuner_of


@dataclass
class DyLoraConfig(AdapterConfig):
    """Configuration of DyLoRA, on top of the fields shared with `peft.LoraConfig`; `r` is the largest rank."""

    method = "dylora"

    min_rank: int = field(default=1, metadata={"help": "Smallest rank that a training step draws."})
    frozen: bool = field(
        default=False, metadata={"help": "A step of rank k trains row and column k alone (the paper's variant)."}
    )
    eval_rank: int | None = field(default=None, metadata={"help": "Rank that evaluation takes, at most r; None is r."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("min_rank", 1 <= self.min_rank <= self.r, f"from 1 to r = {self.r}", "give such a rank")
        known = self.eval_rank is None or 1 <= self.eval_rank <= self.r
        self._check("eval_rank", known, f"from 1 to r = {self.r}", "give such a rank")


class DyLoraLayer(BayesLayer):
    """One linear layer under DyLoRA: `dylora_A` (r, d_in) and `dylora_B` (d_out, r).

    `scaling` is that of the rank that evaluation uses. The same in plain torch: `tests/oracles/dylora.py`.
    """

    adapter_layer_names = ("dylora_A", "dylora_B")
    other_param_names = (*BayesLayer.other_param_names, "configs", "full_scaling", "rank", "sampled")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.dylora_A, self.dylora_B = nn.ParameterDict(), nn.ParameterDict()
        self.configs: dict[str, DyLoraConfig] = {}
        self.full_scaling: dict[str, float] = {}
        self.rank: dict[str, int] = {}
        self.sampled: dict[str, int] = {}

    def add_adapter(self, adapter_name: str, config: DyLoraConfig, rank: int) -> None:
        self.configs[adapter_name], self.initial_rank[adapter_name] = config, rank
        self.full_scaling[adapter_name] = self.scaling[adapter_name]
        self.set_rank(adapter_name, config.eval_rank or config.r)
        self.dylora_A[adapter_name], self.dylora_B[adapter_name] = self.initial_factors(config, rank)

    def scaling_at(self, name: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) with `use_rslora`."""
        config = self.configs[name]
        return self.full_scaling[name] * (config.r / rank) ** (0.5 if config.use_rslora else 1.0)

    def set_rank(self, name: str, rank: int) -> None:
        """The rank that evaluation, merging, description and export take."""
        self.rank[name], self.scaling[name] = rank, self.scaling_at(name, rank)

    def rank_of_pass(self, name: str) -> int:
        """Evaluation's rank, or in training the drawn one; without a training loop every layer draws its own."""
        if not self.training:
            return self.rank[name]
        return self.sampled[name] if name in self.sampled else draw_rank(self.configs[name])

    def adapted(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in adapter_names:
            rank = self.rank_of_pass(name)
            a, b = self.dylora_A[name][:rank], self.dylora_B[name][:, :rank]
            if self.training and self.configs[name].frozen:
                a = torch.cat([a[:-1].detach(), a[-1:]])
                b = torch.cat([b[:, :-1].detach(), b[:, -1:]], dim=1)
            hidden = F.linear(self.adapter_input(name, x, a.dtype), a)
            result = add_update(result, hidden, b, self.scaling_at(name, rank))
        return result

    def factors(self, adapter_name: str) -> tuple[Tensor, Tensor, Tensor]:
        rank = self.rank[adapter_name]
        a = self.dylora_A[adapter_name][:rank].float()
        return a, a.new_ones(len(a)), self.dylora_B[adapter_name][:, :rank].float()

    @torch.no_grad()
    def shrink(self, adapter_name: str) -> int:
        """Cut the ranks beyond evaluation's out of both matrices, and return the rank that is left."""
        rank = self.rank[adapter_name]
        self.cut(self.dylora_A, adapter_name, slice(rank))
        self.cut(self.dylora_B, adapter_name, (slice(None), slice(rank)))
        self.sampled.pop(adapter_name, None)
        self.initial_rank[adapter_name] = len(self.dylora_A[adapter_name])
        return self.initial_rank[adapter_name]


class Linear(DyLoraLayer):
    """The name PEFT's `all-linear` recognises an adapted layer by."""


def draw_rank(config: DyLoraConfig, generator: torch.Generator | None = None) -> int:
    """A rank in `min_rank` … r; torch's default generator is what gradient checkpointing restores."""
    return int(torch.randint(config.min_rank, config.r + 1, (), generator=generator))


class DyLoraModel(BayesTuner):
    """DyLoRA over a whole model: one rank a step, and the rank that evaluation uses."""

    title = "DyLoRA"
    without_a_run = "every layer draws a rank of its own"
    prefix = "dylora_"
    tuner_layer_cls = DyLoraLayer
    linear_class = Linear

    def config_of(self, name: str) -> DyLoraConfig:
        return cast(DyLoraConfig, self.peft_config[name])

    def begin(self, setup: TrainingSetup) -> None:
        """Train from the full rank again; raises `BayesLoraError` where there is only one rank to draw."""
        config = self.config_of(self.training_adapter())
        if config.min_rank == config.r:
            raise BayesLoraError(
                f"min_rank {config.min_rank} leaves one rank to train, r = {config.r}: lower it, or use plain LoRA"
            )
        super().begin(setup)

    def step_begin(self, step: int, seed: int) -> None:
        """Draw the rank of optimizer step `step`, the same on every rank and for every micro-batch."""
        name = self.training_adapter()
        rank = draw_rank(self.config_of(name), step_generator(seed, step))
        for layer in self.adapted_layers(name):
            layer.sampled[name] = rank

    def rank_in_use(self, adapter_name: str | None = None) -> int:
        """The rank that evaluation takes."""
        name = adapter_name or self.training_adapter()
        layers = self.adapted_layers(name)
        return int(layers[0].rank[name]) if layers else self.config_of(name).r

    def set_rank(self, rank: int, adapter_name: str | None = None) -> None:
        """Evaluate, merge, describe, shrink and export at `rank`, 1 to r, from now on, also when saved and reloaded.

        Raises:
            BayesLoraError: for any other rank, or while the adapter is merged.
        """
        name = adapter_name or self.training_adapter()
        config = self.config_of(name)
        if not 1 <= rank <= config.r:
            raise BayesLoraError(
                f"rank {rank} is not among the ranks 1 to {config.r} that were trained: give one of them"
            )
        layers = self.adapted_layers(name)
        if any(name in layer.merged_adapters for layer in layers):
            raise BayesLoraError(
                f"the adapter is merged into the base weights at rank {self.rank_in_use(name)}: call unmerge_adapter "
                "before another rank is chosen"
            )
        for layer in layers:
            layer.set_rank(name, rank)
        config.eval_rank = None if rank == config.r else rank

    def shrink(self, adapter_name: str | None = None) -> dict[str, int]:
        """Cut everything beyond evaluation's rank k out; what is left is DyLoRA of largest rank k."""
        name = adapter_name or self.training_adapter()
        rank, config = self.rank_in_use(name), self.config_of(name)
        layers = self.adapted_layers(name)
        ranks = super().shrink(name)
        for layer in layers:
            layer.full_scaling[name] = layer.scaling[name]
        config.r, config.min_rank, config.eval_rank = rank, min(config.min_rank, rank), None
        config.rank_pattern = {path: left for path, left in ranks.items() if left != rank}
        return ranks

    def statistics(self) -> dict[str, float]:
        """Return the rank of the latest step, to log with the loss."""
        name = self.training_adapter()
        drawn = [layer.sampled[name] for layer in self.adapted_layers(name) if name in layer.sampled]
        return {"sampled_rank": float(drawn[0])} if drawn else {}


@contextmanager
def at_rank(model: nn.Module, rank: int, adapter_name: str | None = None) -> Iterator[None]:
    """Use a DyLoRA model at `rank` inside the context: to evaluate, merge, describe and export it.

    Raises:
        BayesLoraError: the model has no DyLoRA adapter, the adapter is merged, or the rank was not trained.
    """
    tuner = _dylora(model)
    before = tuner.rank_in_use(adapter_name)
    tuner.set_rank(rank, adapter_name)
    try:
        yield
    finally:
        if tuner.rank_in_use(adapter_name) == rank:  # unless what was inside has chosen for itself
            tuner.set_rank(min(before, tuner.config_of(adapter_name or tuner.active_adapters[0]).r), adapter_name)


def rank_curve(
    model: nn.Module, score: Callable[[nn.Module], float], ranks: Iterable[int] | None = None
) -> dict[int, float]:
    """Return the score of a DyLoRA model at each rank, by rank.

    Args:
        model: a model trained with DyLoRA; it is in evaluation mode while `score` runs.
        score: function from the model to its score, called once for each rank.
        ranks: ranks to score; by default all trained ranks, `min_rank` to r.

    Raises:
        BayesLoraError: the model has no DyLoRA adapter, or a rank was not trained.
    """
    tuner = _dylora(model)
    config = tuner.config_of(tuner.active_adapters[0])
    chosen = range(config.min_rank, config.r + 1) if ranks is None else list(ranks)
    was_training = model.training
    model.eval()
    try:
        curve = {}
        for rank in chosen:
            with at_rank(model, rank), torch.no_grad():
                curve[rank] = float(score(model))
        return curve
    finally:
        model.train(was_training)


def _dylora(model: nn.Module) -> DyLoraModel:
    tuner = tuner_of(model)
    if not isinstance(tuner, DyLoraModel):
        raise BayesLoraError(
            f"{type(model).__name__} was not trained with DyLoRA, so it has one rank only: use bayeslora.DyLoraConfig"
        )
    return tuner
