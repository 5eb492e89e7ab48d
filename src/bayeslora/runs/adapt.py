"""Put adapters into a base model as a method's options say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from bayeslora.errors import BayesLoraError, close_matches, one_line
from bayeslora.methods.targets import check_not_nested, exclude_saved
from bayeslora.runs.base import BaseModel
from bayeslora.vocabulary import FUSED_PROJECTIONS, SEPARATE_PROJECTIONS

# The first set of names that a model has is the default; PEFT knows the models with q, k and v.
_ATTENTION_NAMES = (*SEPARATE_PROJECTIONS[:-1], *((name,) for name in FUSED_PROJECTIONS))
_REFUSALS = (ValueError, TypeError, ImportError, RuntimeError, OSError, LookupError, AttributeError, AssertionError)
"""What PEFT and the Trainer raise for options; a file of options that is missing is an OSError."""


def adapt(base: BaseModel, config_class: type[PeftConfig] | None, options: dict[str, Any]) -> nn.Module:
    """Return the model to train: `base` with adapters, or `base` itself for full fine-tuning (`config_class` None).

    Target modules default to the query, key and value projections. The head and all other modules whose weights were
    missing from the checkpoint are trained and saved with the adapter, because their random weights could not be
    restored otherwise.
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
    check_layers(base.model, options.get("layers_to_transform"))
    check_saved_modules(base.model, options.get("modules_to_save") or [])
    options["modules_to_save"] = sorted({*(options.get("modules_to_save") or ()), *base.fresh}) or None
    check_not_nested(base.model, options["modules_to_save"])
    with option_errors(config_class.__name__):
        config = config_class(task_type=base.task_type, **options)
        exclude_saved(base.model, config)
        return get_peft_model(base.model, config)


def check_options(config_class: type[PeftConfig] | None, options: dict[str, Any]) -> None:
    """Raise BayesLoraError if the method's config refuses the options; needs no model."""
    tokens = options.get("trainable_token_indices")  # PEFT fails on an empty list in the first pass
    if tokens is not None and not all(tokens.values() if isinstance(tokens, dict) else [tokens]):
        raise BayesLoraError("--trainable-token-indices is empty, but must name at least 1 token: give its id")
    if config_class is not None:
        with option_errors(config_class.__name__):
            config_class(**options)


@contextmanager
def option_errors(what: str) -> Iterator[None]:
    """Turn errors that PEFT or the Trainer raises for invalid options into a BayesLoraError that names `what`."""
    try:
        yield
    except BayesLoraError:
        raise
    except _REFUSALS as error:
        if "target_modules" in str(error) or "target-modules" in str(error):
            raise BayesLoraError(
                "the layers to adapt are not known for models of this type: name them, such as --target-modules "
                "query,value, or adapt every linear layer with --target-modules all-linear"
            ) from error
        raise BayesLoraError(f"{what} does not accept these options ({one_line(error)}): change them") from error


def check_layers(model: nn.Module, wanted: int | list[int] | None) -> None:
    """Raise BayesLoraError if the model lacks a layer of this number."""
    found = sorted({int(n) for path, _ in model.named_modules() for n in re.findall(r"(?<=\.)\d+(?=\.)", path)})
    for number in [] if wanted is None else [wanted] if isinstance(wanted, int) else wanted:
        if found and number not in found:
            raise BayesLoraError(
                f"--layers-to-transform names {number}, but the model has layers {found[0]} to {found[-1]}: give those"
            )


def default_targets(model: nn.Module) -> list[str] | None:
    """Return the model's names for query, key and value; None leaves the choice to PEFT."""
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return next((list(names) for names in _ATTENTION_NAMES if present.issuperset(names)), None)


def check_saved_modules(model: nn.Module, names: list[str]) -> None:
    """Raise BayesLoraError for a name in `modules_to_save` that matches nothing; PEFT ignores it."""
    paths = [path for path, _ in model.named_modules()]
    for name in _unmatched(names, paths):
        near = close_matches(name, {path.rpartition(".")[2] for path in paths} - {""})
        raise BayesLoraError(
            f"--modules-to-save is {name!r}, but matches nothing in the model{near}: correct it or leave it out"
        )


def _unmatched(names: list[str], paths: list[str]) -> list[str]:
    """Return the names that are neither a path nor the end of one."""
    return [name for name in names if not any(path == name or path.endswith("." + name) for path in paths)]


def check_targets(model: nn.Module, targets: list[str] | str) -> None:
    """Raise BayesLoraError for a target that matches nothing; PEFT accepts a list if one entry matches."""
    if targets == "all-linear":
        return
    paths = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        try:
            unmatched = [] if any(re.fullmatch(targets, path) for path in paths) else [targets]
        except re.error as error:
            raise BayesLoraError(
                f"--target-modules is {targets!r}, but must be a regular expression ({error}): correct it"
            ) from error
    else:
        unmatched = _unmatched(targets, paths)
        if not targets:
            raise BayesLoraError("--target-modules is empty, but must name at least 1 module: give a name")
    if unmatched:
        layers = (name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
        linear = {name.rpartition(".")[2] for name in layers}
        raise BayesLoraError(
            f"--target-modules is {unmatched[0]!r}, but matches nothing in the model"
            f"{close_matches(unmatched[0], linear)}: its linear layers are {', '.join(sorted(linear))}"
        )
