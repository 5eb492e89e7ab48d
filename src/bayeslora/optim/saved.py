"""A posterior over the weights of an adapter, beside the adapter on disk: the deviation of every trained tensor.

The mean is the adapter itself. `posterior.safetensors` has, under the parameter's name in the model without the
adapter's name (as PEFT names what it saves), the standard deviations in float32; its metadata has the order in which
the optimizer held the parameters, which is that of the numbers of a draw. So a seed means the same weights before and
after.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from bayeslora.errors import BayesLoraError
from bayeslora.optim._draws import Gaussian, drawn_weights
from bayeslora.optim.ivon import IVON

POSTERIOR_FILE = "posterior.safetensors"
_ORDER = "order"
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "modules_to_save")
"""Names that distributed training, compilation and PEFT put into those of parameters, and that PEFT does not save."""


def unwrapped(optimizer: Any) -> Any:
    """The torch optimizer inside accelerate's wrapper, or `optimizer` itself."""
    return getattr(optimizer, "optimizer", optimizer)


@runtime_checkable
class DrawsWeights(Protocol):
    """What can set a model's weights to draws: `bayeslora.IVON`, or a posterior that was saved from it."""

    def sampled(self, seed: int = 0, draw: int = 0, antithetic: bool = False) -> AbstractContextManager[None]:
        """Inside, the weights are draw number `draw`; outside, they are what they were."""


def posterior_of(optimizer: Optimizer) -> IVON:
    """The IVON that `optimizer` is or, as accelerate does, wraps; raises `BayesLoraError` for any other."""
    inner = unwrapped(optimizer)
    if not isinstance(inner, IVON):
        raise _no_posterior(inner)
    return inner


def draws_of(source: object) -> DrawsWeights:
    """What draws the weights: an IVON, wrapped or not, or a saved posterior; raises `BayesLoraError` for others."""
    inner = unwrapped(source)
    if not isinstance(inner, DrawsWeights):
        raise _no_posterior(inner)
    return inner


def _no_posterior(source: object) -> BayesLoraError:
    return BayesLoraError(
        f"{type(source).__name__} keeps no posterior over the weights: give a bayeslora.IVON, or load_posterior(…)"
    )


@dataclass
class NamedPosterior:
    """Standard deviations by the names of the parameters, apart from any model.

    Attributes:
        order: name and number of elements of every parameter that the optimizer held, in its order; the name of one
            that was frozen is empty.
        tensors: standard deviations, float32 on the CPU.
    """

    order: list[tuple[str, int]]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, optimizer: Optimizer) -> NamedPosterior:
        """What `optimizer` has learned about the parameters of `model`; see `save_posterior`."""
        names = {id(parameter): name for name, parameter in _named(model)}
        found = cls([], {})
        for size, parameter, _, deviation in posterior_of(optimizer).posteriors():
            if parameter is None or deviation is None:
                found.order.append(("", size))  # it has its share of a draw's numbers all the same
                continue
            if id(parameter) not in names:
                raise BayesLoraError(
                    f"a parameter of shape {tuple(parameter.shape)} that the optimizer trained is no longer in the "
                    "model, all are needed: save the posterior before the adapter is shrunk, merged or replaced"
                )
            name = names[id(parameter)]
            whole: Any = deviation.full_tensor() if hasattr(deviation, "full_tensor") else deviation
            found.order.append((name, size))
            found.tensors[name] = whole.to(device="cpu", dtype=torch.float32).contiguous()
        return found

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> NamedPosterior:
        """Of `posterior.safetensors` in `folder`; raises `BayesLoraError` where it is missing or damaged."""
        path = Path(folder) / POSTERIOR_FILE
        if not path.is_file():
            raise BayesLoraError(f"{path} is missing: train with IVON and call save_posterior, or use samples=0")
        try:
            with safe_open(path, framework="pt") as file:
                order = [(str(name), int(size)) for name, size in json.loads(file.metadata()[_ORDER])]
                return cls(order, {name: file.get_tensor(name) for name, _ in order if name})
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise BayesLoraError(f"{path} is damaged or no posterior ({error}): save it again") from error

    def cut(self, model: nn.Module, kept: Mapping[str, Tensor]) -> None:
        """Follow `model`, whose ranks have been cut since.

        Args:
            model: after `shrink`.
            kept: for each layer's path the mask (r,) of the ranks that were kept.
        """
        shapes = {name: parameter.shape for name, parameter in _named(model)}
        for position, (name, _) in enumerate(self.order):
            if not name or shapes[name] == self.tensors[name].shape:
                continue
            old, new = self.tensors[name], shapes[name]
            axis = next(axis for axis in range(old.ndim) if old.shape[axis] != new[axis])
            mask = next(mask for path, mask in kept.items() if f".{path}." in f".{name}.")
            self.tensors[name] = old.index_select(axis, mask.nonzero()[:, 0].cpu())
            self.order[position] = (name, self.tensors[name].numel())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `posterior.safetensors` in `folder`, on the first of several ranks; returns its path."""
        path = Path(folder) / POSTERIOR_FILE
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        if ranks and torch.distributed.get_rank() > 0:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file(self.tensors, partial, metadata={"format": "pt", _ORDER: json.dumps(self.order)})
        os.replace(partial, path)
        return path


def save_posterior(model: nn.Module, optimizer: Optimizer, folder: str | os.PathLike[str]) -> Path:
    """Write the posterior that `optimizer` has learned to `posterior.safetensors` in `folder`, beside the adapter.

    Of distributed tensors the whole is written; every rank has to call, and the first one writes.

    Args:
        model: whose parameters the optimizer trained, wrapped or not.
        optimizer: an `IVON`.
        folder: made where it is missing; usually that of `save_pretrained`.

    Returns:
        The file.

    Raises:
        BayesLoraError: an optimizer without a posterior, or one with parameters that `model` does not have, as after
            ranks were cut out of an adapter: save before.
    """
    return NamedPosterior.of(model, optimizer).save(folder)


class SavedPosterior:
    """The posterior in a folder, for a model that has the adapter of that folder.

    Args:
        model: with the adapter loaded; its weights are the mean.
        folder: where `save_posterior` wrote.

    Raises:
        BayesLoraError: no such file, a damaged one, or one that does not fit the model.
    """

    def __init__(self, model: nn.Module, folder: str | os.PathLike[str]) -> None:
        posterior, path = NamedPosterior.read(folder), Path(folder) / POSTERIOR_FILE
        order, tensors = posterior.order, posterior.tensors
        self.model = model
        parameters = dict(_named(model))
        self._entries: list[tuple[int, nn.Parameter | None, Tensor | None]] = []
        for name, size in order:
            if name not in tensors:
                self._entries.append((size, None, None))
                continue
            if name not in parameters or parameters[name].shape != tensors[name].shape:
                found = tuple(parameters[name].shape) if name in parameters else "not there"
                raise BayesLoraError(
                    f"{path} has {name} of shape {tuple(tensors[name].shape)}, in the model it is {found}: "
                    "load the adapter that is beside the file"
                )
            self._entries.append((size, parameters[name], tensors[name]))

    def posteriors(self) -> list[Gaussian]:
        """The posterior of every parameter, in the order of the optimizer that trained them."""
        return [
            Gaussian(size, parameter, None if parameter is None else parameter.detach(), deviation)
            for size, parameter, deviation in self._entries
        ]

    @contextmanager
    def sampled(self, seed: int = 0, draw: int = 0, antithetic: bool = False) -> Iterator[None]:
        """Inside, the weights are a draw; see `IVON.sampled`, which draws the same for the same seed."""
        with drawn_weights(self.posteriors(), seed, draw, antithetic):
            yield


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters by their names without wrappers and adapter."""
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
