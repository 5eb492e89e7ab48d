"""Every method a command can be asked for: the package's own, and the baselines they are measured against."""

from __future__ import annotations

from peft import LoraConfig, PeftConfig

from bayeslora.errors import BayesLoraError, close_matches
from bayeslora.methods.registry import METHODS

# None: every weight of the model is trained and an ordinary Transformers folder is written.
BASELINES: dict[str, type[PeftConfig] | None] = {"lora": LoraConfig, "full": None}


def method_names() -> list[str]:
    """All names `--method` takes."""
    return [*METHODS, *BASELINES]


def method_config_class(name: str) -> type[PeftConfig] | None:
    """The PEFT config class of a method; None for full fine-tuning."""
    if name in METHODS:
        return METHODS[name]
    if name in BASELINES:
        return BASELINES[name]
    raise BayesLoraError(
        f"unknown --method {name!r}{close_matches(name, method_names())}; choose from {', '.join(method_names())}."
    )
