"""The configuration of Bayesian AdaLoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bayeslora.methods.adalora.importance import IMPORTANCES, Importance
from bayeslora.methods.config import AdapterConfig


@dataclass
class AdaLoraConfig(AdapterConfig):
    """Configuration of Bayesian AdaLoRA, with the field names of `peft.AdaLoraConfig`, except `total_step`."""

    method = "bayes_adalora"

    r: int = field(init=False, default=12, repr=False)
    """The same as `init_r`, under the name that all methods share."""

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
        self._check("init_r", self.init_r >= 1, "at least 1", "give the initial rank, such as 12")
        super().__post_init__()
        self._check_choice("importance", IMPORTANCES)
        below = f"at least 0 and below init_r = {self.init_r}"
        self._check("target_r", 0 <= self.target_r < self.init_r, below, "use plain LoRA for a fixed rank")
        self._check("deltaT", self.deltaT >= 1, "at least 1", "give a number of steps")
        for name in ("tinit", "tfinal"):
            steps = getattr(self, name)
            self._check(name, steps is None or steps >= 0, "at least 0", "give a number of steps")
        for name in ("beta1", "beta2"):
            self._check(name, 0 < getattr(self, name) < 1, "between 0 and 1", "give such as 0.85")
        self._check("orth_reg_weight", self.orth_reg_weight >= 0, "at least 0", "give 0 for no such penalty")

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        values.pop("r", None)
        return values
