"""The forward pass of an integer encoder with a classifier, without what does not change its answer.

- Padding is left out: tokens are rows (n, width), and only the attention puts them back in their places.
- The classifier reads the first token, so the last block computes its query, and all that follows, for that one only.
- Query, key and value are computed side by side (`JointLinear`).

A call that asks for more than the logits, such as a loss or the hidden states, runs the model's own forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeslora.quantization import WIDTHS
from bayeslora.runtime.encoders import FAMILIES, Family
from bayeslora.runtime.integer_linear import (
    CACHE_BLOCK,
    Bounds,
    IntegerLinear,
    StaticQuantizer,
    are_few,
    as_codes,
    rounded,
    zero_point_for,
)

_UNQUANTIZED = WIDTHS[-1]
_FIRST_INPUTS = ("input_ids", "attention_mask")
"""Those that every architecture takes by position."""


def skip_padding(model: PreTrainedModel) -> None:
    """Let calls for the logits of a known encoder with a classifier leave out what does not change them."""
    family = FAMILIES.get(type(model).__name__)
    if family is not None and not getattr(model.config, "is_decoder", False):
        setattr(model, "forward", ClassifierForward(model))  # noqa: B010 - a method for the type checker


class ClassifierForward:
    """The forward pass of one model of an architecture in `FAMILIES`, in evaluation mode."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.family = model, FAMILIES[type(model).__name__]
        self._inputs = {*_FIRST_INPUTS, "token_type_ids"} & set(self.__signature__.parameters)
        self._made_for: torch.device | None = None
        self._blocks: list[_Block] = []

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's inputs, which callers read."""
        return inspect.signature(type(self.model).forward.__get__(self.model))

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without caches, which a copy makes again."""
        return {**self.__dict__, "_made_for": None, "_blocks": []}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(_FIRST_INPUTS, args, strict=False)) | kwargs
        given = {name: value for name, value in given.items() if value is not None}
        if len(args) > len(_FIRST_INPUTS) or not self._is_for_logits(given):
            return type(self.model).forward(self.model, *args, **kwargs)
        return SequenceClassifierOutput(logits=self._logits(**given))

    def _is_for_logits(self, given: dict[str, Any]) -> bool:
        """Return whether the call has ids and wants nothing but the logits."""
        config: Any = self.model.config
        if given.pop("return_dict", config.return_dict) is False or self.model.training:
            return False
        if "input_ids" not in given or not set(given) <= self._inputs or torch.compiler.is_compiling():
            return False
        mask = given.get("attention_mask")
        if config.output_hidden_states or config.output_attentions:
            return False
        return mask is None or (mask.dim() == 2 and bool(mask.all() or mask.any(1).all()))

    def _logits(self, input_ids: Tensor, attention_mask: Tensor | None = None, **types: Tensor) -> Tensor:
        family = self.family
        embeddings = self.model.get_submodule(f"{family.encoder}.embeddings")
        places = _Places(input_ids, attention_mask)
        x = places.rows(embeddings(input_ids=input_ids, **types))
        for block in self._prepared(input_ids.device):
            x = block(x, places)
        for path, activation in family.head:
            x = self.model.get_submodule(path)(x)
            x = x if activation is None else getattr(torch, activation.lower())(x)
        return x

    def _prepared(self, device: torch.device) -> list[_Block]:
        if self._made_for != device:
            self._made_for, family = device, self.family
            *blocks, last = self.model.get_submodule(f"{family.encoder}.{family.blocks}").children()
            heads = int(cast(Any, self.model.config).num_attention_heads)
            self._blocks = [*(_Block(block, family, heads) for block in blocks), _LastBlock(last, family, heads)]
        return self._blocks


class _Places:
    """Places of the tokens of a batch, and the rows among them.

    The first token of each text is a row, even if it is hidden, because the classifier reads it.

    Args:
        ids: (batch, length).
        mask: (batch, length), 0 for padding; None without any.
    """

    def __init__(self, ids: Tensor, mask: Tensor | None) -> None:
        self.shape = ids.shape
        self.kept: Tensor | None = None
        self.bias: Tensor | None = None
        visible = None if mask is None else mask != 0
        if visible is None or bool(visible.all()):
            self.first = torch.arange(0, ids.numel(), ids.shape[1], device=ids.device)
            return
        self.bias = torch.zeros(visible.shape, device=ids.device).masked_fill_(~visible, -torch.inf)[:, None, None]
        is_row = visible.clone()
        is_row[:, 0] = True
        flat = is_row.view(-1)
        self.kept = flat.nonzero().view(-1)
        # Padding reads the row of a token before it, which the attention gives no weight.
        self.row_of = flat.cumsum(0).sub_(1)
        self.first = self.row_of.view(visible.shape)[:, 0]

    def rows(self, x: Tensor) -> Tensor:
        """Return the tokens of (batch, length, width) as rows (n, width)."""
        flat = x.reshape(-1, x.shape[-1])
        return flat if self.kept is None else flat.index_select(0, self.kept)

    def in_place(self, rows: Tensor) -> Tensor:
        """Return rows (n, width) as (batch, length, width)."""
        found = rows if self.kept is None else rows.index_select(0, self.row_of)
        return found.view(*self.shape, -1)


class _Block:
    """A block of the encoder, on rows: attention and feed-forward network, at the paths of its family."""

    joint_layers: tuple[str, ...] = ("query", "key", "value")
    """Layers that are computed together."""

    def __init__(self, block: nn.Module, family: Family, heads: int) -> None:
        def part(path: str) -> Any:
            return block.get_submodule(path)

        self.heads = heads
        self.query, self.key, self.value, self.mixed = (part(path) for path in family.attention)
        self.inner, self.outer = (part(path) for path in family.feed_forward)
        self.first_norm, self.second_norm = (part(path) for path in family.norms)
        self.activation = part(family.activation)
        self.side_by_side: list[Any] = [getattr(self, name) for name in self.joint_layers]
        self.joint = JointLinear(self.side_by_side) if JointLinear.fit(self.side_by_side) else None

    def __call__(self, x: Tensor, places: _Places) -> Tensor:
        """Return the rows after the block."""
        q, k, v = self._projected(x, places)
        return self._finished(places.rows(self._attention(q, k, v, places)), x)

    def _projected(self, x: Tensor, places: _Places) -> tuple[Tensor, ...]:
        """Return the outputs of these layers, each (batch, heads, length, size)."""
        layers = self.side_by_side
        found = torch.cat([layer(x) for layer in layers], 1) if self.joint is None else self.joint(x).to(x.dtype)
        return self._by_head(places.in_place(found), len(layers))

    def _finished(self, attended: Tensor, x: Tensor) -> Tensor:
        """Return rows after the attention's output layer and the feed-forward network."""
        x = self.first_norm(self.mixed(attended).add_(x))
        return cast(Tensor, self.second_norm(self.outer(self.activation(self.inner(x))).add_(x)))

    def _by_head(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """Return `count` tensors (batch, heads, length, size) of (batch, length, count times width)."""
        return x.view(*x.shape[:2], count, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()

    @staticmethod
    def _attention(q: Tensor, k: Tensor, v: Tensor, places: _Places) -> Tensor:
        """Return softmax(q k^T / sqrt(size)) v, (batch, length, width)."""
        bias = None if places.bias is None else places.bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


class _LastBlock(_Block):
    """The block after which only the first tokens are read."""

    joint_layers = ("key", "value")

    def __call__(self, x: Tensor, places: _Places) -> Tensor:
        """Return the rows of the first tokens (batch, width) after the block."""
        first = x.index_select(0, places.first)
        (q,) = self._by_head(self.query(first)[:, None], 1)
        k, v = self._projected(x, places)
        return self._finished(self._attention(q, k, v, places).squeeze(1), first)


class JointLinear:
    r"""The outputs of several `IntegerLinear` with the same input, such as query, key and value, side by side.

    They must be layers that `fit`.

    Three layers take three times as many calls as one, and for one sentence calls take longer than products. Here the
    calls are shared: inputs are rounded to all grids at once, and the updates of all layers are one product with

    $$ \begin{pmatrix} B_q & & \\ & B_k & \\ & & B_v \end{pmatrix}. $$

    Only the products with $W_0$ and $A$ stay apart, because each layer has its own grid for the input.
    """

    def __init__(self, layers: Sequence[IntegerLinear]) -> None:
        self.layers = layers
        self.out_features = sum(layer.out_features for layer in layers)
        device = layers[0].codes.device
        column = (-1, 1, 1)
        self.input_steps = torch.tensor([layer.input.step for layer in layers], device=device).view(column)
        self.input_bounds = _bounds([layer.input for layer in layers], [1] * len(layers), device, column)
        with_rank = [layer for layer in layers if layer.rank]
        counts = [layer.rank for layer in with_rank]
        self.rank = sum(counts)
        if with_rank:
            self.after_a = _bounds([layer.after_a for layer in with_rank], counts, device)
            self.after_e = _bounds([layer.after_e for layer in with_rank], counts, device)
            self.diagonal = torch.cat([layer.diagonal for layer in with_rank])
            empty = torch.zeros(0, device=device)
            parts = (layer.up if layer.rank else empty.new_zeros(0, layer.out_features) for layer in layers)
            self.up = torch.block_diag(*parts)
        widths = [layer.out_features for layer in layers]
        self.output_bounds = _bounds([layer.output for layer in layers], widths, device)
        steps = torch.tensor([layer.output.step for layer in layers], device=device)
        self.output_steps = steps.repeat_interleave(torch.tensor(widths, device=device))

    @staticmethod
    def fit(layers: Sequence[object]) -> bool:
        """Return whether the layers have integer products and quantized outputs, and round the same things inside."""
        learned = [each for each in layers if isinstance(each, IntegerLinear) and each.is_learned and each.takes_codes]
        if len(learned) < len(layers) or any(layer.output.bits == _UNQUANTIZED for layer in learned):
            return False
        with_rank = [layer for layer in learned if layer.rank]
        kinds = {(layer.after_a.bits == _UNQUANTIZED, layer.after_e.bits == _UNQUANTIZED) for layer in with_rank}
        return len(kinds) <= 1 and all(layer.is_stacked for layer in with_rank)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the layers' outputs side by side, (n, sum of d_out), float32, for rows (n, d_in)."""
        rows = rows.float()
        block = max(1, CACHE_BLOCK // (len(self.layers) * rows.shape[1]))
        if rows.device.type != "cpu" or rows.shape[0] <= block:
            return self._product(rows)
        return torch.cat([self._product(part) for part in rows.split(block)])

    def _product(self, rows: Tensor) -> Tensor:
        if are_few(rows):
            found = [layer.few_rows_sums(rows) for layer in self.layers]
        else:
            steps = rounded(self.input_bounds, torch.div(rows, self.input_steps))
            codes = as_codes(steps, zero_point_for(rows))  # on each layer's grid, (layers, n, d_in)
            found = [layer.sums_of_codes(part) for layer, part in zip(self.layers, codes, strict=True)]
        joint = torch.cat([part[:, : layer.out_features] for layer, part in zip(self.layers, found, strict=True)], 1)
        if self.rank:
            parts = zip(self.layers, found, strict=True)
            hidden = torch.cat([part[:, layer.out_features :] for layer, part in parts if layer.rank], 1)
            low = rounded(self.after_e, rounded(self.after_a, hidden).mul_(self.diagonal))
            joint = joint.addmm_(low, self.up)
        return rounded(self.output_bounds, joint).mul_(self.output_steps)


def _bounds(
    grids: Sequence[StaticQuantizer], counts: Sequence[int], device: torch.device, shape: Sequence[int] = (-1,)
) -> Bounds | None:
    """Return the lowest and the highest code, `counts` times for each grid; None if the grids round nothing.

    Numbers instead of tensors if all grids have the same, because clamping to them takes a fraction of the time.
    """
    if any(grid.bits == _UNQUANTIZED for grid in grids):
        return None
    if len({grid.level for grid in grids}) == 1:
        return -float(grids[0].level), float(grids[0].level)
    levels = [float(grid.level) for grid, count in zip(grids, counts, strict=True) for _ in range(count)]
    highest = torch.tensor(levels, device=device).view(*shape)
    return -highest, highest
