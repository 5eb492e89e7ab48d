"""ONNX models compute in onnxruntime what the evaluated model computes, or say by how much they do not."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bayeslora import AdaLoraConfig, BayesLoraError, BLoraConfig, MeLoraConfig, export
from bayeslora.export.onnx.graph import Graph, Value
from bayeslora.export.onnx.products import rounded_rows
from bayeslora.quantization import grid_step
from tests.conftest import VOCABULARY, build_tiny_bert, build_tiny_deberta, build_tiny_tokenizer
from tests.methods.reference import FROZEN, RANK, layers_of, randomize, set_widths

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

QKV = ["query", "key", "value"]
PROJECTIONS = [*(f"self.{each}" for each in QKV), "q_lin", "k_lin", "v_lin"]
HEADS, HEAD_SIZE = 4, 8  # of the tiny models
_MOVES = ("Gather", "Reshape", "Transpose")
SHAPES = ((1, 3), (4, 17))
EVERYWHERE = {"weight": 8, "in": 8, "A": 8, "E": 8, "B": 8, "A_out": 8, "E_out": 8, "out": 8}


def _tiny_roberta() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(
        vocab_size=len(VOCABULARY),
        max_position_embeddings=64,
        type_vocab_size=1,
        pad_token_id=1,
        num_labels=3,
        **sizes,
    )
    return RobertaForSequenceClassification(config)


def _tiny_distilbert() -> PreTrainedModel:
    config = DistilBertConfig(
        vocab_size=len(VOCABULARY), dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
    )
    return DistilBertForSequenceClassification(config)


BASES: dict[str, tuple[Callable[[], PreTrainedModel], list[str]]] = {
    "bert": (build_tiny_bert, [*QKV, "dense"]),
    "roberta": (_tiny_roberta, [*QKV, "output.dense", "intermediate.dense"]),
    "distilbert": (_tiny_distilbert, ["q_lin", "v_lin", "lin1", "lin2"]),
}


def _batch(model: nn.Module, rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens, of which all rows but the first end in padding."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, len(VOCABULARY), (rows, length), generator=generator)
    mask = torch.arange(length)[None] < torch.tensor([length - 2 * row for row in range(rows)])[:, None]
    ids[~mask] = model.config.pad_token_id
    return {"input_ids": ids, "attention_mask": mask.long()}


def _spread(model: nn.Module, scale: float = 3.0) -> nn.Module:
    """Weights as large as trained ones: attention of a fresh model hardly differs from an average."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.mul_(scale)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_(0, 0.1)
    return model


def _onnx_logits(folder: Path, batch: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    feeds = {each.name: batch.get(each.name, torch.zeros_like(batch["input_ids"])) for each in session.get_inputs()}
    return torch.from_numpy(session.run(["logits"], {name: value.numpy() for name, value in feeds.items()})[0])


@torch.no_grad()
def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model.eval()(**batch).logits.float()


def _config(method: str, targets: list[str]) -> Any:
    shared = {"target_modules": targets, "task_type": "SEQ_CLS"}
    if method == "lora":
        return LoraConfig(r=RANK, init_lora_weights=False, **shared)
    if method == "adalora":
        return AdaLoraConfig(init_r=RANK, target_r=2, init_weights=False, **shared)
    if method == "melora":
        return MeLoraConfig(r=RANK, init_weights=False, num_examples=9, **shared)
    return BLoraConfig(r=RANK, init_weights=False, mode="ra", **shared)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("bert", "lora"), ("bert", "melora"), ("roberta", "lora"), ("distilbert", "adalora"), ("distilbert", "blora")],
)
def test_a_merged_graph_computes_what_the_model_computes(kind: str, method: str, tmp_path: Path) -> None:
    """At other numbers of rows and tokens than those of the export, and with padding."""
    build, targets = BASES[kind]
    model = get_peft_model(_spread(build()), _config(method, targets))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = [_logits(model, _batch(model, *shape)) for shape in SHAPES]
    result = export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer())
    assert result["max_output_error"] < 1e-4 and result["widened"] is None
    for wanted, shape in zip(expected, SHAPES, strict=True):
        torch.testing.assert_close(_onnx_logits(tmp_path, _batch(model, *shape)), wanted, atol=1e-4, rtol=0)
    assert torch.cat(expected).std(0).min() > 1e-3  # rows differ
    with model.disable_adapter():
        assert (_logits(model, _batch(model, *SHAPES[1])) - expected[1]).abs().max() > 1e-2
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
def test_padding_on_the_left_changes_nothing(kind: str, tmp_path: Path) -> None:
    """The classifier reads the first token, even if the mask hides it."""
    model = get_peft_model(_spread(BASES[kind][0]()), _config("lora", BASES[kind][1]))
    batch = {name: values.flip(1) for name, values in _batch(model, *SHAPES[1]).items()}
    export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer())
    torch.testing.assert_close(_onnx_logits(tmp_path, batch), _logits(model, batch), atol=1e-4, rtol=0)


def test_token_types_are_an_input_where_the_tokenizer_has_them(tmp_path: Path) -> None:
    model = get_peft_model(_spread(build_tiny_bert()), _config("lora", QKV))
    batch = _batch(model, 4, 17)
    batch["token_type_ids"] = (torch.arange(17) > 8).long().expand(4, 17).contiguous()
    tokenizer = build_tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    export(model, tmp_path / "typed", format="onnx", tokenizer=tokenizer)
    torch.testing.assert_close(_onnx_logits(tmp_path / "typed", batch), _logits(model, batch), atol=1e-4, rtol=0)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    export(model, tmp_path / "plain", format="onnx", tokenizer=tokenizer)
    session = onnxruntime.InferenceSession(tmp_path / "plain" / "model.onnx")
    assert [each.name for each in session.get_inputs()] == ["input_ids", "attention_mask"]
    del batch["token_type_ids"]
    torch.testing.assert_close(_onnx_logits(tmp_path / "plain", batch), _logits(model, batch), atol=1e-4, rtol=0)


def _bound(bits: int) -> float:
    """Range of an activation: a narrow one clips, and one of 8 bits does not, for it has a code more in ONNX."""
    return 2.5 if bits < 8 else 60.0


def _blora(kind: str, widths: dict[str, int], **options: Any) -> nn.Module:
    """A frozen adapter with closed ranks, on spread weights; some layers have input grids of their own."""
    build, targets = BASES[kind]
    config = BLoraConfig(
        r=RANK, target_modules=targets, init_weights=False, task_type="SEQ_CLS", quantize_input=True, **options
    )
    model = get_peft_model(_spread(build()), config).eval()
    generator = torch.Generator().manual_seed(3)
    for number, layer in enumerate(layers_of(model)):
        randomize(layer, generator, FROZEN)
        set_widths(layer, **widths)
        for activation in ("in", "A_out", "E_out", "out"):
            bound = _bound(widths[activation]) * (1 + number / 16 if activation == "in" and number % 3 else 1)
            layer.quantizers("default").set_range(activation, torch.tensor(bound))
        if number == 1:  # an adapter without a rank
            layer.rank_gates("default").logits.data.fill_(-9.0)
            layer.blora_E["default"].data.zero_()
    return model


@pytest.mark.parametrize(
    ("kind", "per_channel", "widths"),
    [
        ("bert", True, EVERYWHERE),
        ("bert", False, {"weight": 4, "in": 4, "A": 2, "E": 4, "B": 2, "A_out": 8, "E_out": 4, "out": 4}),
        ("roberta", True, {"weight": 2, "in": 8, "A": 8, "E": 16, "B": 8, "A_out": 16, "E_out": 8, "out": 2}),
        (
            "distilbert",
            False,
            {"weight": 16, "in": 16, "A": 32, "E": 32, "B": 32, "A_out": 32, "E_out": 16, "out": 16},
        ),
        ("distilbert", True, {"weight": 8, "in": 32, "A": 4, "E": 8, "B": 4, "A_out": 4, "E_out": 32, "out": 32}),
    ],
)
def test_every_layer_computes_on_the_learned_grids(
    kind: str, per_channel: bool, widths: dict[str, int], tmp_path: Path
) -> None:
    """Layer by layer: a code at a rounding tie may move, and few do."""
    model = _blora(kind, widths, per_channel=per_channel)
    batch = _batch(model, *SHAPES[1])
    result = export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer(), batch=batch, unadapted="float32")
    assert result["unadapted"] == "float32" and (result["widened"] is None) == (min(widths.values()) >= 32)
    seen = _inputs_and_outputs(model, batch)
    assert len(seen) == len(layers_of(model))
    apart, count = 0, 0
    for path, (x, y) in seen.items():
        found = _layer_alone(tmp_path / "model.onnx", path, x)
        quantizers = model.base_model.named_layers("default")[path].quantizers("default")
        out = quantizers.evaluation_widths()[quantizers.kinds.index("out")]
        if out > 16:
            torch.testing.assert_close(found, y, atol=2e-4, rtol=1e-3)
            continue
        steps = ((found - y) / grid_step(torch.tensor(_bound(out)), out)).abs()
        apart, count = apart + int((steps > (0.01 if out < 16 else 2)).sum()), count + steps.numel()
    assert apart <= count / 500


def test_our_own_steps_take_two_bytes_and_learned_ones_stay_as_they_are(tmp_path: Path) -> None:
    """A step that we choose is one that half precision holds, and never too small for the row's largest value."""
    weight = torch.randn(6, 40) * torch.tensor([1.0, 1e-3, 3e-6, 0.0, 1e4, 1e9])[:, None]
    found, steps = rounded_rows(weight)
    ordinary = [0, 1, 2, 3, 4]
    assert (steps[ordinary].astype(np.float16) == steps[ordinary]).all() and steps[5] > np.finfo(np.float16).max
    assert (np.abs(found * steps[:, None] - weight.numpy()) <= steps[:, None] * 0.5001).all()
    assert np.abs(found[0]).max() >= 126 and not found[3].any()

    graph = Graph()
    assert [graph.steps("exact", steps[:5]), graph.steps("inexact", steps)] == ["exact", "inexact"]
    values = Value("exact", onnx.TensorProto.FLOAT, [5])
    graph.save(tmp_path / "graph.onnx", "steps", [], [values, Value("inexact", onnx.TensorProto.FLOAT, [6])], "")
    made = onnxruntime.InferenceSession(tmp_path / "graph.onnx").run(["exact"], {})[0]
    assert (made == steps[:5]).all()
    stored = {each.name: each.data_type for each in onnx.load(tmp_path / "graph.onnx").graph.initializer}
    assert stored == {"exact.half": onnx.TensorProto.FLOAT16, "inexact": onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_positions_take_a_byte_where_words_do(kind: str, tmp_path: Path) -> None:
    """Embeddings of words and positions are codes with a step a row, and the first layer gets their sum."""
    model = _blora(kind, EVERYWHERE)
    export(model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer())
    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    (name,) = [each for each in constants if each.endswith("position_embeddings.codes")]
    steps = constants[name.replace(".codes", ".steps.half")]
    found = constants[name] * steps.astype(np.float32)
    (table,) = [p for n, p in model.named_parameters() if n.endswith("position_embeddings.weight")]
    (types,) = [p[0] for n, p in model.named_parameters() if n.endswith("token_type_embeddings.weight")] or [0.0]
    table = (table + types).detach()
    assert constants[name].dtype == np.int8 and steps.dtype == np.float16
    assert ((torch.from_numpy(found) - table).abs().amax(1) <= table.abs().amax(1) / 250).all()

    batch = _batch(model, *SHAPES[1])
    plain = tmp_path / "plain"
    export(model, plain, format="onnx", tokenizer=build_tiny_tokenizer(), unadapted="float32")
    assert [each.name for each in onnx.load(plain / "model.onnx").graph.initializer if "position" in each.name] == [
        name.replace(".codes", ".weight")
    ]
    assert (_onnx_logits(tmp_path, batch) - _onnx_logits(plain, batch)).abs().max() < 0.5


def _inputs_and_outputs(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows that enter and leave each adapted layer, by its path."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for path, layer in model.base_model.named_layers("default").items():

        def keep(_: nn.Module, inputs: Any, output: Tensor, path: str = path) -> None:
            found[path] = (inputs[0].reshape(-1, inputs[0].shape[-1]), output.reshape(-1, output.shape[-1]))

        handles.append(layer.register_forward_hook(keep))
    _logits(model, batch)
    for handle in handles:
        handle.remove()
    return found


def _layer_alone(path: Path, layer: str, x: Tensor) -> Tensor:
    """What the nodes of one layer compute for rows x, as a graph of their own without those that move rows.

    Query, key and value are written together, and so computed together here.
    """
    model = onnx.load(path)
    moved = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type in _MOVES}
    block = layer[: layer.index(".attention")] if ".attention" in layer else layer
    members = [f"{block}.attention.{each}" for each in PROJECTIONS]
    together = (f"{block}.projections", *members) if layer in members else (layer,)
    names = tuple(f"{each}." for each in together)
    own = [node for node in model.graph.node if node.output[0].startswith(names) and node.output[0] not in moved]
    own = [node for node in own if not node.output[0].endswith((".activation", ".tanh"))]
    for node in own:
        for place, name in enumerate(node.input):
            while name in moved:
                name = moved[name]
            node.input[place] = name
        if node.op_type == "Split":  # of heads in the graph, of columns here
            node.input[1] = "columns"
            columns = np.full(len(node.output), HEADS * HEAD_SIZE)
            model.graph.initializer.append(onnx.numpy_helper.from_array(columns, "columns"))
    made = {output for node in own for output in node.output}
    constants = {each.name for each in model.graph.initializer}
    sources = {name for node in own for name in node.input} - made - constants  # the last block's query has its own
    used = {name for node in own for name in node.input}
    (leaving,) = [each for node in own for each in node.output if each not in used and each.startswith(f"{layer}.")]
    graph = onnx.helper.make_graph(
        own,
        "layer",
        [onnx.helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, list(x.shape)) for each in sources],
        [onnx.helper.make_tensor_value_info(leaving, onnx.TensorProto.FLOAT, None)],
        list(model.graph.initializer),
    )
    alone = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = onnxruntime.InferenceSession(alone.SerializeToString())
    found = torch.from_numpy(session.run(None, dict.fromkeys(sources, x.numpy()))[0])
    return found * HEAD_SIZE**0.5 if layer.endswith(("query", "q_lin")) else found  # scaled for the attention


def _operators(path: Path) -> Counter[str]:
    """Operators of the graph that onnxruntime makes of the one in the file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options)
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("bits", [8, 4])
def test_products_of_codes_become_integer_products(bits: int, tmp_path: Path) -> None:
    """All twelve layers of the blocks, pooler and classifier; the float32 products left are those with B.

    Query, key and value have one A and one B together, but for the last block's query, which reads the first token.
    """
    model = get_peft_model(_spread(build_tiny_bert()), BLoraConfig(r=RANK, target_modules=QKV, quantize_input=True))
    generator = torch.Generator().manual_seed(3)
    for number, layer in enumerate(layers_of(model.eval())):
        randomize(layer, generator, FROZEN)
        set_widths(layer, **{**EVERYWHERE, "weight": bits, "in": bits})
        layer.rank_gates("default").logits.data.fill_(9.0)
        layer.quantizers("default").set_range("in", torch.tensor(4.0 + number / 16))
        layer.quantizers("default").set_range("out", torch.tensor(40.0))
    batches = [_batch(model, rows, 12) for rows in (2, 3, 4)]
    expected = torch.cat([_logits(model, batch) for batch in batches])
    result = export(
        model, tmp_path, format="onnx", tokenizer=build_tiny_tokenizer(), rows=batches, calibration=batches[:2]
    )
    found = torch.cat([_onnx_logits(tmp_path, batch) for batch in batches])
    assert result["max_output_error"] == pytest.approx(float((found - expected).abs().max()), abs=1e-6)
    assert result["rows"] == 9 and 0 < result["max_output_error"] < 0.15 * expected.abs().max()
    assert result["changed"] == float((found.argmax(1) != expected.argmax(1)).float().mean())
    before, after = expected.log_softmax(1), found.log_softmax(1)
    assert result["divergence"] == pytest.approx(float((before.exp() * (before - after)).sum(1).mean()), abs=1e-7)
    assert result["unadapted"] == "int8 weights and inputs"
    assert (result["widened"] == "E 8 as 32, B 8 as 32") == (bits == 8)
    operators = _operators(tmp_path / "model.onnx")
    layers, updates = 2 * 6 + 2, 3
    assert operators["QGemm"] == layers + updates  # and the products with A
    assert operators["Gemm"] + operators["FusedGemm"] == updates
    stored = {each.name: each.data_type for each in onnx.load(tmp_path / "model.onnx").graph.initializer}
    packed = [name for name, kind in stored.items() if kind == onnx.TensorProto.INT4 and ".A." not in name]
    assert len([name for name in packed if ".B" not in name]) == (0 if bits == 8 else len(layers_of(model)))


def test_other_architectures_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = get_peft_model(build_tiny_deberta(), MeLoraConfig(r=RANK, target_modules=["query_proj"], num_examples=9))
    with pytest.raises(BayesLoraError, match="the model is a .*, but format 'onnx' is for Bart.*: export 'merged'"):
        export(model, tmp_path / "out", format="onnx", tokenizer=build_tiny_tokenizer())
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tiny_tokenizer()
    model = get_peft_model(build_tiny_bert(), _config("melora", QKV))
    with pytest.raises(BayesLoraError, match="tokenizer is of type NoneType, but must be a fast one"):
        export(model, tmp_path / "out", format="onnx")
    with pytest.raises(BayesLoraError, match="unadapted is 'bfloat16', but must be one of int8, float32"):
        export(model, tmp_path / "out", format="onnx", tokenizer=tokenizer, unadapted="bfloat16")
    with pytest.raises(BayesLoraError, match="without learned widths all layers are float32"):
        export(model, tmp_path / "out", format="onnx", tokenizer=tokenizer, unadapted="int8")
    other = get_peft_model(build_tiny_bert(hidden_act="silu"), _config("melora", QKV))
    with pytest.raises(BayesLoraError, match="activation is 'silu', but format 'onnx' is for gelu"):
        export(other, tmp_path / "out", format="onnx", tokenizer=tokenizer)
    for name in [name for name in sys.modules if name.startswith("bayeslora.export.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BayesLoraError, match=r"^onnxruntime is not installed, .*: pip install 'bayeslora\[onnx\]'$"):
        export(model, tmp_path / "out", format="onnx", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_half_precision_base_is_inexact_and_refused(tmp_path: Path) -> None:
    model = get_peft_model(_spread(build_tiny_bert()).bfloat16(), _config("melora", QKV))
    tokenizer = build_tiny_tokenizer()
    with pytest.raises(BayesLoraError, match="outputs of the graph differ by .*allow_error=True"):
        export(model, tmp_path / "refused", format="onnx", tokenizer=tokenizer)
    result = export(model, tmp_path / "allowed", format="onnx", tokenizer=tokenizer, allow_error=True)
    card = (tmp_path / "allowed" / "README.md").read_text()
    assert result["max_output_error"] > 1e-4 and f"{result['max_output_error']:.3g}" in card
    assert json.loads((tmp_path / "allowed" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]
