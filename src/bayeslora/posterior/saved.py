"""Posterior over a model's weights, in memory and in `posterior.safetensors` next to the adapter.

The adapter itself is the mean. The file holds the standard deviations in float32, under the parameters' names without
the adapter's name (as PEFT names the tensors it saves). Its metadata holds the optimizer's order of the parameters,
which is the order of a draw's random numbers: a seed gives the same weights before saving and after loading. A
posterior from SWAG also has the columns of a covariance of low rank, and means where the weights are too coarse.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from bayeslora._peft import BaseTunerLayer
from bayeslora.errors import BayesLoraError
from bayeslora.files import write_atomically
from bayeslora.posterior.draws import GaussianParameter, PosteriorSource, drawn_weights, posterior_source, whole

POSTERIOR_FILE = "posterior.safetensors"
_ORDER = "order"
_COLUMNS, _MEAN = "columns:", "mean:"
"""Prefixes of tensors in the file; one without a prefix is a standard deviation."""
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "modules_to_save")
"""Parts of parameter names that distributed training, compilation and PEFT add, and that PEFT does not save."""


class WeightPosterior:
    """Gaussian posterior over the trained weights of a model; the model's own weights are the mean.

    `bayeslora.predict(posterior, batch, samples=10)` draws from it.

    Args:
        model: the model with the trained adapter.
        order: name (empty if frozen) and number of elements of every parameter, in the order of the optimizer.
        deviations: standard deviations by parameter name, float32 on the CPU.
        columns: (K, *shape) low-rank covariance factors by name, as in `GaussianParameter`; empty without them.
        means: float32 means by name, for 16-bit parameters, whose weights are only the rounded means.

    Raises:
        BayesLoraError: the model lacks a parameter, or has it in another shape.
    """

    def __init__(
        self,
        model: nn.Module,
        order: list[tuple[str, int]],
        deviations: dict[str, Tensor],
        columns: dict[str, Tensor] | None = None,
        means: dict[str, Tensor] | None = None,
    ) -> None:
        self.model, self.order, self.deviations = model, order, deviations
        self.columns, self.means = columns or {}, means or {}
        self._parameters = dict(_named(model))
        for name, deviation in deviations.items():
            parameter = self._parameters.get(name)
            if parameter is None or parameter.shape != deviation.shape:
                found = "is missing from" if parameter is None else f"has shape {tuple(parameter.shape)} in"
                raise BayesLoraError(
                    f"{name} has shape {tuple(deviation.shape)} in the posterior, but {found} the model: "
                    "load the adapter that the posterior was saved with"
                )
        for name, factor in self.columns.items():
            if name not in deviations or factor.shape[1:] != deviations[name].shape:
                raise BayesLoraError(
                    f"{name} has columns of shape {tuple(factor.shape)} in the posterior, but they must be those of "
                    "its deviations: save the posterior again"
                )

    @classmethod
    def of(cls, model: nn.Module, source: Optimizer | PosteriorSource) -> WeightPosterior:
        """Return the posterior that `source` has learned over the parameters of `model`; see `save_posterior`."""
        names = {id(parameter): name for name, parameter in _named(model)}
        order: list[tuple[str, int]] = []
        deviations: dict[str, Tensor] = {}
        columns: dict[str, Tensor] = {}
        means: dict[str, Tensor] = {}
        for size, parameter, mean, deviation, factor in posterior_source(source).gaussians():
            if parameter is None or deviation is None:
                order.append(("", size))
                continue
            if id(parameter) not in names:
                raise BayesLoraError(
                    f"the optimizer trained a parameter of shape {tuple(parameter.shape)}, but the model lacks it: "
                    "save the posterior before the adapter is shrunk, merged or replaced"
                )
            name = names[id(parameter)]
            order.append((name, size))
            deviations[name] = _whole(deviation)
            if factor is not None:
                columns[name] = _whole(factor)
                if mean is not None and parameter.dtype in (torch.bfloat16, torch.float16):
                    means[name] = _whole(mean)
        return cls(model, order, deviations, columns, means)

    def cut(self, model: nn.Module, kept: Mapping[str, Tensor]) -> WeightPosterior:
        """Return the posterior without the ranks that have since been removed from `model`.

        Args:
            model: the model after `shrink`.
            kept: the mask (r,) of the remaining ranks, by layer path.
        """
        shapes = {name: parameter.shape for name, parameter in _named(model)}
        deviations, columns, means = dict(self.deviations), dict(self.columns), dict(self.means)
        for name, old in self.deviations.items():
            axis = next((axis for axis in range(old.ndim) if old.shape[axis] != shapes[name][axis]), None)
            if axis is not None:
                mask = next(mask for path, mask in kept.items() if f".{path}." in f".{name}.")
                ranks = mask.nonzero()[:, 0].cpu()
                for values, along in ((deviations, axis), (columns, axis + 1), (means, axis)):
                    if name in values:
                        values[name] = values[name].index_select(along, ranks)
        order = [(name, deviations[name].numel() if name else size) for name, size in self.order]
        return WeightPosterior(model, order, deviations, columns, means)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `posterior.safetensors` in `folder`, on the first rank only, and return its path."""
        path = Path(folder) / POSTERIOR_FILE
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        if ranks and torch.distributed.get_rank() > 0:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = dict(self.deviations)
        for prefix, values in ((_COLUMNS, self.columns), (_MEAN, self.means)):
            tensors |= {prefix + name: value for name, value in values.items()}
        with write_atomically(path) as partial:
            # One entry alone: several are written in an order of chance, and equal posteriors would be other files.
            save_file(tensors, partial, metadata={_ORDER: json.dumps(self.order)})
        return path

    def gaussians(self) -> list[GaussianParameter]:
        """Return the Gaussian of every parameter, in the order of the optimizer that trained them."""
        found = []
        for name, size in self.order:
            parameter = self._parameters.get(name)
            mean = self.means.get(name, None if parameter is None else parameter.detach())
            found.append(GaussianParameter(size, parameter, mean, self.deviations.get(name), self.columns.get(name)))
        return found

    @contextmanager
    def sampled(self, seed: int = 0, draw: int = 0, antithetic: bool = False) -> Iterator[None]:
        """Set the model's weights to a draw inside the context; see `IVON.sampled`, which draws the same.

        Raises:
            BayesLoraError: the adapter is merged into the base weights.
        """
        check_unmerged(self.model)
        with drawn_weights(self.gaussians(), seed, draw, antithetic):
            yield


def save_posterior(model: nn.Module, optimizer: Optimizer | PosteriorSource, folder: str | os.PathLike[str]) -> Path:
    """Write the posterior that `optimizer` has learned to `posterior.safetensors` in `folder`, next to the adapter.

    In distributed training, call this on every rank: sharded tensors are gathered, and the first rank writes.

    Args:
        model: the trained model, possibly wrapped for distributed training.
        optimizer: the `IVON` or `SWAG` that has trained the model.
        folder: folder to write to, usually that of `save_pretrained`; created if missing.

    Returns:
        Path of the file.

    Raises:
        BayesLoraError: the optimizer has no posterior, or `model` lacks one of its parameters. `shrink` removes ranks
            from an adapter's parameters: save the posterior before it.
    """
    return WeightPosterior.of(model, optimizer).save(folder)


def load_posterior(model: nn.Module, folder: str | os.PathLike[str]) -> WeightPosterior:
    """Load the posterior that `save_posterior` wrote to `folder`, for prediction.

    ```python
    model = PeftModel.from_pretrained(base, folder)
    prediction = bayeslora.predict(bayeslora.load_posterior(model, folder), batch, samples=10)
    ```

    Args:
        model: the model with the adapter that was saved in that folder; its weights are the mean.
        folder: folder with `posterior.safetensors`.

    Raises:
        BayesLoraError: the file is missing or damaged, or does not fit the model.
    """
    path = Path(folder) / POSTERIOR_FILE
    if not path.is_file():
        raise BayesLoraError(
            f"{path} is missing, but samples need it: train with IVON or SWAG and call save_posterior, or use "
            "samples=0"
        )
    try:
        with safe_open(path, framework="pt") as file:
            order = [(str(name), int(size)) for name, size in json.loads(file.metadata()[_ORDER])]
            deviations = {name: file.get_tensor(name) for name, _ in order if name}
            columns, means = (
                {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}
                for prefix in (_COLUMNS, _MEAN)
            )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise BayesLoraError(f"{path} is damaged ({error}), but must be a saved posterior: save it again") from error
    return WeightPosterior(model, order, deviations, columns, means)


def check_unmerged(model: nn.Module) -> None:
    """Raise `BayesLoraError` if an adapter is merged into the base weights, where draws and training miss it."""
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise BayesLoraError(
            "an adapter is merged into the base weights, but must be apart: call unmerge_adapter first"
        )


def _whole(tensor: Any) -> Tensor:
    """Return a tensor, gathered if it is distributed, in float32 on the CPU."""
    return whole(tensor).to(device="cpu", dtype=torch.float32).contiguous()


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter with its name, without the parts that wrappers and the adapter add."""
    adapter = _adapter_name(model)
    for name, parameter in model.named_parameters():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        if adapter in parts:
            del parts[len(parts) - 1 - parts[::-1].index(adapter)]
        yield ".".join(parts), parameter


def _adapter_name(model: nn.Module) -> str:
    for module in model.modules():
        active = getattr(module, "active_adapter", None)
        if isinstance(active, str):
            return active
        if isinstance(active, list) and len(active) == 1:
            return str(active[0])
    return ""
