"""An adapted layer in numbers: the one source for cost, report, model card and export."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bayeslora.vocabulary import KINDS


@dataclass(frozen=True)
class GateDescription:
    r"""One gate of a layer, as the last decision by evidence left it.

    A gate is worth its price if $\Delta > \lambda w$, and it is open with probability
    $\sigma(N (\Delta - \lambda w))$, for N training examples (`methods.allocation`).

    Attributes:
        kind: kind of tensor whose width the gate decides, one of `vocabulary.ALL_KINDS`; or ``"rank"``.
        gate: bits that the gate opens (4, 8, 16 or 32), or the index of the component, counted before any cut.
        is_open: True if evaluation uses those bits or that component.
        delta: Δ, the rise of the mean loss in nats when the gate closes: from b to b/2 bits, or without the component.
        saving: w, what closing the gate saves. For a width: a share of the baseline's cost. For a rank: the decrease
            of the mean rank, or a share of the baseline's cost if bit operations or bytes decide.
        price: λ, in nats of mean loss per unit of `saving`.
        probability: probability that the gate is open, between 0 and 1; None if N is unknown.
    """

    kind: str
    gate: int
    is_open: bool
    delta: float
    saving: float
    price: float
    probability: float | None = None


@dataclass(frozen=True)
class PosteriorWidth:
    r"""Width of a layer's posterior relative to its prior: statistics of $\Omega / \sigma_p$ over its entries.

    A ratio of 1 is the width of the prior: the data say nothing about the entry. A ratio of 0 is certainty.

    Attributes:
        mean: mean over all entries.
        low, median, high: 5th, 50th and 95th percentile.
    """

    mean: float
    low: float
    median: float
    high: float


@dataclass(frozen=True)
class LayerDescription:
    """One adapted layer as evaluation sees it.

    Attributes:
        name: path of the layer in the base model, such as ``bert.encoder.layer.0.attention.self.query``.
        in_features, out_features: d_in and d_out.
        rank: effective rank; columns that are gated off or quantized to zero do not count.
        initial_rank: the configured rank.
        parameters: number of the adapter's trained scalars in this layer.
        bits: width of each tensor, by the names in `KINDS`; 32 means not quantized.
        gates: gates decided by evidence, including those of cut components; empty for other methods, for the paper's
            gates, and before the last decision. Not printed: a layer has dozens.
        posterior_to_prior: ratio of posterior to prior standard deviation; None for methods without a posterior.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    initial_rank: int
    parameters: int
    bits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 32))
    gates: list[GateDescription] = field(default_factory=list, repr=False)
    posterior_to_prior: PosteriorWidth | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the layer's entry of `layers` in `metrics.json`, without `gates` if there are none.

        `posterior_to_prior` is not part of it: `metrics.json` has it under `posterior`.
        """
        found = asdict(self)
        del found["posterior_to_prior"]
        if not self.gates:
            del found["gates"]
        return found
