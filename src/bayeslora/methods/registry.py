"""The methods by name: those of this package, and those that others register."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from typing import cast

from peft import PeftConfig

from bayeslora._peft import BaseTuner, is_peft_method, register
from bayeslora.errors import BayesLoraError
from bayeslora.methods.adalora import AdaLoraConfig, AdaLoraModel
from bayeslora.methods.blob import BlobConfig, BlobModel
from bayeslora.methods.blora import BLoraConfig, BLoraModel
from bayeslora.methods.config import AdapterConfig
from bayeslora.methods.dylora import DyLoraConfig, DyLoraModel
from bayeslora.methods.layer import BayesLayer
from bayeslora.methods.melora import MeLoraConfig, MeLoraModel
from bayeslora.methods.tuner import BayesTuner
from bayeslora.vocabulary import METHOD_ENTRY_POINTS

METHODS: dict[str, type[PeftConfig]] = {}
"""Configuration class of each registered method, by its name."""

_MODELS: dict[str, type[BaseTuner]] = {}

_OTHER_TITLES = {"lora": "LoRA", "adalora": "AdaLoRA", "full": "full fine-tuning", "none": "no training"}
"""Titles of what `bayeslora train` knows without a class of this library."""


def register_method(name: str, config_class: type[AdapterConfig], model_class: type[BayesTuner]) -> None:
    """Register a method of your own with PEFT and this library.

    Afterwards `get_peft_model`, saving and loading, `attach`, `predict`, `describe`, merging and exports work with it.
    A class that is defined again under the same name replaces the first. `bayeslora train --method name` finds the
    method if the package that registers it is installed with an entry point `name` in the group `bayeslora.methods`.

    Args:
        name: name of the method: lower-case letters, digits and underscores.
        config_class: configuration class; its `method` is set to `name` unless it has one already.
        model_class: tuner class, with `prefix`, `tuner_layer_cls` and `linear_class`. The names in the layer's
            `adapter_layer_names` must begin with the prefix, because PEFT saves tensors by it.

    Raises:
        BayesLoraError: the name is taken or malformed, or the classes do not fit together.
    """
    _check_name(name, config_class, model_class)
    if not (issubclass(config_class, AdapterConfig) and issubclass(model_class, BayesTuner)):
        raise BayesLoraError(
            f"the classes of method {name!r} are {config_class.__name__} and {model_class.__name__}, but must be "
            "subclasses of AdapterConfig and BayesTuner: derive them from these classes of bayeslora.methods"
        )
    prefix = getattr(model_class, "prefix", None)
    tensors = getattr(getattr(model_class, "tuner_layer_cls", None), "adapter_layer_names", ())
    strange = [each for each in tensors if not prefix or not each.startswith(prefix)]
    if not prefix or not tensors or strange:
        raise BayesLoraError(
            f"the layer of method {name!r} has the tensors {', '.join(strange or tensors) or 'of no name'} under the "
            f"prefix {prefix!r}, but PEFT saves what begins with the prefix: set {model_class.__name__}.prefix, and "
            "begin every name in adapter_layer_names with it"
        )
    config_class.method = name
    register(name, config_class, model_class)
    METHODS[name], _MODELS[name] = config_class, model_class


def _check_name(name: str, config_class: type, model_class: type) -> None:
    if not re.fullmatch(r"[a-z]([a-z0-9_]*[a-z0-9])?", name):
        raise BayesLoraError(
            f"the method's name is {name!r}, but must be lower-case letters, digits and underscores: rename it"
        )
    known = METHODS.get(name)
    if known is not None:
        pairs = (known, config_class), (_MODELS[name], model_class)
        if any((a.__module__, a.__qualname__) != (b.__module__, b.__qualname__) for a, b in pairs):
            raise BayesLoraError(f"{name!r} is a method of {known.__module__} already: choose another name")
    elif name in _OTHER_TITLES or is_peft_method(name):
        raise BayesLoraError(f"{name!r} is a method of PEFT or of the command already: choose another name")
    own = vars(config_class).get("method", name)
    if own != name:
        raise BayesLoraError(
            f"{config_class.__name__} is the configuration of {own!r}, but is to be registered as {name!r}: derive a "
            "configuration class for the new method"
        )


def find_method(name: str) -> type[PeftConfig] | None:
    """Return a method's configuration class, importing the installed package that offers it; None if none does."""
    for entry in () if name in METHODS else entry_points(group=METHOD_ENTRY_POINTS, name=name):
        try:
            entry.load()
        except Exception as error:
            raise BayesLoraError(
                f"method {name!r} is offered by {entry.value}, but that cannot be imported ({error}): mend it, or "
                "uninstall it"
            ) from error
        if name not in METHODS:
            raise BayesLoraError(
                f"method {name!r} is offered by {entry.value}, but that registers no such method: call "
                "bayeslora.register_method in it"
            )
    return METHODS.get(name)


def title_of(method: str) -> str:
    """Return a method's name in prose; an unknown one is returned as it is."""
    return getattr(_MODELS.get(method), "title", _OTHER_TITLES.get(method, method))


def package_of(method: str) -> str | None:
    """Return the package to import before PEFT can load an adapter; None where PEFT alone can."""
    return METHODS[method].__module__.partition(".")[0] if method in METHODS else None


def layer_class(method: str) -> type[BayesLayer]:
    """Return the class of the layers that a method adapts."""
    return cast(type[BayesLayer], _MODELS[method].tuner_layer_cls)


register_method("blora", BLoraConfig, BLoraModel)
register_method("melora", MeLoraConfig, MeLoraModel)
register_method("blob", BlobConfig, BlobModel)
register_method("bayes_adalora", AdaLoraConfig, AdaLoraModel)
register_method("dylora", DyLoraConfig, DyLoraModel)
