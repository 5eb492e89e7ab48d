"""An adapted layer in numbers: the one source for cost, report, model card and export."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from bayeslora.vocabulary import KINDS


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
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    initial_rank: int
    parameters: int
    bits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 32))

    def to_dict(self) -> dict[str, Any]:
        """The entry of `metrics.json`."""
        return asdict(self)
