"""Inference by one compiled graph, with the options of PyTorch and Transformers that are safe and fast.

With few rows, such as one sentence or token at a time, a small model spends more time on calls than on its products.
A compiled graph fuses the operations between two products, and one call runs all of it.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel

from bayeslora.errors import BayesLoraError


def compile_inference(model: nn.Module, max_length: int | None = None, backend: str = "inductor") -> None:
    """Compile `model`, so that later calls run one graph; for a language model, compile the step of `generate`.

        model = bayeslora.load_integer("out")
        bayeslora.compile_inference(model, max_length=512)
        model.generate(**inputs)

    A generative model reads its prompt without the graph and each later token with it, using Transformers' static
    cache; any other model is compiled as a whole, for inputs of any length. The first call waits for the compiler,
    minutes for a model of 30 layers; later processes wait less, because PyTorch caches the code on disk. The model is
    compiled again for a new batch size (for an encoder, a second one above 1) or a longer cache, and after it is moved
    or cast. The graph does not notice any other change of the model.

    Args:
        model: a model from `load_integer`, or any Transformers model without an adapter, in evaluation mode. A model
            that generates must support a static cache.
        max_length: capacity of the cache in tokens, prompt included, in every call of `generate`, so that longer calls
            do not compile again; by default the maximum length of each call. The time per token grows with it.
        backend: backend of `torch.compile`, by default "inductor".

    Raises:
        BayesLoraError: the model has an adapter, is in training mode or is not from Transformers; `max_length` is
            below 2, or given for a model that does not generate; or the CPU has no C++ compiler, which PyTorch needs.
    """
    # No model has an adapter in a process that has not imported PEFT, and a deployed model needs no PEFT.
    peft_layers = sys.modules.get("peft.tuners.tuners_utils")
    if peft_layers and any(isinstance(module, peft_layers.BaseTunerLayer) for module in model.modules()):
        raise BayesLoraError(
            "the model has an adapter, but a compiled graph would not notice when the adapter changes: "
            "export it with format='merged' or 'integer' first"
        )
    if not isinstance(model, PreTrainedModel):
        raise BayesLoraError(f"{type(model).__name__} is not a Transformers model: call torch.compile instead")
    if model.training:
        raise BayesLoraError("the model is in training mode, but only evaluation is compiled: call model.eval() first")
    if max_length is not None and not model.can_generate():
        raise BayesLoraError(f"{type(model).__name__} does not generate: leave max_length out")
    if max_length is not None and max_length < 2:
        raise BayesLoraError(f"max_length is {max_length}, but must be at least 2 tokens: give more")
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if model.device.type == "cpu" and shutil.which(compiler) is None:
        raise BayesLoraError(
            f"PyTorch compiles with {compiler}, but it is not installed: install it, or name another in CXX"
        )
    if not model.can_generate():
        setattr(model, "forward", _CompiledForward(model, backend))  # noqa: B010 - a method for the type checker
        return
    settings: Any = model.generation_config
    settings.cache_implementation, settings.compile_config = "static", _OnEveryDevice()
    settings.max_cache_len = None if max_length is None else max_length - 1
    setattr(model, "get_compiled_call", _CompiledCall(model, backend))  # noqa: B010


class _OnEveryDevice(CompileConfig):
    """Options that let `generate` compile on CPUs too; by default it compiles on accelerators only."""

    _compile_all_devices = True  # type: ignore[assignment]


class _Compiled:
    """The forward pass of one model as a graph, compiled at its first use; a copy of the model compiles again.

    By default PyTorch checks every constant of every layer before each call, which takes a quarter of the time of a
    small model's step. Here only the model's device and type are checked.
    """

    dynamic: bool | None = None

    def __init__(self, model: PreTrainedModel, backend: str) -> None:
        self.model, self.backend = model, backend
        self._made_for: tuple[torch.device, torch.dtype] | None = None
        self._run: Callable[..., Any] | None = None

    def run(self) -> Callable[..., Any]:
        state = self.model.device, self.model.dtype
        if self._run is None or self._made_for != state:
            options: dict[str, Any] = {}
            if self.backend == "inductor":
                options = {"size_asserts": False, "alignment_asserts": False}
            unguarded = getattr(torch.compiler, "skip_guard_on_all_nn_modules_unsafe", None)  # of recent PyTorch
            if unguarded is not None:
                options["guard_filter_fn"] = unguarded
            self._run = torch.compile(
                _own_forward(self.model), fullgraph=True, dynamic=self.dynamic, backend=self.backend, options=options
            )
            self._made_for = state
        return self._run

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made_for": None, "_run": None}


class _CompiledCall(_Compiled):
    """The compiled step of `generate`."""

    def __call__(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        if not isinstance(compile_config, _OnEveryDevice):  # the caller's options must not be lost
            return type(self.model).get_compiled_call(self.model, compile_config)
        return self.run()


class _CompiledForward(_Compiled):
    """The compiled `forward` of a model, for inputs of any length."""

    dynamic = True

    def __init__(self, model: PreTrainedModel, backend: str) -> None:
        super().__init__(model, backend)
        self.__signature__ = inspect.signature(model.forward)  # callers read the model's inputs from it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run()(*args, **kwargs)


def _own_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """Return the forward pass as a function with a new code object.

    PyTorch keys compiled code by code object: with a shared one, a second model would run the first one's graph.
    """
    forward = type(model).forward

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(model, *args, **kwargs)

    return types.FunctionType(run.__code__.replace(), globals(), run.__name__, None, run.__closure__)
