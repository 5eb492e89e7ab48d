"""Interface to PEFT: the only module that imports or patches its private names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from peft import PeftConfig, peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import AuxiliaryTrainingWrapper, PeftType, register_peft_method, save_and_load
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGET_MODULES
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import (
    get_quantization_kwargs,
    quantization_extra_repr,
    resolve_quantization_backend,
)
from torch import Tensor

from bayeslora._peft_hook import register_methods

__all__ = [
    "DEFAULT_TARGET_MODULES",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "BufferDict",
    "check_adapters_to_merge",
    "get_in_out_features",
    "get_pattern_key",
    "get_quantization_kwargs",
    "is_peft_method",
    "peft_type",
    "quantization_extra_repr",
    "read_adapters_with",
    "register",
    "resolve_quantization_backend",
]

get_in_out_features = _get_in_out_features


def peft_type(name: str) -> PeftType:
    """Return the member `name` (in upper case) of PEFT's `PeftType` enum; add it if it is missing.

    `register_peft_method` refuses names outside the enum, and transformers reads `peft_type.value`, so a plain string
    does not work. Iteration, look-up by value, pickling and copying work with the new member.
    """
    name = name.upper()
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # since Python 3.12 enums do not look members up on attribute access
    return member


def is_peft_method(name: str) -> bool:
    """Return True if PEFT, or a library that registered it there, has a method of this name."""
    return name.upper() in PeftType.__members__ and PeftType[name.upper()] in PEFT_TYPE_TO_CONFIG_MAPPING


def register(name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Register a method, or give new classes to a registered one."""
    member = peft_type(name)
    if member in PEFT_TYPE_TO_CONFIG_MAPPING:
        PEFT_TYPE_TO_CONFIG_MAPPING[member], PEFT_TYPE_TO_TUNER_MAPPING[member] = config_class, model_class
    else:
        register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=model_class.prefix)


class CheckedState(Protocol):
    """A state dict with a check that it fits a model."""

    def check(self, wanted: dict[str, Tensor], others: dict[str, Tensor]) -> None: ...


def read_adapters_with(read: Callable[[str, str], dict[str, Tensor] | None]) -> None:
    """Read adapter files with `read(file, device)`; if it returns None, PEFT reads the file.

    PEFT does not offer a hook for this. It finds or downloads the file, reads it with `safe_load_file` and passes the
    result to `set_peft_model_state_dict`; this replaces both names in PEFT's modules. A `CheckedState` is compared
    with the model first, because PEFT ignores keys that do not fit.
    """
    plain_read, plain_set = save_and_load.safe_load_file, peft_model.set_peft_model_state_dict

    def load_file(filename: Any, device: Any = "cpu") -> dict[str, Tensor]:
        found = read(str(filename), str(device))
        return found if found is not None else plain_read(filename, device=device)

    def set_state(model: Any, state: dict[str, Tensor], adapter_name: str = "default", **kwargs: Any) -> Any:
        if hasattr(state, "check"):
            wanted = save_and_load.get_peft_model_state_dict(
                model, adapter_name=adapter_name, save_embedding_layers=False
            )
            state.check(wanted, model.state_dict())
        return plain_set(model, state, adapter_name=adapter_name, **kwargs)

    modules: tuple[Any, Any] = save_and_load, peft_model
    modules[0].safe_load_file, modules[1].set_peft_model_state_dict = load_file, set_state


register_methods()
