"""The methods by name. A new one is a line here and a file beside this one."""

from __future__ import annotations

from typing import cast

from peft import PeftConfig

from bayeslora._peft import BaseTuner, register
from bayeslora.methods.adalora import AdaLoraConfig, AdaLoraModel
from bayeslora.methods.blob import BlobConfig, BlobModel
from bayeslora.methods.blora import BLoraConfig, BLoraModel
from bayeslora.methods.dylora import DyLoraConfig, DyLoraModel
from bayeslora.methods.layer import BayesLayer
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


def layer_class(method: str) -> type[BayesLayer]:
    """Return the class of the layers that a method adapts."""
    return cast(type[BayesLayer], _MODELS[method].tuner_layer_cls)


for _name, _config in METHODS.items():
    register(_name, _config, _MODELS[_name])
