"""Several draws of the weights in one forward pass; computations that are the same for all draws run once.

The inputs are repeated draw by draw: with S draws and B rows, rows 0 … B - 1 are the batch under the first draw, the
next B under the second, and so on. Modules before the first layer that draws weights give the same outputs for all
draws. One pass over the B rows runs up to that layer and keeps the outputs of the embeddings and blocks before it; the
pass over S · B rows repeats these outputs instead of computing them. Layers with the same input as the first one
multiply it by their base weight only once. A classifier that pools the first token needs only that token from its last
block, whose query is that token's alone.

All of this only saves time. Models whose layers mix rows or change their number take one draw at a time; models that
fail with repeated outputs run in full.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from bayeslora.errors import BayesLoraError, counted
from bayeslora.methods.tuner import tuner_of
from bayeslora.methods.variational import sampling, stochastic_layers
from bayeslora.posterior import IndivisibleBatchError

Read = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
"""Function from a model and a batch of B rows to (B, C) logits."""

MAX_ELEMENTS = {"cpu": 2048}
"""Maximum of input elements (tokens) in a pass over several draws, by device: more would not fit a CPU's caches."""
_MAX_ELEMENTS = 65536
"""Maximum on other devices, where memory is the limit."""

_POOLS_FIRST_TOKEN = {"bert", "camembert", "deberta", "deberta-v2", "electra", "roberta", "xlm-roberta"}
"""Model types whose sequence heads read the first token, and whose blocks have a known attention output."""
_HEADS = ("ForSequenceClassification", "ForMultipleChoice")

_REPLAY_ERRORS = (RuntimeError, ValueError, TypeError, IndexError)
"""Errors that torch and transformers raise for tensors whose shape a model did not expect."""


class BatchedSampler:
    """Compute a model's logits under several draws of its weights, and remember which shortcuts the model allows.

    Args:
        model: a model with a posterior, in evaluation mode.
        read: function from the model and a batch to logits.
        seed, antithetic, scale: options of `sampling`; draw d does not depend on which draws share its batch.
    """

    def __init__(self, model: nn.Module, read: Read, seed: int, antithetic: bool = False, scale: float = 1.0) -> None:
        self.model, self.read, self.seed, self.antithetic, self.scale = model, read, seed, antithetic, scale
        self.layers = stochastic_layers(model)
        # An expert sees only the tokens that are routed to it, and cannot tell which draw they belong to.
        self.batchable = not any("expert" in path for path in self.layers)
        self.shareable = True

    def logits(self, batch: Mapping[str, Tensor], draws: Sequence[int]) -> Tensor:
        """Return (S, B, C) logits under the `draws`, in their order."""
        prefix = self._prefix(batch) if len(draws) > 1 else None
        largest = max(batch.values(), key=Tensor.numel)
        most = max(1, MAX_ELEMENTS.get(largest.device.type, _MAX_ELEMENTS) // max(1, largest.numel()))
        parts, start = [], 0
        while start < len(draws):
            chosen = draws[start : start + (most if self.batchable else 1)]
            try:
                parts.append(self._pass(batch, chosen, prefix))
            except IndivisibleBatchError:
                if len(chosen) == 1:
                    raise
                self.batchable = False
                continue
            start += len(chosen)
        return torch.cat(parts)

    def _pass(self, batch: Mapping[str, Tensor], draws: Sequence[int], prefix: Prefix | None) -> Tensor:
        if prefix is not None and self.shareable:
            try:
                with prefix.replayed(len(draws)):
                    return self._run(batch, draws)
            except (BayesLoraError, torch.OutOfMemoryError):
                raise
            except _REPLAY_ERRORS:
                self.shareable = False  # an error of the model itself recurs in the full pass
        return self._run(batch, draws)

    def _run(self, batch: Mapping[str, Tensor], draws: Sequence[int]) -> Tensor:
        rows, times = row_count(batch), len(draws)
        repeated = repeat_rows(dict(batch), rows, times)
        drawn = sampling(self.model, "batch", self.seed, draws, self.antithetic, self.scale)
        with drawn, self._guarded(rows * times, times):
            logits = self.read(self.model, repeated)
        # Some models return one row for several rows of inputs (multiple choice). With several draws it is unknown
        # which row belongs to which draw; with one draw it does not matter.
        if times > 1 and len(logits) != rows * times:
            raise IndivisibleBatchError(
                f"the logits have {counted(len(logits), 'row')}, but the inputs have {rows * times}: take one "
                "draw at a time"
            )
        return logits.view(times, -1, *logits.shape[1:])

    @contextmanager
    def _guarded(self, rows: int, times: int) -> Iterator[None]:
        """Raise `IndivisibleBatchError` if a stochastic layer gets anything but the repeated batch."""
        undrawn = True

        def check(layer: Any, args: tuple[Any, ...]) -> None:
            nonlocal undrawn
            x = layer.rows_first(args[0])
            if undrawn and x.ndim > 2 and not _is_repeated(x, times):
                raise IndivisibleBatchError(
                    f"a layer got other inputs of shape {tuple(x.shape)} for each draw, as where tokens come "
                    "before rows: take one draw at a time"
                )
            undrawn = False
            if x.ndim < 2 or x.shape[0] % rows:
                raise IndivisibleBatchError(
                    f"a layer got {counted(x.shape[0], 'row')}, but the batch has {rows}: take one draw at a time"
                )

        with ExitStack() as hooks:
            if times > 1:
                for layer in self.layers.values():
                    hooks.callback(layer.register_forward_pre_hook(check).remove)
            yield

    def _prefix(self, batch: Mapping[str, Tensor]) -> Prefix | None:
        """Capture the part before the first stochastic layer, and that layer's input."""
        if not self.shareable:
            return None
        prefix = Prefix(self.model, list(self.layers.values()))
        self.shareable = prefix.capture(lambda: self.read(self.model, batch))
        return prefix if self.shareable else None


def _is_repeated(x: Tensor, times: int) -> bool:
    """Return whether the inputs of the first layer that draws are those of `times` draws one after the other.

    A model of one's own may have the tokens first and the rows second, and their number may be divisible too.
    """
    if len(x) % times or not x.numel():
        return True  # which the check of the rows tells
    draws = x.detach().chunk(times)
    return bool(((draws[-1] - draws[0]).abs() <= 1e-3 * float(draws[0].abs().max())).all())


class _Reached(Exception):
    """The first stochastic layer is about to run."""


class Prefix:
    """Outputs of the modules that finish before the first stochastic layer.

    It keeps those of blocks in the model's `ModuleList`s, and of modules outside of blocks whose output is one tensor
    with a row for each row of the batch (embeddings); of nested modules only the outermost.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.model, self.layers = model, list(layers)
        self.rows = 0
        self._input: Tensor | None = None
        self._products: dict[nn.Module, Any] = {}
        self._finished: list[tuple[nn.Module, Any]] = []
        self._open: list[tuple[nn.Module, int]] = []
        self._blocks = {
            block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module.children()
        }

    def capture(self, run: Callable[[], Any]) -> bool:
        """Run the model up to its first stochastic layer, and return whether there was one."""

        def enter(module: nn.Module, _args: Any) -> None:
            self._open.append((module, len(self._finished)))

        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            _, first = self._open.pop()
            del self._finished[first:]  # parts of this module: only the outermost is kept
            self._finished.append((module, output))

        def reach(layer: Any, args: tuple[Any, ...]) -> None:
            self._input = layer.rows_first(args[0])
            self.rows = self._input.shape[0]
            raise _Reached

        with ExitStack() as hooks:
            for module in self.model.modules():
                hooks.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
            for layer in self.layers:
                hooks.callback(layer.register_forward_pre_hook(reach, prepend=True).remove)
            with suppress(_Reached):
                run()
        within = {id(part) for module, _ in self._open if module in self._blocks for part in module.modules()}
        innermost = next((module for module, _ in reversed(self._open) if module in self._blocks), self.model)
        siblings = set(innermost.modules())
        self.layers = [layer for layer in self.layers if layer in siblings]
        self._finished = [
            (module, output)
            for module, output in self._finished
            if id(module) not in within and (module in self._blocks or self._has_rows(output))
        ]
        return self._input is not None

    def _has_rows(self, output: Any) -> bool:
        return isinstance(output, Tensor) and output.ndim >= 3 and output.shape[0] == self.rows

    @contextmanager
    def replayed(self, times: int) -> Iterator[None]:
        """Make each kept module return its kept output, repeated, instead of computing it."""
        queues: dict[nn.Module, deque[Any]] = {}
        for module, output in self._finished:
            queues.setdefault(module, deque()).append(output)
        with ExitStack() as restored:
            for module, outputs in queues.items():
                restored.enter_context(replaced_forward(module, self._replay(module.forward, outputs, times)))
            for layer in self.layers:
                base: Any = layer.base_layer
                restored.enter_context(replaced_forward(base, self._multiply_once(base, base.forward, times)))
            yield

    def _replay(self, forward: Callable[..., Any], outputs: deque[Any], times: int) -> Callable[..., Any]:
        def replayed(*args: Any, **kwargs: Any) -> Any:
            # Calls of the module after the first stochastic layer are computed.
            return repeat_rows(outputs.popleft(), self.rows, times) if outputs else forward(*args, **kwargs)

        return replayed

    def _multiply_once(self, base: Any, forward: Callable[..., Any], times: int) -> Callable[..., Any]:
        known = self._input

        def product(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if known is None or args or kwargs or x.shape[0] != len(known) * times:
                return forward(x, *args, **kwargs)
            if not all(torch.equal(part, known) for part in x.split(len(known))):
                return forward(x)
            if base not in self._products:
                self._products[base] = forward(known)
            return repeat_rows(self._products[base], len(known), times)

        return product


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module` compute `forward` inside the context, and afterwards what it or its class did before."""
    own = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:
            module.forward = own


def row_count(batch: Mapping[str, Tensor]) -> int:
    """Return B, the number of rows of the first tensor that has a dimension."""
    return next((len(value) for value in batch.values() if value.ndim), 1)


def repeat_rows(value: Any, rows: int, times: int) -> Any:
    """Return `value` with its tensors of `rows` rows, also in tuples, lists and mappings, repeated `times` times."""
    if times == 1:
        return value
    if isinstance(value, Tensor):
        return value.repeat(times, *[1] * (value.ndim - 1)) if value.ndim and len(value) == rows else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(repeat_rows(each, rows, times) for each in value))
    if isinstance(value, (tuple, list)):
        return type(value)(repeat_rows(each, rows, times) for each in value)
    if isinstance(value, Mapping):
        repeated = {key: repeat_rows(each, rows, times) for key, each in value.items()}
        return repeated if type(value) is dict else type(value)(repeated)  # type: ignore[call-arg]
    return value


def first_token_only(model: nn.Module) -> Any:
    """Return a context in which a classifier that pools the first token computes only that token in its last block.

    Attention mixes tokens, but the layers after it do not: from the last block's attention output on, other tokens do
    not affect the logits, and neither do their queries. They do affect hidden states and attentions, so models that
    return those are left unchanged, as are all other models, and classes of one's own, which may read every token.
    """
    base: Any = getattr(tuner_of(model), "model", model)
    config = getattr(base, "config", None)
    kind = type(base)
    is_known = kind.__module__.startswith("transformers.models.") and kind.__name__.endswith(_HEADS)
    shows_more = getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False)
    if shows_more or not is_known or getattr(config, "model_type", None) not in _POOLS_FIRST_TOKEN:
        return nullcontext()
    attention = _last_attention(getattr(base, base.base_model_prefix, None))
    return nullcontext() if attention is None else _cut(attention)


def _last_attention(body: Any) -> nn.Module | None:
    """Return the attention of the last block: its products in `self`, and what follows them in `output`."""
    blocks = getattr(getattr(body, "encoder", None), "layer", None)
    last = blocks[-1] if isinstance(blocks, nn.ModuleList) and len(blocks) else None
    attention = getattr(last, "attention", None)
    return attention if isinstance(getattr(attention, "output", None), nn.Module) else None


@contextmanager
def _cut(attention: Any) -> Iterator[None]:
    def first(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # Contiguous, so that the product does not depend on which of the weights are trained.
        return tuple(arg[:, :1].contiguous() if isinstance(arg, Tensor) and arg.ndim == 3 else arg for arg in args)

    def widened(module: nn.Module, args: tuple[Any, ...], query: Tensor) -> Tensor:
        # The attention expects a query for every token; only that of the first is read.
        return query.expand(-1, lengths[module], -1)

    def shortened(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        lengths[module] = args[0].shape[1]
        return first(module, args)

    lengths: dict[nn.Module, int] = {}
    query = getattr(getattr(attention, "self", None), "query", None)
    with ExitStack() as hooks:
        hooks.callback(attention.output.register_forward_pre_hook(first).remove)
        if isinstance(query, nn.Module):
            hooks.callback(query.register_forward_pre_hook(shortened).remove)
            hooks.callback(query.register_forward_hook(widened).remove)
        yield
