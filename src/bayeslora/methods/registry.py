"""The methods by name. A new one is a line here and a file beside this one."""

from __future__ import annotations

from peft import PeftConfig

from bayeslora._peft import BaseTuner, register
from bayeslora.methods.adalora import AdaLoraConfig, AdaLoraModel
from bayeslora.methods.blob import BlobConfig, BlobModel
from bayeslora.methods.blora import BLoraConfig, BLoraModel
from bayeslora.methods.dylora import DyLoraConfig, DyLoraModel
from bayeslora.methods.melora import MeLoraConfig, MeLoraModel

METHODS: dict[str, type[PeftConfig]] = {
    "blora": BLoraConfig,
    "melora": MeLoraConfig,
    "blob": BlobConfig,
    "bayes_adalora": AdaLoraConfig,
    "dylora": DyLoraConfig,
}
_MODELS: dict[str, type[BaseTuner]] = {
    "blora": BLoraModel,
    "melora": MeLoraModel,
    "blob": BlobModel,
    "bayes_adalora": AdaLoraModel,
    "dylora": DyLoraModel,
}

_OTHER_TITLES = {"lora": "LoRA", "adalora": "AdaLoRA", "full": "full fine-tuning"}
"""Titles of what `bayeslora train` knows without a class of this library."""


def title_of(method: str) -> str:
    """Return a method's name in prose; an unknown one is returned as it is."""
    return getattr(_MODELS.get(method), "title", _OTHER_TITLES.get(method, method))


for _name, _config in METHODS.items():
    register(_name, _config, _MODELS[_name])
