"""An adapted layer in numbers: the one source for cost, report, model card and export."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bayeslora.vocabulary import KINDS


@dataclass(frozen=True)
class GateDescription:
    r"""One gate of a layer, as the last decision by evidence left it.

    A gate is worth its price where $\Delta > \lambda w$, and its probability is $\sigma(N (\Delta - \lambda w))$ over
    the N examples of training (`methods.allocation`).

    Attributes:
        kind: the tensor whose width the gate is, one of `vocabulary.ALL_KINDS`, or ``"rank"``.
        gate: the bits that it opens (4, 8, 16 or 32), or the index of the component, counted before any cut.
        is_open: True if evaluation uses those bits or that component.
        delta: Δ, the rise of the mean loss in nats when the gate closes: from b to b/2 bits, or without the component.
        saving: w, what closing it saves: a share of the baseline's cost, or of the mean rank for most ranks. A rank
            that bit operations or bytes decide counts in these instead.
        price: λ, in nats of mean loss per unit of the saving.
        probability: of being open, between 0 and 1; None if N is unknown.
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
    r"""Width of a layer's posterior beside that of its prior: $\Omega / \sigma_p$ over the layer's entries.

    1 is the prior's width: the data have said nothing. 0 is certainty.

    Attributes:
        mean: over all entries.
        low, median, high: the 5th, 50th and 95th percentile.
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
        parameters: number of trained scalars the adapter has here.
        bits: width of each tensor, by the names in `KINDS`; 32 means not quantized.
        gates: the gates that evidence has decided, those of cut components included; empty for other methods, for the
            gates of the paper, and before the last decision.
        posterior_to_prior: posterior by prior standard deviation; None for methods without a posterior.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    initial_rank: int
    parameters: int
    bits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 32))
    gates: list[GateDescription] = field(default_factory=list)
    posterior_to_prior: PosteriorWidth | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry of `layers` in `metrics.json`; `gates` is left out if there are none.

        `posterior_to_prior` has an entry of its own, `posterior`.
        """
        found = asdict(self)
        del found["posterior_to_prior"]
        if not self.gates:
            del found["gates"]
        return found
