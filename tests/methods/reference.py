"""Small models with a B-LoRA adapter in a known state, and the one-page reference evaluated on that state."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from bayeslora import BayesLoop, BLoraConfig
from bayeslora.methods.blora.gated_quantizers import Phase
from tests.oracles import blora as oracle

D_IN, D_OUT, RANK = 12, 10, 4
WARM_UP, LEARN, FROZEN = Phase.WARM_UP, Phase.LEARN, Phase.FROZEN


class Tiny(nn.Module):
    """Two adapted layers, `first` and `second`, a nonlinearity between them and a head that is left alone."""

    def __init__(self, kind: str = "linear", bias: bool = True) -> None:
        super().__init__()
        self.first = make_layer(kind, D_IN, D_OUT, bias)
        self.second = make_layer(kind, D_OUT, D_OUT, bias)
        self.head = nn.Linear(D_OUT, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def make_layer(kind: str, d_in: int, d_out: int, bias: bool = True) -> nn.Module:
    if kind == "linear":
        return nn.Linear(d_in, d_out, bias=bias)
    layer = Conv1D(d_out, d_in)
    with torch.no_grad():
        layer.weight.normal_(0, 0.3)
        layer.bias.normal_(0, 0.3)
    return layer


def seeded(build: Any, seed: int = 0) -> Any:
    """`build()` with the same random numbers whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def tiny_model(
    phase: Phase = LEARN, kind: str = "linear", bias: bool = True, seed: int = 0, **options: Any
) -> nn.Module:
    """`Tiny` with an adapter whose factors, gates, ranges and noise are random, in `phase` and in training mode."""
    options.setdefault("target_modules", ["first", "second"])
    settings = {"r": RANK, "lora_alpha": 6, "init_weights": False, **options}
    model = get_peft_model(seeded(lambda: Tiny(kind, bias), seed), BLoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in layers_of(model):
        randomize(layer, generator, phase)
    return model.train()


def used_by_weights(name: str, value: Tensor) -> Tensor:
    """Of a layer's ranges those of A, E and B, of anything else all: activations at 32 bits do not read theirs."""
    return value[:3] if name.endswith(".log_ranges") else value


def train_steps(model: nn.Module, optimizer: Optimizer, loop: BayesLoop, x: Tensor, steps: int) -> None:
    """Take steps that make the squared outputs for `x` small."""
    for _ in range(steps):
        loop.step_begin()
        model(x).square().mean().backward()
        loop.before_optimizer_step()
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()


def layers_of(model: nn.Module) -> list[Any]:
    return model.base_model.adapted_layers()


@torch.no_grad()
def randomize(layer: Any, generator: torch.Generator, phase: Phase, name: str = "default") -> None:
    """Every tensor of the adapter at random: gates on both sides of the threshold, ranges that clip some entries."""

    def rand(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator)

    for container in (layer.blora_A, layer.blora_B):
        container[name].copy_(rand(container[name]) - 0.5)
    layer.blora_E[name].copy_(rand(layer.blora_E[name]) + 0.5)
    if name in layer.blora_rank:
        lowest = 0.5 if layer.configs[name].gates == "paper" else -0.5
        layer.blora_rank[name].logits.copy_(rand(layer.blora_rank[name].logits) * 2 + lowest)
    if name in layer.blora_quantizers:
        quantizers = layer.blora_quantizers[name]
        quantizers.gate_logits.copy_(rand(quantizers.gate_logits) * 5 - 2)
        for kind, channels in zip(quantizers.kinds, quantizers.channels, strict=True):
            low = {"weight": 0.12, "A": 0.3, "B": 0.3, "E": 1.0}.get(kind, 0.8)
            quantizers.set_range(kind, low * (1 + 0.5 * torch.rand(channels, generator=generator)))
        quantizers.draw(rand(quantizers.gate_logits))
    layer.blora_progress[name].advance(phase)


def set_widths(layer: Any, name: str = "default", **widths: int) -> None:
    """Move the gates so that evaluation has these widths; kinds that are not named keep theirs."""
    quantizers = layer.blora_quantizers[name]
    with torch.no_grad():
        for kind, width in widths.items():
            row = quantizers.gate_logits[quantizers.kinds.index(kind)]
            row.copy_(torch.tensor([3.0 if bits <= width else -3.0 for bits in oracle.WIDTHS[1:]]))


def all_widths(layer: Any, width: int, name: str = "default") -> None:
    set_widths(layer, name, **dict.fromkeys(layer.blora_quantizers[name].kinds, width))


def oracle_forward(layer: Any, x: Tensor, name: str = "default") -> Tensor:
    """What Algorithm 1 gives for the state of `layer`, in the mode and phase it is in."""
    base = layer.get_base_layer()
    transposed = isinstance(base, Conv1D)
    return oracle.forward(
        x,
        base.weight.T if transposed else base.weight,
        base.bias,
        layer.blora_A[name],
        layer.blora_E[name],
        layer.blora_B[name],
        layer.scaling[name],
        oracle_rank_gates(layer, name),
        oracle_quantizers(layer, name),
    )


def oracle_rank_gates(layer: Any, name: str = "default") -> Tensor | None:
    """Rank gates (r,): nested, as the paper has them, or each by the sign of its logit; None where there are none."""
    if name not in layer.blora_rank:
        return None
    logits = layer.blora_rank[name].logits
    return oracle.rank_gates(logits) if layer.configs[name].gates == "paper" else (logits > 0).float()


def oracle_quantizers(layer: Any, name: str = "default") -> dict[str, oracle.Quantizer]:
    """The reference's quantizers; a width of 32 is left out, for nothing is rounded or clipped there."""
    phase = int(layer.blora_progress[name].phase)
    if name not in layer.blora_quantizers or phase == int(WARM_UP):
        return {}
    quantizers = layer.blora_quantizers[name]
    if layer.training and phase == int(LEARN) and layer.configs[name].gates == "paper":
        gates = oracle.hard_concrete(quantizers.gate_logits, quantizers.noise)
    else:
        gates = (1 - oracle.open_probability(quantizers.gate_logits) < 0.34).float()
    found = {}
    start = quantizers.channels[0] if quantizers.kinds[0] == "weight" else 0
    offset = -start
    for index, kind in enumerate(quantizers.kinds):
        channels, shape = quantizers.channels[index], quantizers.shapes[index]
        logarithm = (
            quantizers.log_weight_range if kind == "weight" else quantizers.log_ranges[offset : offset + channels]
        )
        bound = logarithm.exp().reshape(shape)
        if not bool((gates[index] == 1).all()):
            found[kind] = oracle.Quantizer(bound, gates[index])
        offset += channels
    return found
