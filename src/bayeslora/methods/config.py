"""Fields that every method's configuration shares with `peft.LoraConfig`, under the same names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig

from bayeslora._peft import peft_type
from bayeslora.errors import BayesLoraError

KEPT_FIELDS = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "bias",
    "modules_to_save",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
"""Fields that stay the same when an adapter becomes one of another method."""

_LARGEST_ALPHA = 1e30
"""Far above any use, and within float32."""


@dataclass
class AdapterConfig(PeftConfig):
    """Configuration fields shared with `peft.LoraConfig`; raises `BayesLoraError` for invalid values."""

    method: ClassVar[str]

    r: int = field(default=8, metadata={"help": "Rank; the initial one where the method learns it."})
    lora_alpha: int = field(default=16, metadata={"help": "Scales the update: lora_alpha / r; peft has 8."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Names or regex of the layers."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names or regex to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of the layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layers' list."})
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none' or 'all'."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r) instead."})
    init_weights: bool = field(default=True, metadata={"help": "False starts from a random, non-zero update."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Rank by layer name; may be 0. The scaling stays lora_alpha / r."}
    )
    alpha_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "lora_alpha by layer name."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.method)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise BayesLoraError(
                "layers_pattern is given alone, but belongs to layers_to_transform: give both, or drop the pattern"
            )
        self._check("r", self.r >= 1, "at least 1", "give the initial rank, such as r=8")
        for alpha in (self.lora_alpha, *(self.alpha_pattern or {}).values()):
            if isinstance(alpha, (int, float)) and not abs(alpha) <= _LARGEST_ALPHA:
                raise BayesLoraError(
                    f"lora_alpha is {alpha:g}, but must be at most {_LARGEST_ALPHA:g}: give a usual one, such as 16"
                )
        for name, rank in (self.rank_pattern or {}).items():
            if not isinstance(rank, int) or rank < 0:
                raise BayesLoraError(
                    f"rank_pattern has {rank!r} for {name!r}, but must have whole numbers from 0: give a rank"
                )
        self._check("lora_dropout", 0 <= self.lora_dropout < 1, "at least 0 and below 1", "give 0 for none")
        self._check_choice("bias", ("none", "all"))

    def _check(self, name: str, holds: bool, accepted: str, way_out: str) -> None:
        if not holds:
            raise BayesLoraError(f"{name} is {getattr(self, name)!r}, but must be {accepted}: {way_out}")

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        listed = ", ".join(repr(each) for each in allowed[:-1])
        self._check(name, getattr(self, name) in allowed, f"{listed} or {allowed[-1]!r}", "choose one of them")
