r"""Families of encoder-decoders, and in what they differ: T5 and mT5; BART, mBART and Pegasus.

T5's score is $q k^\top + t_{k - q}$, without a scale. The bias $t$ of a distance is looked up in a table, because all
distances beyond `relative_attention_max_distance` share one. The others scale the queries and embed the positions.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from bayeslora.export.onnx.products import array
from bayeslora.export.onnx.seq2seq_stack import FORWARD, OWN, READ, Stack


class T5Stack(Stack):
    """The encoder or the decoder of T5 or mT5."""

    activation = "dense_act_fn"
    prefix = ""
    final_norm = "final_layer_norm"
    is_pre_norm = True
    projections = {name: name for name in "qkvo"}

    @staticmethod
    def sizes(config: Any, root: str) -> tuple[int, int, int]:
        count = config.num_layers if root == "encoder" else config.num_decoder_layers
        return int(count), int(config.num_heads), int(config.d_kv)

    def place(self, root: str, number: int, kind: str) -> tuple[str, str]:
        names = {OWN: "SelfAttention", READ: "EncDecAttention", FORWARD: "DenseReluDense"}
        order = (OWN, FORWARD) if root == "encoder" else (OWN, READ, FORWARD)
        path = f"{root}.block.{number}.layer.{order.index(kind)}"
        return f"{path}.{names[kind]}", f"{path}.layer_norm"

    @property
    def feed_forward_layers(self) -> tuple[tuple[str, ...], str]:
        return ("wi_0", "wi_1") if self.config.is_gated_act else ("wi",), "wo"

    def biased(self, bias: str, own: str, seen: str) -> str:
        """Return the bias of the mask with the learned bias of each distance, (heads, own, seen)."""
        graph, furthest = self.graph, int(self.config.relative_attention_max_distance)
        attention = self.model.get_submodule(self.place(self.root, 0, OWN)[0])
        table = graph.constant(f"{self.root}.distances", _table(attention, furthest))
        rows = graph("Unsqueeze", own, graph.integers(1), name="distances.rows")
        apart = graph("Sub", seen, rows, name="distances.apart")
        ends = graph.integer(-furthest), graph.integer(furthest)
        apart = graph("Clip", apart, *ends, name="distances.clipped")
        columns = graph("Add", apart, ends[1], name="distances.columns")
        found = graph("Gather", table, columns, name="distances", axis=1)
        return graph("Add", bias, found, name="attention.bias")

    def scored(self, x: str) -> str:
        """Return the words' scores of each row, of a tied head from rows that are scaled."""
        if getattr(self.config, "scale_decoder_outputs", False):
            x = self.graph("Mul", x, self.graph.number(self.config.d_model**-0.5), name="decoder.scaled")
        return super().scored(x)


@torch.no_grad()
def _table(attention: Any, furthest: int) -> np.ndarray[Any, Any]:
    """Return the bias of the distances -furthest to furthest, (heads, 2 furthest + 1)."""
    buckets = attention._relative_position_bucket(
        torch.arange(-furthest, furthest + 1),
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return array(attention.relative_attention_bias(buckets).T)


class BartStack(Stack):
    """The encoder or the decoder of BART.

    Attributes:
        embedding_norm: name of the norm of the embedded tokens, or None.
    """

    activation = "activation_function"
    prefix = "model."
    embedding_norm: ClassVar[str | None] = "layernorm_embedding"
    final_norm: ClassVar[str | None] = None
    is_pre_norm = False
    projections = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    feed_forward_layers = (("fc1",), "fc2")

    @staticmethod
    def sizes(config: Any, root: str) -> tuple[int, int, int]:
        count, heads = (int(getattr(config, f"{root}_{name}")) for name in ("layers", "attention_heads"))
        return count, heads, int(config.d_model) // heads

    def place(self, root: str, number: int, kind: str) -> tuple[str, str]:
        path = f"model.{root}.layers.{number}"
        if kind == FORWARD:
            return path, f"{path}.final_layer_norm"
        path = f"{path}.{'self_attn' if kind == OWN else 'encoder_attn'}"
        return path, f"{path}_layer_norm"

    @property
    def scale(self) -> float:
        return float(self.size**-0.5)

    def positioned(self, x: str, places: str) -> str:
        """Return the embedded tokens, scaled if the model does so, with the embeddings of their positions."""
        graph, path = self.graph, f"model.{self.root}.embed_positions"
        if self.config.scale_embedding:
            x = graph("Mul", x, graph.number(math.sqrt(self.config.d_model)), name="model.shared.scaled")
        module: Any = self.model.get_submodule(path)
        rows = array(module.weight)[getattr(module, "offset", 0) :]
        found = graph("Gather", graph.constant(f"{path}.weight", rows), places, name=path)
        x = graph("Add", x, found, name=f"{path}.sum")
        return x if self.embedding_norm is None else self.norm(f"model.{self.root}.{self.embedding_norm}", x)

    def scored(self, x: str) -> str:
        """Return the words' scores of each row, with their bias if there is one."""
        scores, bias = super().scored(x), array(cast(Tensor, self.model.final_logits_bias))
        if not bias.any():
            return scores
        return self.graph("Add", scores, self.graph.constant("final_logits_bias", bias), name="lm_head.biased")


class MBartStack(BartStack):
    """The encoder or the decoder of mBART, which is BART with its norms before what they norm."""

    final_norm = "layer_norm"
    is_pre_norm = True


class PegasusStack(MBartStack):
    """The encoder or the decoder of Pegasus, which is mBART without a norm of the embedded tokens."""

    embedding_norm = None


FAMILIES: dict[str, type[Stack]] = {
    "BartForConditionalGeneration": BartStack,
    "MBartForConditionalGeneration": MBartStack,
    "MT5ForConditionalGeneration": T5Stack,
    "PegasusForConditionalGeneration": PegasusStack,
    "T5ForConditionalGeneration": T5Stack,
}
"""Architectures that can be written, by the name of their class in Transformers."""
