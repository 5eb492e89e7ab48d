"""The registry: which of our configurations PEFT's tests run on. A new method is one line in `METHODS`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from typing import Any

from peft import PeftConfig

from bayeslora import AdaLoraConfig, BlobConfig, BLoraConfig, DyLoraConfig, MeLoraConfig

SELECTION_VARIABLE = "BAYESLORA_PEFT_METHODS"


@dataclass(frozen=True)
class Method:
    """One row of the result table.

    Args:
        label: name of the row, also the prefix of its test ids.
        config: the configuration class.
        options: what is set in every test of the row. `lora_alpha` is small because upstream trains with SGD at a
            learning rate of 0.5 on inputs of up to 90, and keeps a list of smaller rates for its own classes only.
        same_layer: what to set besides when two adapters on the same layer are active at once; None: not possible.
        mixed_batches: rows of one batch can use different adapters.
    """

    label: str
    config: type[PeftConfig]
    options: Mapping[str, Any] = field(default_factory=dict)
    same_layer: Mapping[str, Any] | None = field(default_factory=dict)
    mixed_batches: bool = True


# Upstream trains with SGD at a learning rate of 0.5 on inputs of up to 90; its own classes have smaller rates by name.
# It attaches nothing to the loop and wants every parameter to move in the first steps. Hence no warm-up (the first
# training batch calibrates), ranges that start wide (clipped outputs pass no gradient on), and gates near the middle.
# In evaluation all gates are open, so merging stays exact.
TRAINABLE_AT_ONCE = {
    "lora_alpha": 8,
    "calibration": "absmax",
    "warmup_fraction": 0.0,
    # Gates by evidence have no gradients to test; they have rows of their own.
    "gates": "paper",
    "initial_bit_logits": [1.0, 1.0, 1.0, 1.0],
    "initial_rank_logit": 2.5,
}
# Two adapters cannot quantize one base weight, so together they run only as long as neither has been calibrated.
NOT_CALIBRATED = {"warmup_fraction": 0.1}

METHODS = [
    Method("blora-q+ra", BLoraConfig, {"mode": "q+ra", **TRAINABLE_AT_ONCE}, same_layer=NOT_CALIBRATED),
    Method("blora-q", BLoraConfig, {"mode": "q", **TRAINABLE_AT_ONCE}, same_layer=NOT_CALIBRATED),
    Method("blora-ra", BLoraConfig, {"mode": "ra", **TRAINABLE_AT_ONCE}),
    Method("blora-ra-evidence", BLoraConfig, {"mode": "ra", "lora_alpha": 8}),
    Method("blora-q+ra-evidence", BLoraConfig, {"mode": "q+ra", "lora_alpha": 8}),
    Method("melora", MeLoraConfig, {"variance": "learned", "lora_alpha": 8}),
    Method("melora-cores", MeLoraConfig, {"cores": 3, "lora_alpha": 4}),
    Method("melora-closed-form", MeLoraConfig, {"lora_alpha": 8}),
    Method("melora-diagonal", MeLoraConfig, {"core": "diagonal", "lora_alpha": 4}),
    Method("blob", BlobConfig, {"lora_alpha": 8}),
    Method("bayes_adalora", AdaLoraConfig, {"lora_alpha": 8, "init_r": 8, "target_r": 4}),
    Method("dylora", DyLoraConfig, {"lora_alpha": 8}),
]

MLP = "MLP"
CUSTOM_MODELS: list[tuple[str, str, dict[str, Any]]] = [
    ("pattern", MLP, {"target_modules": "lin0"}),
    ("first layer", MLP, {"target_modules": ["lin0"]}),
    ("second layer", MLP, {"target_modules": ["lin1"]}),
    ("both layers", MLP, {"target_modules": ["lin0", "lin1"]}),
    ("modules_to_save", MLP, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    (
        "exclude_modules, dropout",
        MLP,
        {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"], "lora_dropout": 0.1},
    ),
    # One output of a few small numbers: at the usual scale the rank gates' gradient is below what upstream can see.
    ("transformers Conv1D", "EmbConv1D", {"target_modules": ["conv1d"], "lora_alpha": 64}),
]

_owners: dict[int, str] = {}
_kept: list[object] = []  # identities are only unique among living objects


def _own(method: Method, value: Any) -> Any:
    _owners[id(value)] = method.label
    _kept.append(value)
    return value


class Options(dict[str, Any]):
    """Keyword arguments whose `__name__` makes pytest write the row's label into the test id."""

    def __init__(self, label: str, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.__name__ = label


def options(method: Method, **extra: Any) -> dict[str, Any]:
    """A fresh set of keyword arguments for one parametrised case of `method`."""
    return _own(method, Options(method.label, _in_its_words(method, extra)))


def instance(method: Method, **extra: Any) -> PeftConfig:
    """A configuration object, for the tests that are parametrised over objects."""
    return _own(method, method.config(**_in_its_words(method, extra)))


def _in_its_words(method: Method, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options and `extra`, with a rank under the name that the method has for it."""
    given = {**method.options, **extra}
    if "init_r" in given and "r" in given:
        given["init_r"] = given.pop("r")
    return given


def _variant(method: Method) -> type[PeftConfig]:
    """A subclass with the options as defaults, for the tests that are parametrised over classes."""
    fields = [(name, Any, field(default_factory=partial(deepcopy, value))) for name, value in method.options.items()]
    name = f"{method.config.__name__}[{method.label}]"
    return _own(method, make_dataclass(name, fields, bases=(method.config,)))


def owner(parameters: Mapping[str, Any]) -> str | None:
    """The row that a parametrised test belongs to; None for upstream's own cases."""
    labels = {_owners[id(value)] for value in parameters.values() if id(value) in _owners}
    return labels.pop() if len(labels) == 1 else None


def selected() -> list[Method]:
    """The rows to run: all, or those named in `BAYESLORA_PEFT_METHODS` (commas between)."""
    names = [name for name in os.environ.get(SELECTION_VARIABLE, "").split(",") if name]
    unknown = set(names) - {method.label for method in METHODS}
    if unknown:
        raise SystemExit(f"unknown method {sorted(unknown)[0]!r}; known: {', '.join(m.label for m in METHODS)}")
    return [method for method in METHODS if not names or method.label in names]


ROWS = selected()
CLASSES = {method.label: _variant(method) for method in ROWS}


def custom_cases() -> list[tuple[str, str, type[PeftConfig], dict[str, Any]]]:
    return [
        (f"{m.label} {name}", model, m.config, options(m, **extra))
        for m in ROWS
        for name, model, extra in CUSTOM_MODELS
    ]


def several_active_cases() -> list[tuple[str, str, type[PeftConfig], dict[str, Any], dict[str, Any]]]:
    """Two adapters active at once: on one layer, where the method allows it, and on different layers."""
    first = {"target_modules": ["lin0"], "init_weights": False}
    second = {"target_modules": ["lin1"], "init_weights": False}
    cases = []
    for m in ROWS:
        if m.same_layer is not None:
            both = {**first, **m.same_layer}
            cases.append((f"{m.label} same layer", m.label, m.config, options(m, **both), options(m, **both)))
        cases.append((f"{m.label} different layers", m.label, m.config, options(m, **first), options(m, **second)))
    return cases


def task_cases(task_type: str) -> list[tuple[type[PeftConfig], dict[str, Any]]]:
    """Default targets on a transformer."""
    return [(m.config, options(m, task_type=task_type, r=8, lora_alpha=32, target_modules=None)) for m in ROWS]


def pairs(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, PeftConfig, PeftConfig]]:
    """Two adapters for the tests of mixed batches."""
    common = {"init_weights": False}
    return [
        (m.label, instance(m, **common, **first), instance(m, **common, **second)) for m in ROWS if m.mixed_batches
    ]
