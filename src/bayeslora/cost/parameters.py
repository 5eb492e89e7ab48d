"""Parameter counts: of a model with adapters, and of the adapters a configuration would get."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from bayeslora.cost.macs import LayerCost
from bayeslora.cost.structure import ModelOrConfig, as_model, base_model, is_adapted, read_tree, unwrapped, walk
from bayeslora.errors import BayesLoraError


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Count a model's parameters.

    Returns:
        trainable: parameters the optimizer changes (`requires_grad`), the task head included.
        adapter: parameters of the adapter layers alone, whether or not they are being trained at the moment: the
            low-rank matrices and, beside them, the diagonal, gates and ranges of the methods that have them.
        total: all parameters, base model included; weights packed in 4 bits count as the weights they stand for.

    A tensor that several modules share counts once.
    """
    adapter = {id(parameter) for module in model.modules() if is_adapted(module) for parameter in _own(module)}
    sizes = {id(parameter): (_size(parameter), parameter.requires_grad) for parameter in model.parameters()}
    return {
        "trainable": sum(size for size, trainable in sizes.values() if trainable),
        "adapter": sum(size for key, (size, _) in sizes.items() if key in adapter),
        "total": sum(size for size, _ in sizes.values()),
    }


def _own(layer: nn.Module) -> Iterator[nn.Parameter]:
    """What an adapter layer holds beside its base layer."""
    yield from layer.parameters(recurse=False)
    for name, child in layer.named_children():
        if name != "base_layer":
            yield from child.parameters()


def _size(parameter: nn.Parameter) -> int:
    # bitsandbytes packs two 4-bit weights in a byte and keeps the real shape beside them.
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return parameter.numel() if shape is None else math.prod(shape)


def adapter_matrices(layers: Iterable[LayerCost]) -> int:
    """Parameters of the low-rank matrices A and B alone, Σ r · (d_in + d_out), at the layers' present ranks.

    It is the figure papers print (Eq. 23 of the Bayesian-LoRA paper); E, rank gates, bit gates and ranges come on top
    and are in `count_parameters(model)["adapter"]`.
    """
    return sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers)


def adapter_parameters(model_or_config: ModelOrConfig, r: int, target_modules: str | Sequence[str]) -> int:
    """Parameters of the low-rank matrices that adapters of rank r would have, Σ r · (d_in + d_out), before they exist.

    Args:
        model_or_config: a model, or a configuration, which is built on the meta device.
        r: the rank.
        target_modules: as in PEFT: the ends of module paths, one regular expression for whole paths, or "all-linear"
            (every linear layer but the output layer).

    Raises:
        BayesLoraError: r is below 1, or nothing matches `target_modules`.
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise BayesLoraError(f"r is {r!r}, but an adapter needs a whole number of at least 1; give another rank.")
    model = base_model(as_model(model_or_config))
    tree = read_tree(model)
    shapes = {name: (m.in_features, m.out_features) for name, m in tree.matrices.items()} | tree.embeddings
    if target_modules == "all-linear":
        output = getattr(model, "get_output_embeddings", lambda: None)()
        heads = {name for name, module in walk(model) if output is not None and module is unwrapped(output)}
        chosen = [name for name in tree.matrices if name not in heads]
    else:
        chosen = [name for name in shapes if _matches(name, target_modules)]
    if not chosen:
        raise BayesLoraError(
            f"No layer matches target_modules={target_modules!r}; this model's layers end in "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in tree.matrices}))}."
        )
    return r * sum(n_in + n_out for n_in, n_out in (shapes[name] for name in chosen))


def _matches(name: str, target_modules: str | Sequence[str]) -> bool:
    if isinstance(target_modules, str):
        try:
            return re.fullmatch(target_modules, name) is not None
        except re.error as error:
            raise BayesLoraError(
                f"target_modules={target_modules!r} is no regular expression ({error}); give a list of module names."
            ) from error
    return any(name == target or name.endswith(f".{target}") for target in target_modules)
