"""Targets that an adapter would leave out without a word: names that match nothing, and fused experts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bayeslora.errors import BayesLoraError, close_matches

ALL_LINEAR = "all-linear"
_SHOWN = 4


def check_targets(model: nn.Module, config: Any) -> None:
    """Raise BayesLoraError if a target names weights that no method adapts; warn of targets that are left out.

    PEFT is content if one of several names matches. Mixtures of experts keep the weights of all experts in one tensor
    (experts, d_out, d_in), which is not a linear layer: methods of this library do not adapt it.

    Args:
        model: the base model, perhaps with other adapters.
        config: of the new adapter.
    """
    targets = config.target_modules
    fused = fused_weights(model)
    if not targets:
        return
    if isinstance(targets, str):
        left_out = fused if targets.lower() == ALL_LINEAR else [path for path in fused if _matches(targets, path)]
        _warn_of(left_out, targets)
        return
    paths = [path for path, _ in model.named_modules()]
    parameters = [path for path, parameter in model.named_parameters() if parameter.ndim > 1]
    for target in sorted(targets):
        if _ends(paths, target):
            _warn_of(_ends(fused, target), target)
        elif held := _ends(parameters, target):
            raise BayesLoraError(
                f"target {target!r} is {_listed(held)}, a tensor that is no linear layer (such as that of fused "
                f"experts), but {type(config).__name__} adapts linear layers: leave it out, or train it with "
                "peft.LoraConfig(target_parameters=…)"
            )
        elif any(_ends(paths, other) for other in targets):  # otherwise PEFT refuses them
            names = {path.rpartition(".")[2] for path in paths} - {""}
            warnings.warn(
                f"target {target!r} matches nothing in the model{close_matches(target, names)}: only the other "
                "targets are adapted",
                stacklevel=2,
            )


def unmatched_modules(model: nn.Module, config: Any) -> list[str]:
    """Return the names in `modules_to_save` that match nothing, without the usual ones of heads, which PEFT adds."""
    paths = [path for path, _ in model.named_modules()]
    kept = set(config.modules_to_save or ()) - {"classifier", "score"}
    return [name for name in sorted(kept) if not _ends(paths, name)]


def warn_of_unmatched(model: nn.Module, config: Any) -> None:
    """Warn of names in `modules_to_save` that match nothing, and so do nothing."""
    for name in unmatched_modules(model, config):
        warnings.warn(
            f"modules_to_save names {name!r}, which matches nothing in the model: it has no effect", stacklevel=3
        )


def check_not_nested(model: nn.Module, names: Iterable[str] | None) -> None:
    """Raise BayesLoraError if names of modules to save match a module and one inside it, which no file can hold.

    PEFT looks for modules whose path ends with a name, also in the middle of a word.
    """
    ends = tuple(names or ())
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path.endswith(ends)] if ends else []
    for outer in paths:
        inner = next((path for path in paths if path.startswith(outer + ".")), None)
        if inner is not None:
            raise BayesLoraError(
                f"modules_to_save is {','.join(ends)}, which matches {outer} and {inner} inside it, but an adapter's "
                f"file holds one of them: give {outer}"
            )


def exclude_saved(model: nn.Module, config: Any) -> None:
    """Leave layers that are trained whole out of all linear ones, where a name ends theirs in the middle of a word.

    PEFT saves DistilBERT's `pre_classifier` for the name `classifier`, but would adapt it first, and then fail.
    """
    names, excluded = config.modules_to_save or (), config.exclude_modules or []
    if str(config.target_modules).lower() != ALL_LINEAR or isinstance(excluded, str):
        return
    linear = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    found = {path for path in linear for name in names if path.endswith(name) and not _ends([path], name)}
    if found:
        config.exclude_modules = {*excluded, *found}


def fused_weights(model: nn.Module) -> list[str]:
    """Return the paths of weights that hold a matrix for each of several experts, in the order of the model."""
    found = []
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if _is_stack(owner, module, parameter):
                found.append(f"{owner}.{name}" if owner else name)
    return found


def _is_stack(owner: str, module: nn.Module, parameter: Tensor) -> bool:
    """Return whether `parameter` is a stack of matrices, and no kernel of a convolution or embedding of positions."""
    if isinstance(module, nn.modules.conv._ConvNd) or min(parameter.shape, default=0) < 2:
        return False
    is_linear = isinstance(module, nn.Linear) or hasattr(module, "in_features")
    return parameter.ndim > 2 or (parameter.ndim == 2 and "experts" in owner.split(".") and not is_linear)


def _matches(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error:
        return False  # PEFT says it


def _ends(paths: Iterable[str], name: str) -> list[str]:
    return [path for path in paths if path == name or path.endswith("." + name)]


def _warn_of(left_out: list[str], target: str) -> None:
    if left_out:
        warnings.warn(
            f"target {target!r} leaves out {_listed(left_out)}, fused experts that are no linear layers: their "
            "weights stay as they are",
            stacklevel=3,
        )


def _listed(paths: list[str]) -> str:
    """Return the paths with a star for the number of a layer, each once."""
    unique = list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in paths))
    more = f" and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
    return ", ".join(unique[:_SHOWN]) + more
