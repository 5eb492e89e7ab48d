r"""The graph of a decoder with its cache: Llama, Qwen2 and GPT-2.

The graph computes what the model of Transformers computes in evaluation mode, for new tokens behind those whose keys
and values it is given. Its inputs and outputs are named as Optimum names them, so that its users' programs run it:
`input_ids` and `position_ids` (batch, length), `attention_mask` (batch, past + length) and, for each block,
`past_key_values.0.key` and `.value` (batch, heads, past, size); `logits` (batch, length, words), and, for each block,
`present.0.key` and `.value` (batch, heads, past + length, size). A first call gives caches of length 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from onnx import TensorProto
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayeslora.export.onnx.encoders import ACTIVATIONS, HIDDEN, IDS, LOGITS, MASK, normalized, refused
from bayeslora.export.onnx.graph import Graph, Value
from bayeslora.export.onnx.layers import Part, ProductLayers
from bayeslora.export.onnx.products import array

POSITIONS = "position_ids"

_STATIC_ROTATIONS = ("default", "linear", "llama3")
"""Kinds of rotary embeddings whose frequencies do not depend on the length."""


@dataclass(frozen=True)
class Family:
    """Paths of an architecture's modules; those of a block are relative to it.

    Attributes:
        words: word embedding.
        positions: position embedding, or None if queries and keys are rotated.
        blocks: list of blocks.
        projections: query, key and value, or one layer of all three.
        attended: output layer of the attention.
        feed_forward: layers that read the normalized input: up, or gate and up.
        down: layer that follows.
        norms: before the attention and before the feed-forward network.
        norm: of the output.
        head: layer of the words' scores.
    """

    words: str
    positions: str | None
    blocks: str
    projections: tuple[str, ...]
    attended: str
    feed_forward: tuple[str, ...]
    down: str
    norms: tuple[str, str]
    norm: str
    head: str = "lm_head"


_LLAMA = Family(
    "model.embed_tokens",
    None,
    "model.layers",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    ("input_layernorm", "post_attention_layernorm"),
    "model.norm",
)
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "GPT2LMHeadModel": Family(
        "transformer.wte",
        "transformer.wpe",
        "transformer.h",
        ("attn.c_attn",),
        "attn.c_proj",
        ("mlp.c_fc",),
        "mlp.c_proj",
        ("ln_1", "ln_2"),
        "transformer.ln_f",
    ),
}
"""Architectures that can be written, by the name of their class in Transformers."""


def is_decoder(model: nn.Module) -> bool:
    """Return whether the model is of an architecture in `FAMILIES`."""
    return type(model).__name__ in FAMILIES


def check_decoder(model: nn.Module) -> None:
    """Raise `BayesLoraError` for a setting that the graph does not have."""
    config = cast(Any, model).config
    check_activation(activation_name(config))
    if getattr(config, "use_sliding_window", False):
        raise refused("attention", "sliding", ["full"])
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in _STATIC_ROTATIONS:
        raise refused("rotary embedding", kind, _STATIC_ROTATIONS)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) or not getattr(config, "scale_attn_weights", True):
        raise refused("attention", "scaled by layer or not at all", ["scaled by the size of a head"])


def check_activation(activation: str) -> None:
    """Raise `BayesLoraError` for an activation that `activated` lacks."""
    if activation != "silu" and activation not in ACTIVATIONS:
        raise refused("activation", activation, ["silu", *sorted(ACTIVATIONS)])


def activation_name(config: Any) -> str:
    """Return the name of the feed-forward network's activation."""
    return str(config.activation_function if config.model_type == "gpt2" else config.hidden_act)


def fed_forward(
    graph: Graph, layers: ProductLayers, name: str, paths: Sequence[str], down: str, activation: str, rows: str
) -> str:
    """Add a feed-forward network under this name: layers, of which the second is a factor, and the layer `down`."""
    parts = [Part(path, share=layers.width(path)) for path in paths]
    x, *factors = layers.linears(graph, name, parts, rows)
    if activation == "silu":
        x = graph("Mul", x, graph("Sigmoid", x, name=f"{paths[0]}.gate"), name=f"{paths[0]}.activation")
    else:
        operator, attributes = ACTIVATIONS[activation]
        x = graph(operator, x, name=f"{paths[0]}.activation", **attributes)
    for factor in factors:
        x = graph("Mul", x, factor, name=f"{name}.gated")
    return layers.linear(graph, down, x)


def tokens_before(graph: Graph, keys: str) -> tuple[str, str, str]:
    """Add the places of new tokens and of all, past `keys` included, and whether one of all is later than a new one.

    Returns:
        (length,), (past + length,) and (length, past + length); sizes are `length` and `total.length`, vectors of one.
    """
    past = graph("Shape", keys, name="past.length", start=2, end=3)
    length = graph("Shape", IDS, name="length", start=1, end=2)
    total = graph("Add", past, length, name="total.length")
    ends = [graph("Squeeze", each, name=f"{each}.number") for each in (past, total)]
    own = graph("Range", *ends, graph.integer(1), name="attention.own")
    seen = graph("Range", graph.integer(0), ends[1], graph.integer(1), name="attention.seen")
    rows = graph("Unsqueeze", own, graph.integers(1), name="attention.rows")
    return own, seen, graph("Greater", seen, rows, name="attention.is_later")


def tokens_apart(graph: Graph, rows: str, name: str) -> None:
    """Add rows as an output (batch, length, width) of this name."""
    sizes = graph("Concat", "shape", graph.integers(-1), name=f"{name}.sizes", axis=0)
    graph("Reshape", rows, sizes, name=name)


def by_head(graph: Graph, x: str, path: str, sizes: str) -> str:
    """Add the move of rows to (batch, heads, length, size); `sizes` is (batch, length, -1, size)."""
    split = graph("Reshape", x, sizes, name=f"{path}.heads")
    return graph("Transpose", split, name=f"{path}.by_head", perm=[0, 2, 1, 3])


def by_row(graph: Graph, heads: str, width: int, path: str) -> str:
    """Add the move back to rows of this width."""
    tokens = graph("Transpose", heads, name=f"{path}.by_token", perm=[0, 2, 1, 3])
    return graph("Reshape", tokens, graph.integers(-1, width), name=f"{path}.rows")


def cache_sizes(config: Any) -> tuple[int, int, int]:
    """Return the number of blocks, of heads with keys and values, and the size of a head."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads), int(size)


class Decoder:
    """Writes a model with merged weights into a graph; `layers` writes linear layers and the word embedding."""

    def __init__(self, model: PreTrainedModel, layers: ProductLayers) -> None:
        self.model, self.layers = model, layers
        self.config: Any = model.config
        self.family = FAMILIES[type(model).__name__]
        self.heads = int(self.config.num_attention_heads)
        self.count, self.groups, self.size = cache_sizes(self.config)
        self.graph = Graph()
        self._norm = partial(normalized, self.graph, model)

    @property
    def inputs(self) -> list[Value]:
        """Names, types and axes of the graph's inputs."""
        first = [Value(name, TensorProto.INT64, ["batch", "length"]) for name in (IDS, POSITIONS)]
        mask = Value(MASK, TensorProto.INT64, ["batch", "total"])
        return [first[0], mask, first[1], *self._caches("past_key_values", "past")]

    @property
    def outputs(self) -> list[Value]:
        """Names, types and axes of the graph's outputs."""
        logits = Value(LOGITS, TensorProto.FLOAT, ["batch", "length", int(self.config.vocab_size)])
        return [logits, *self._caches("present", "total")]

    def _caches(self, name: str, length: str) -> list[Value]:
        axes: list[str | int] = ["batch", self.groups, length, self.size]
        names = [f"{name}.{block}.{kind}" for block in range(self.count) for kind in ("key", "value")]
        return [Value(each, TensorProto.FLOAT, axes) for each in names]

    def write(self) -> Graph:
        """Return the graph."""
        graph, family = self.graph, self.family
        shape = graph("Shape", IDS, name="shape")
        sizes = graph("Concat", shape, graph.integers(-1, self.size), name="sizes", axis=0)
        self._by_head = partial(by_head, graph, sizes=sizes)
        self._bias = self._attention_bias()
        if family.positions is None:
            self._find_rotations()
        x = self._embeddings()
        for number in range(self.count):
            x = self._block(f"{family.blocks}.{number}", number, x)
        x = self.layers.linear(graph, family.head, self._norm(family.norm, x))
        tokens_apart(graph, x, LOGITS)
        return graph

    def _embeddings(self) -> str:
        """Return the embedded tokens as rows."""
        graph, family = self.graph, self.family
        x = self.layers.embedding(graph, family.words, IDS)
        if family.positions is not None:
            weight = array(cast(Tensor, self.model.get_submodule(family.positions).weight))
            table = graph.constant(f"{family.positions}.weight", weight)
            places = graph("Gather", table, POSITIONS, name=family.positions)
            x = graph("Add", x, places, name=f"{family.positions}.sum")
        return graph("Reshape", x, graph.integers(-1, int(self.config.hidden_size)), name="rows")

    def _attention_bias(self) -> str:
        """Return what is added to the scores, (batch, 1, length, past + length): 0, or a large negative number.

        A token sees those that the mask shows, up to itself.
        """
        graph = self.graph
        _, _, is_later = tokens_before(graph, "past_key_values.0.key")
        batch = graph("Shape", IDS, name="batch.size", start=0, end=1)
        sizes = batch, graph.integers(self.heads), "length", "total.length"
        self._score_sizes = graph("Concat", *sizes, name="scores.sizes", axis=0)
        is_padding = graph("Equal", MASK, graph.integer(0), name="attention.is_padding")
        is_padding = graph("Unsqueeze", is_padding, graph.integers(1, 2), name="attention.padding")
        hidden = graph("Or", is_padding, is_later, name="attention.is_hidden")
        return graph("Where", hidden, graph.number(HIDDEN), graph.number(0.0), name="attention.bias")

    def _find_rotations(self) -> None:
        """Add cosine and sine of each position's angles, (batch, 1, length, size)."""
        graph, rotary = self.graph, cast(Any, self.model).model.rotary_emb
        frequencies = graph.constant("rotary.frequencies", array(cast(Tensor, rotary.inv_freq)))
        places = graph("Cast", POSITIONS, name="rotary.places", to=TensorProto.FLOAT)
        places = graph("Unsqueeze", places, graph.integers(1, 3), name="rotary.columns")
        half = graph("Mul", places, frequencies, name="rotary.halves")
        angles = graph("Concat", half, half, name="rotary.angles", axis=3)
        scale = float(rotary.attention_scaling)
        found = []
        for operator in ("Cos", "Sin"):
            values = graph(operator, angles, name=f"rotary.{operator.lower()}")
            found.append(values if scale == 1 else graph("Mul", values, graph.number(scale), name=f"{values}.scaled"))
        self._cos, self._sin = found

    def _block(self, path: str, number: int, x: str) -> str:
        graph, family = self.graph, self.family
        attention_norm, second_norm = (f"{path}.{name}" for name in family.norms)
        attended = self._attention(path, number, self._norm(attention_norm, x))
        x = graph("Add", x, attended, name=f"{path}.attended")
        rows = self._norm(second_norm, x)
        paths, down = [f"{path}.{name}" for name in family.feed_forward], f"{path}.{family.down}"
        activation, name = activation_name(self.config), f"{path}.feed_forward"
        fed = fed_forward(graph, self.layers, name, paths, down, activation, rows)
        return graph("Add", x, fed, name=f"{path}.output")

    def _attention(self, path: str, number: int, x: str) -> str:
        """Return softmax(q k^T / sqrt(d)) v of every head, through the output layer."""
        graph = self.graph
        q, k, v = self._projected(path, x)
        path = f"{path}.attention"
        if self.family.positions is None:
            q, k = (self._rotated(f"{path}.{name}", each) for name, each in (("query", q), ("key", k)))
        k, v = (
            graph("Concat", f"past_key_values.{number}.{kind}", new, name=f"present.{number}.{kind}", axis=2)
            for kind, new in (("key", k), ("value", v))
        )
        is_grouped = self.groups != self.heads
        if is_grouped:
            q = graph("Reshape", q, graph.integers(0, self.groups, -1, self.size), name=f"{path}.grouped")
        turned = graph("Transpose", k, name=f"{path}.turned", perm=[0, 1, 3, 2])
        scores = graph("MatMul", q, turned, name=f"{path}.products")
        if is_grouped:
            scores = graph("Reshape", scores, self._score_sizes, name=f"{path}.by_head")
        scores = graph("Add", scores, self._bias, name=f"{path}.scores")
        shares = graph("Softmax", scores, name=f"{path}.shares", axis=-1)
        if is_grouped:
            sizes = graph("Shape", q, name=f"{path}.sizes", start=0, end=3)
            sizes = graph("Concat", sizes, graph.integers(-1), name=f"{path}.share_sizes", axis=0)
            shares = graph("Reshape", shares, sizes, name=f"{path}.by_group")
        mixed = graph("MatMul", shares, v, name=f"{path}.mixed")
        if is_grouped:
            sizes = graph.integers(0, self.heads, -1, self.size)
            mixed = graph("Reshape", mixed, sizes, name=f"{path}.mixed_by_head")
        output = path.removesuffix("attention") + self.family.attended
        rows = partial(by_row, graph, width=self.heads * self.size, path=path)
        return self.layers.linear(graph, output, mixed, before=rows)

    def _projected(self, path: str, x: str) -> list[str]:
        """Return query, key and value by head, (batch, heads, length, size)."""
        graph, factor, shares = self.graph, self.size**-0.5, (self.heads, self.groups, self.groups)
        paths = [f"{path}.{name}" for name in self.family.projections]
        if len(paths) > 1:
            parts = [
                Part(each, factor if number == 0 else 1.0, share)
                for number, (each, share) in enumerate(zip(paths, shares, strict=True))
            ]
            return self.layers.linears(graph, f"{path}.projections", parts, x, after=self._by_head)
        (found,) = self.layers.linears(graph, paths[0], [Part(paths[0])], x, after=self._by_head)
        names = [f"{path}.{kind}" for kind in ("query", "key", "value")]
        q, k, v = graph.several("Split", found, graph.integers(*shares), outputs=names, axis=1)
        return [graph("Mul", q, graph.number(factor), name=f"{path}.query.scaled"), k, v]

    def _rotated(self, path: str, x: str) -> str:
        """Return x cos + (-x2, x1) sin of the halves x1 and x2 of every head."""
        graph = self.graph
        first, second = graph.several("Split", x, outputs=[f"{path}.first", f"{path}.second"], axis=3, num_outputs=2)
        negative = graph("Neg", second, name=f"{path}.negative")
        turned = graph("Concat", negative, first, name=f"{path}.quarter_turn", axis=3)
        cosine = graph("Mul", x, self._cos, name=f"{path}.cosine")
        sine = graph("Mul", turned, self._sin, name=f"{path}.sine")
        return graph("Add", cosine, sine, name=f"{path}.rotated")
