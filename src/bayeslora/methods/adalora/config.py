"""The configuration of Bayesian AdaLoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bayeslora.errors import BayesLoraError
from bayeslora.methods.adalora.importance import IMPORTANCES, Importance
from bayeslora.methods.config import AdapterConfig


@dataclass
class AdaLoraConfig(AdapterConfig):
    """Configuration of Bayesian AdaLoRA; names are those of `peft.AdaLoraConfig`, without its `total_step`."""

    method = "bayes_adalora"

    r: int = field(init=False, default=12, repr=False)
    """The same as `init_r`, under the name that all methods have."""

    init_r: int = field(default=12, metadata={"help": "Ranks of every layer at the start."})
    target_r: int = field(default=8, metadata={"help": "Ranks left at the end, on average over the layers."})
    tinit: int | None = field(
        default=None, metadata={"help": "Steps before the budget falls; by default a tenth of the run."}
    )
    tfinal: int | None = field(
        default=None, metadata={"help": "Steps at the end with the final ranks; by default four tenths of the run."}
    )
    deltaT: int = field(default=10, metadata={"help": "Steps from one allocation to the next."})  # noqa: N815
    importance: Importance = field(
        default="snr_abs",
        metadata={"help": "Score: sensitivity, snr, snr_abs, magnitude, inverse_std or mean_abs."},
    )
    beta1: float = field(default=0.85, metadata={"help": "Decay of the averaged sensitivity."})
    beta2: float = field(default=0.85, metadata={"help": "Decay of the averaged deviation from it."})
    orth_reg_weight: float = field(default=0.5, metadata={"help": "gamma, the weight of the orthogonality penalty."})

    def __post_init__(self) -> None:
        self.r = self.init_r
        if self.init_r < 1:
            raise BayesLoraError(f"init_r must be at least 1, not {self.init_r}: give the initial rank")
        super().__post_init__()
        self._require("importance", IMPORTANCES)
        if not 0 <= self.target_r < self.init_r:
            raise BayesLoraError(
                f"target_r {self.target_r} must lie in [0, {self.init_r}), below init_r: a fixed rank is plain LoRA's"
            )
        if self.deltaT < 1:
            raise BayesLoraError(f"deltaT must be at least 1 step, not {self.deltaT}")
        for name in ("tinit", "tfinal"):
            steps = getattr(self, name)
            if steps is not None and steps < 0:
                raise BayesLoraError(f"{name} must not be negative, not {steps}")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise BayesLoraError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if self.orth_reg_weight < 0:
            raise BayesLoraError(f"orth_reg_weight must not be negative, not {self.orth_reg_weight}")

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        values.pop("r", None)
        return values
