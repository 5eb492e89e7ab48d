"""From a base model and a method's options to the model that is trained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from bayeslora.errors import BayesLoraError, close_matches
from bayeslora.runs.base import BaseModel

# Query, key and value projections by their names in the model families; the first set a model has is the default.
_ATTENTION_NAMES = (
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("c_attn",),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
)


def adapt(base: BaseModel, config_class: type[PeftConfig] | None, options: dict[str, Any]) -> nn.Module:
    """Return the model to train: `base` with adapters, or `base` itself for full fine-tuning (`config_class` None).

    Target modules default to the query, key and value projections. The head and every other module whose weights the
    checkpoint did not hold are trained and saved with the adapter: random weights left out of it could not come back.
    """
    if config_class is None:
        return base.model
    options = dict(options)
    targets = options.get("target_modules")
    if targets is None:
        targets = default_targets(base.model)
    if targets is not None:
        check_targets(base.model, targets)
        options["target_modules"] = targets
    options["modules_to_save"] = sorted({*(options.get("modules_to_save") or ()), *base.fresh}) or None
    with option_errors(config_class.__name__):
        return get_peft_model(base.model, config_class(task_type=base.task_type, **options))


def check_options(config_class: type[PeftConfig] | None, options: dict[str, Any]) -> None:
    """Refuse, before any model is loaded, options of which the method makes no configuration."""
    if config_class is not None:
        with option_errors(config_class.__name__):
            config_class(**options)


@contextmanager
def option_errors(what: str) -> Iterator[None]:
    """Turn what PEFT or the Trainer raises for options that they cannot use into one sentence that names `what`."""
    try:
        yield
    except BayesLoraError:
        raise
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise BayesLoraError(f"these options make no {what} ({reason}): change them") from error


def default_targets(model: nn.Module) -> list[str] | None:
    """Return the names that this model gives to query, key and value; None leaves the choice to PEFT."""
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for names in _ATTENTION_NAMES:
        if present.issuperset(names):
            return list(names)
    return None


def check_targets(model: nn.Module, targets: list[str] | str) -> None:
    """Raise for a target that matches nothing: PEFT is content where one entry of a list matches."""
    if targets == "all-linear":
        return
    paths = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        try:
            unmatched = [] if any(re.fullmatch(targets, path) for path in paths) else [targets]
        except re.error as error:
            raise BayesLoraError(
                f"--target-modules {targets!r} is not a regular expression ({error}): correct it"
            ) from error
    else:
        unmatched = [t for t in targets if not any(path == t or path.endswith("." + t) for path in paths)]
        if not targets:
            raise BayesLoraError("--target-modules is empty: name at least one module")
    if unmatched:
        layers = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
        linear = {name.rpartition(".")[2] for name in layers}
        raise BayesLoraError(
            f"target module {unmatched[0]!r} matches nothing in this model{close_matches(unmatched[0], linear)}: "
            f"its linear layers are {', '.join(sorted(linear))}"
        )
