"""The encoder or the decoder of an encoder-decoder as nodes of a graph: what all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from transformers import PreTrainedModel

from bayeslora.export.onnx.decoders import by_head, by_row, fed_forward
from bayeslora.export.onnx.encoders import HIDDEN, IDS, normalized
from bayeslora.export.onnx.graph import Graph
from bayeslora.export.onnx.layers import Part, ProductLayers

KINDS = ("key", "value")
OWN, READ, FORWARD = "self-attention", "cross-attention", "feed-forward"
"""Parts of a block, each with a norm and a sum."""


class Stack(ABC):
    """The encoder or the decoder in a graph of its own; `x` is always rows, a token each.

    Args:
        model: with merged weights.
        layers: writes linear layers and the word embedding.
        root: `"encoder"` or `"decoder"`.

    Attributes:
        activation: the configuration's name for the feed-forward network's activation.
        prefix: of the paths of all modules but the head.
        final_norm: name of the norm of the output, or None.
        is_pre_norm: whether norms are before what is added to the rows, or after the sum.
        projections: names of an attention's layers: query, key, value and output.
    """

    activation: ClassVar[str]
    prefix: ClassVar[str]
    final_norm: ClassVar[str | None]
    is_pre_norm: ClassVar[bool]
    projections: ClassVar[dict[str, str]]

    def __init__(self, model: PreTrainedModel, layers: ProductLayers, root: str) -> None:
        self.model, self.layers, self.root, self.graph = model, layers, root, Graph()
        self.config: Any = model.config
        self.count, self.heads, self.size = self.sizes(model.config, root)
        self.shape = self.graph("Shape", IDS, name="shape")
        self._sizes: dict[int, str] = {}
        self.norm = partial(normalized, self.graph, model)

    @staticmethod
    @abstractmethod
    def sizes(config: Any, root: str) -> tuple[int, int, int]:
        """Return the number of blocks, of heads, and the size of a head, of the encoder or the decoder."""

    @abstractmethod
    def place(self, root: str, number: int, kind: str) -> tuple[str, str]:
        """Return the path of a part of the block with this number, and of its norm."""

    @property
    @abstractmethod
    def feed_forward_layers(self) -> tuple[tuple[str, ...], str]:
        """Names of the feed-forward network's first layers, of which the second is a factor, and of the last."""

    @property
    def scale(self) -> float:
        """Factor of the queries."""
        return 1.0

    def positioned(self, x: str, places: str) -> str:
        """Return the embedded tokens (batch, length, width), changed by where they are."""
        return x

    def biased(self, bias: str, own: str, seen: str) -> str:
        """Return what is added to the scores of tokens at these places: the bias of the mask, perhaps with another."""
        return bias

    def finished(self, x: str) -> str:
        """Return the rows as they leave the last block."""
        return x if self.final_norm is None else self.norm(f"{self.prefix}{self.root}.{self.final_norm}", x)

    def scored(self, x: str) -> str:
        """Return the words' scores of each row."""
        return self.layers.linear(self.graph, "lm_head", x)

    def embedded(self, places: str) -> str:
        """Return the embedded tokens."""
        x = self.positioned(self.layers.embedding(self.graph, f"{self.prefix}shared", IDS), places)
        return self.graph("Reshape", x, self.graph.integers(-1, int(self.config.d_model)), name="rows")

    def padding(self, mask: str) -> str:
        """Return what is added to the scores for a mask (batch, source): 0, or a large negative number."""
        graph = self.graph
        is_padding = graph("Equal", mask, graph.integer(0), name=f"{mask}.is_padding")
        is_padding = graph("Unsqueeze", is_padding, graph.integers(1, 2), name=f"{mask}.padding")
        return graph("Where", is_padding, graph.number(HIDDEN), graph.number(0.0), name=f"{mask}.bias")

    def read(self, number: int, x: str) -> list[str]:
        """Return the keys and values of the text, whose encoded rows are `x`, for a block of the decoder."""
        _, heads, _ = self.sizes(self.config, "decoder")
        return self._projected(self.place("decoder", number, READ)[0], "kv", x, heads)

    def self_attention(self, number: int, x: str, bias: str, past: Sequence[str] = ()) -> str:
        """Return the rows with the attention added; keys and values are behind those of the past."""
        path, norm = self.place(self.root, number, OWN)
        q, *found = self._projected(path, "qkv", self._read_by_part(norm, x), self.heads)
        if past:
            found = [
                self.graph("Concat", before, new, name=before.replace("past_key_values", "present"), axis=2)
                for before, new in zip(past, found, strict=True)
            ]
        return self._added(norm, x, self._attended(path, q, found, bias))

    def cross_attention(self, number: int, x: str, bias: str) -> str:
        """Return the rows with the attention to the text that was read added."""
        path, norm = self.place(self.root, number, READ)
        (q,) = self._projected(path, "q", self._read_by_part(norm, x), self.heads)
        found = [f"past_key_values.{number}.encoder.{kind}" for kind in KINDS]
        return self._added(norm, x, self._attended(path, q, found, bias))

    def feed_forward(self, number: int, x: str) -> str:
        """Return the rows with the feed-forward network added."""
        path, norm = self.place(self.root, number, FORWARD)
        names, last = self.feed_forward_layers
        paths, down = [f"{path}.{name}" for name in names], f"{path}.{last}"
        activation: str = getattr(self.config, self.activation)
        rows = self._read_by_part(norm, x)
        fed = fed_forward(self.graph, self.layers, f"{path}.inputs", paths, down, activation, rows)
        return self._added(norm, x, fed)

    def _read_by_part(self, norm: str, x: str) -> str:
        """Return the rows as a part of a block reads them."""
        return self.norm(norm, x) if self.is_pre_norm else x

    def _added(self, norm: str, x: str, made: str) -> str:
        """Return the rows with what a part of a block makes of them."""
        total = self.graph("Add", x, made, name=f"{norm}.sum")
        return total if self.is_pre_norm else self.norm(norm, total)

    def _projected(self, path: str, names: str, x: str, heads: int) -> list[str]:
        """Return the outputs of the layers `q`, `k` or `v` by head, (batch, heads, length, size)."""
        parts = [
            Part(f"{path}.{self.projections[name]}", self.scale if name == "q" else 1.0, share=heads) for name in names
        ]
        size = self.layers.width(parts[0].path) // heads
        return self.layers.linears(self.graph, f"{path}.{names}", parts, x, after=partial(self._by_head, size=size))

    def _attended(self, path: str, q: str, found: Sequence[str], bias: str) -> str:
        """Return softmax(q k^T + bias) v of every head, through the output layer."""
        graph, (k, v) = self.graph, found
        turned = graph("Transpose", k, name=f"{path}.turned", perm=[0, 1, 3, 2])
        scores = graph("Add", graph("MatMul", q, turned, name=f"{path}.products"), bias, name=f"{path}.scores")
        mixed = graph("MatMul", graph("Softmax", scores, name=f"{path}.shares", axis=-1), v, name=f"{path}.mixed")
        rows = partial(by_row, graph, width=self.heads * self.size, path=path)
        return self.layers.linear(graph, f"{path}.{self.projections['o']}", mixed, before=rows)

    def _by_head(self, x: str, path: str, size: int) -> str:
        if size not in self._sizes:
            ends = self.graph.integers(-1, size)
            self._sizes[size] = self.graph("Concat", self.shape, ends, name=f"sizes.{size}", axis=0)
        return by_head(self.graph, x, path, self._sizes[size])
