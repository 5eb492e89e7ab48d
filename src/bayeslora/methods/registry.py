"""The methods by name. A new one is a line here and a file beside this one."""

from __future__ import annotations

from peft import PeftConfig

from bayeslora._peft import BaseTuner, register
from bayeslora.methods.blora import BLoraConfig, BLoraModel

METHODS: dict[str, type[PeftConfig]] = {"blora": BLoraConfig}
_MODELS: dict[str, type[BaseTuner]] = {"blora": BLoraModel}

for _name, _config in METHODS.items():
    register(_name, _config, _MODELS[_name])
