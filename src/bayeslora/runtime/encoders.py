"""Encoders with a classifier: where their modules are, for code that computes them part by part."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Family:
    """Paths of an architecture's modules; those of a block are relative to it.

    Attributes:
        encoder: the part without the classifier.
        blocks: list of blocks, relative to the encoder.
        attention: query, key, value and output.
        feed_forward: the two layers.
        norms: after the attention and after the feed-forward network.
        activation: between the feed-forward network's layers.
        head: layers of the classifier, each with the activation that follows.
        counts_padding: whether positions count from the first token (False: only tokens that are not padding).
    """

    encoder: str
    blocks: str
    attention: tuple[str, str, str, str]
    feed_forward: tuple[str, str]
    norms: tuple[str, str]
    activation: str
    head: tuple[tuple[str, str | None], ...]
    counts_padding: bool = True


_like_bert = partial(
    Family,
    blocks="encoder.layer",
    attention=("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    feed_forward=("intermediate.dense", "output.dense"),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    activation="intermediate.intermediate_act_fn",
)
_ROBERTA_HEAD = (("classifier.dense", "Tanh"), ("classifier.out_proj", None))
_ROBERTA = _like_bert("roberta", head=_ROBERTA_HEAD, counts_padding=False)
FAMILIES = {
    "BertForSequenceClassification": _like_bert("bert", head=(("bert.pooler.dense", "Tanh"), ("classifier", None))),
    "DistilBertForSequenceClassification": Family(
        "distilbert",
        "transformer.layer",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
        ("ffn.lin1", "ffn.lin2"),
        ("sa_layer_norm", "output_layer_norm"),
        "ffn.activation",
        (("pre_classifier", "Relu"), ("classifier", None)),
    ),
    "RobertaForSequenceClassification": _ROBERTA,
    "XLMRobertaForSequenceClassification": _ROBERTA,
}
"""Architectures by the name of their class in Transformers."""
