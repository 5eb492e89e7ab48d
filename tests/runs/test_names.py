"""Module paths of the model families that adapters are put on."""

from __future__ import annotations

import pytest

from bayeslora.runs.names import locate, order_matrices, shortest_labels, stack_labels


@pytest.mark.parametrize(
    ("name", "stack", "index", "matrix", "role"),
    [
        ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer", 0, "attention.self.query", "q"),
        ("bert.encoder.layer.11.output.dense", "bert.encoder.layer", 11, "output.dense", "down"),
        ("bert.encoder.layer.3.attention.output.dense", "bert.encoder.layer", 3, "attention.output.dense", "output"),
        ("encoder.layer.7.attention.self.value_proj", "encoder.layer", 7, "attention.self.value_proj", "v"),
        ("model.layers.3.self_attn.k_proj", "model.layers", 3, "self_attn.k_proj", "k"),
        ("model.layers.29.mlp.gate_proj", "model.layers", 29, "mlp.gate_proj", "gate"),
        ("transformer.h.0.attn.c_attn", "transformer.h", 0, "attn.c_attn", "qkv"),
        ("transformer.h.5.attn.c_proj", "transformer.h", 5, "attn.c_proj", "output"),
        ("transformer.h.5.mlp.c_proj", "transformer.h", 5, "mlp.c_proj", "down"),
        ("gpt_neox.layers.2.attention.query_key_value", "gpt_neox.layers", 2, "attention.query_key_value", "qkv"),
        ("decoder.block.4.layer.1.EncDecAttention.q", "decoder.block", 4, "layer.*.EncDecAttention.q", "q"),
        ("model.layers.1.mlp.experts.13.up_proj", "model.layers", 1, "mlp.experts.*.up_proj", "up"),
        ("classifier", "", None, "classifier", None),
    ],
)  # fmt: skip
def test_a_path_tells_block_matrix_and_role(name: str, stack: str, index: int | None, matrix: str, role: str) -> None:
    address = locate(name)
    assert (address.stack, address.index, address.matrix, address.role) == (stack, index, matrix, role)


def test_matrices_come_in_the_order_of_the_forward_pass_whatever_order_they_are_given_in() -> None:
    given = ["mlp.down_proj", "odd", "self_attn.v_proj", "mlp.up_proj", "self_attn.o_proj", "self_attn.k_proj"]
    given += ["mlp.gate_proj", "self_attn.q_proj", "self_attn.v_proj"]
    short = [matrix.split(".")[-1] for matrix in order_matrices(given)]
    assert short == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "odd"]


def test_labels_are_as_short_as_they_can_be_and_never_shared() -> None:
    labels = shortest_labels(["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"])
    assert list(labels.values()) == ["query", "attention.output.dense", "intermediate.dense", "output.dense"]


def test_stacks_are_named_only_where_there_are_several() -> None:
    assert stack_labels(["bert.encoder.layer"]) == {"bert.encoder.layer": ""}
    assert stack_labels(["encoder.block", "decoder.block"]) == {"encoder.block": "encoder", "decoder.block": "decoder"}
    assert list(stack_labels(["model.encoder.layers", "model.decoder.layers"]).values()) == ["encoder", "decoder"]
