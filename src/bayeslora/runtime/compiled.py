"""Models whose work is one compiled graph: what PyTorch and Transformers offer, held to what is safe and fast.

With few rows, a sentence or a token at a time, the products of a small model take less time than the calls around
them. Compiled, what lies between two products is one loop, and one call runs them all.
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
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import CompileConfig, PreTrainedModel

from bayeslora.errors import BayesLoraError


def compile_inference(model: nn.Module, max_length: int | None = None, backend: str = "inductor") -> None:
    """From now on run `model` as one graph, compiled when it is first called: of a language model `generate`'s step.

        model = bayeslora.load_integer("out")
        bayeslora.compile_inference(model, max_length=512)
        model.generate(**inputs)

    A model that generates reads its prompt as before, and each token after it by the graph, with Transformers' static
    cache; any other is compiled as a whole, for inputs of every length. The first call waits for the compiler, minutes
    for a model of thirty layers; that of a later process waits less, since the code is in PyTorch's cache on disk. A
    second batch size (of an encoder one beyond 1), a longer cache, and a model that was moved or cast are compiled
    anew. The graph has no eye for any other change of the model.

    Args:
        model: of `load_integer`, or any other of Transformers without an adapter, in evaluation mode. One that
            generates is of a class that takes a static cache.
        max_length: tokens, prompt included, for which the cache has room in every call of `generate`, so that longer
            calls do not compile again; by default each call's own longest. A token's time grows with it.
        backend: of `torch.compile`.

    Raises:
        BayesLoraError: a model with an adapter, whose weights may be drawn anew, in training mode, or not of
            Transformers; a length below 2, or for a model that does not generate; or no C++ compiler, which PyTorch
            needs for a model on a CPU.
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise BayesLoraError("a compiled model has no eye for its adapter: export it as integer or merged first")
    if not isinstance(model, PreTrainedModel):
        raise BayesLoraError(f"{type(model).__name__} is no model of Transformers: call torch.compile yourself")
    if model.training:
        raise BayesLoraError("the model is in training mode, which is not compiled: call model.eval() first")
    if max_length is not None and not model.can_generate():
        raise BayesLoraError(f"{type(model).__name__} does not generate: leave max_length out")
    if max_length is not None and max_length < 2:
        raise BayesLoraError(f"max_length must be at least 2 tokens, not {max_length}")
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if model.device.type == "cpu" and shutil.which(compiler) is None:
        raise BayesLoraError(
            f"PyTorch compiles with {compiler}, which is not installed: install it, or name one in CXX"
        )
    if not model.can_generate():
        setattr(model, "forward", _CompiledForward(model, backend))  # noqa: B010 - a method for the type checker
        return
    settings: Any = model.generation_config
    settings.cache_implementation, settings.compile_config = "static", _OnEveryDevice()
    settings.max_cache_len = None if max_length is None else max_length - 1
    setattr(model, "get_compiled_call", _CompiledCall(model, backend))  # noqa: B010


class _OnEveryDevice(CompileConfig):
    """Transformers' own, for CPUs too: by itself `generate` compiles on accelerators only."""

    _compile_all_devices = True  # type: ignore[assignment]


class _Compiled:
    """A model's forward pass as a graph of its own, compiled when it is first asked for; a copy compiles for itself.

    By itself PyTorch looks at every constant of every layer before each call, which takes a quarter as long as a
    small model's step. Here one look is at the model's device and type.
    """

    def __init__(self, model: PreTrainedModel, backend: str, dynamic: bool | None) -> None:
        self.model, self.backend, self.dynamic = model, backend, dynamic
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
    """What `generate` asks for its step."""

    def __init__(self, model: PreTrainedModel, backend: str) -> None:
        super().__init__(model, backend, dynamic=None)

    def __call__(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        if not isinstance(compile_config, _OnEveryDevice):  # a caller's own, of which nothing may be lost
            return type(self.model).get_compiled_call(self.model, compile_config)
        return self.run()


class _CompiledForward(_Compiled):
    """A model's `forward`, for inputs of any length."""

    def __init__(self, model: PreTrainedModel, backend: str) -> None:
        super().__init__(model, backend, dynamic=True)
        self.__signature__ = inspect.signature(model.forward)  # by which callers know the model's inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run()(*args, **kwargs)


def _own_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The forward pass in a function with a code object of its own.

    To that PyTorch ties what it has compiled: a second model would run the first one's graph.
    """
    forward = type(model).forward

    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(model, *args, **kwargs)

    return types.FunctionType(run.__code__.replace(), globals(), run.__name__, None, run.__closure__)
