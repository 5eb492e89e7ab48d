"""Options of Me-LoRA, and the defaults that depend on others."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from bayeslora.errors import BayesLoraError
from bayeslora.methods.variational import VariationalConfig

PRIOR_STD = 0.35
"""Default prior of a core whose deviations are learned."""

CORE_SPREAD = 1.0
"""Default distance at which several cores start."""

PRIOR_NOISE = 0.5
r"""Default noise over signal, $\sigma_p \sqrt{r}$, of the prior of a core whose deviations are set."""

INITIAL_STD = 0.35
"""Default start of deviations that are learned."""

NOISE_FADE_IN = (0.4, 0.66)
"""Default shares of the steps between which the noise rises where deviations are set: a run at full noise from the
start may never leave the loss of a constant prediction."""


@dataclass
class MeLoraConfig(VariationalConfig):
    """Configuration of Me-LoRA, on top of the fields shared with `peft.LoraConfig`."""

    method = "melora"
    prior_is_derived = True

    core: Literal["full", "diagonal"] = field(
        default="full", metadata={"help": "An r x r core (full), or a vector (diagonal, as in ScalaBL)."}
    )
    cores: int = field(default=1, metadata={"help": "Members of an ensemble: cores on the same A and B."})
    core_spread: float = field(
        default=CORE_SPREAD, metadata={"help": "Distance at which several cores start; 1: rotated by about a radian."}
    )
    variance: Literal["closed_form", "learned", "none"] | None = field(
        default=None,
        metadata={
            "help": "Deviations of the core: set from gradients of single rows (closed_form, the default), learned "
            "by gradient, or none (cores)."
        },
    )
    prior_std: float | Literal["evidence"] | None = field(  # type: ignore[assignment]  # wider than the base's
        default=None,
        metadata={
            "help": "Deviation of the prior of the core's entries (0.5 / sqrt(r); 0.35 where learned), or evidence."
        },
    )
    noise_fade_in: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the steps between which noise rises from none to all (0.4,0.66 with closed_form; 0,0: "
            "all from the start)."
        },
    )
    initial_std: float | None = field(
        default=None,
        metadata={"help": "Starting standard deviation of the core's entries where it is learned (0.35)."},
    )

    def __post_init__(self) -> None:
        # A file from before a field had its default of today names a version of PEFT.
        is_new = self.peft_version is None
        if self.variance is None:
            self.variance = "closed_form" if is_new and self._can_be_set else "learned"
        if is_new and self.noise_fade_in is None and self.variance == "closed_form":
            self.noise_fade_in = list(NOISE_FADE_IN)
        super().__post_init__()
        self._check_choice("core", ("full", "diagonal"))
        self._check_choice("variance", ("closed_form", "learned", "none"))
        self._check_initial_std(is_new)
        if self.variance == "closed_form":
            if self.noise_scope != "example":
                raise BayesLoraError(
                    f"noise_scope is {self.noise_scope!r}, but variance='closed_form' needs a core for each row: use "
                    "'example', or variance='learned'"
                )
            self._check("kl_weight", self.kl_weight > 0, "above 0 with variance='closed_form'", "give 1 for the bound")
        self._check_cores()
        self._check_fade_in()

    @property
    def _can_be_set(self) -> bool:
        """Return whether all that is asked for has a closed form: no other scope, weight or start to learn from."""
        return self.noise_scope == "example" and self.kl_weight > 0 and self.initial_std is None

    def _check_initial_std(self, is_new: bool) -> None:
        if self.variance == "learned":
            self.initial_std = INITIAL_STD if self.initial_std is None else self.initial_std
            self._check("initial_std", self.initial_std > 0, "above 0", "use plain LoRA for no noise")
        elif is_new and self.initial_std is not None:
            raise BayesLoraError(
                f"initial_std is given, but variance is {self.variance!r}, which starts at the prior or has no noise: "
                "leave it out, or use variance='learned'"
            )

    def _check_cores(self) -> None:
        whole = isinstance(self.cores, int) and not isinstance(self.cores, bool)
        self._check("cores", whole and self.cores >= 1, "a whole number of at least 1", "give 1 for a single core")
        self._check("core_spread", self.core_spread > 0, "above 0", "members that start at one point stay there")
        if self.cores == 1 and self.variance == "none":
            raise BayesLoraError(
                "variance is 'none', but with a single core nothing would be random: give cores=4, or use plain LoRA"
            )
        if self.cores > 1 and (self.noise_scope != "example" or self.antithetic):
            given = "antithetic is True" if self.antithetic else f"noise_scope is {self.noise_scope!r}"
            raise BayesLoraError(f"{given}, but several cores are dealt to single rows: leave it out, or use cores=1")

    def _check_prior(self) -> None:
        if not isinstance(self.prior_std, str):
            super()._check_prior()
            return
        self._check("prior_std", self.prior_std == "evidence", "a number above 0 or 'evidence'", "choose one of them")
        if self.variance != "closed_form":
            raise BayesLoraError(
                f"prior_std is 'evidence' with variance={self.variance!r}, but needs deviations that are set: use "
                "variance='closed_form', or give a number"
            )

    def _check_fade_in(self) -> None:
        if self.noise_fade_in is None:
            return
        shares = list(self.noise_fade_in)
        rises = len(shares) == 2 and 0 <= shares[0] <= shares[1] <= 1
        self._check("noise_fade_in", rises, "two rising shares of the steps", "give such as (0.4, 0.66)")
        self.noise_fade_in = [float(share) for share in shares]

    def prior_of(self, rank: int) -> float:
        if isinstance(self.prior_std, (int, float)):
            return self.prior_std
        return PRIOR_STD if self.variance == "learned" else PRIOR_NOISE / math.sqrt(max(1, rank))

    def noise_at(self, step: int, total_steps: int) -> float:
        """Return the share of the noise, between 0 and 1, in optimizer step `step` of a run."""
        if self.noise_fade_in is None:
            return 1.0
        first, last = (share * total_steps for share in self.noise_fade_in)
        return float(step >= first) if first == last else min(1.0, max(0.0, (step - first) / (last - first)))
