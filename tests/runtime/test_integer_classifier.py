"""Integer classifiers: their own forward pass gives the logits of the model's, without its padding."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeslora import export, load_integer
from bayeslora.runtime import integer_classifier, integer_linear
from bayeslora.runtime.integer_classifier import ClassifierForward, JointLinear
from bayeslora.runtime.integer_linear import IntegerLinear
from tests.conftest import build_tiny_bert
from tests.export.test_integer import BASES, KERNELS, _blora
from tests.export.test_onnx import _tiny_distilbert, _tiny_roberta
from tests.methods.reference import layers_of, set_widths

TARGETS = ["query", "key", "value"]
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "bert": (build_tiny_bert, TARGETS),
    "roberta": (_tiny_roberta, TARGETS),
    "distilbert": (_tiny_distilbert, ["q_lin", "k_lin", "v_lin"]),
}
IDS = torch.tensor([[3, 7, 5, 9, 8, 4], [3, 6, 2, 1, 1, 1], [3, 4, 6, 8, 1, 1], [3, 1, 1, 1, 1, 1]])
MASKS = {
    "none": None,
    "full": torch.ones_like(IDS),
    "right": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]),
    "left": torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]),
    "inside": torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]]),
}


def _loaded(name: str, path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    build, targets = MODELS[name]
    base = build()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:  # larger than at initialization, so that tokens and positions matter
                parameter.mul_(8)
    model = _blora(base, targets, task_type="SEQ_CLS", quantize_input=True, **options)
    # Each layer has its own ranges and widths, as after training.
    for number, layer in enumerate(layers_of(model)):
        quantizers = layer.quantizers("default")
        set_widths(layer, **{"in": (8, 4, 2)[number % 3], "out": (8, 8, 4)[number % 3]})
        for kind, bound in {"in": 2.0, "A_out": 1.5, "E_out": 2.0, "out": 3.0}.items():
            quantizers.set_range(kind, torch.tensor(bound + 0.37 * number))
    export(model, path, format="integer", calibration=[{"input_ids": IDS}])
    return load_integer(path, dtype=dtype)


def _own(model: Any, **inputs: Any) -> Any:
    return type(model).forward(model, **inputs)


def _apart(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return (model(**inputs).logits - _own(model, **inputs).logits).abs().max()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_models_own_forward_pass(name: str, mask: str, tmp_path: Path) -> None:
    model = _loaded(name, tmp_path)
    inputs = {"input_ids": IDS} | ({} if MASKS[mask] is None else {"attention_mask": MASKS[mask]})
    with torch.no_grad():
        assert model(**inputs).logits.std(0).min() > 0.03
    assert _apart(model, **inputs) < 1e-5
    assert _apart(model, **{key: value[:1] for key, value in inputs.items()}) < 1e-5


def test_positions_types_and_bfloat16(tmp_path: Path) -> None:
    model = _loaded("bert", tmp_path)
    types = (torch.arange(6) > 2).long().expand(4, 6)
    inputs = {"input_ids": IDS, "attention_mask": MASKS["right"], "token_type_ids": types}
    assert _apart(model, **inputs) < 1e-5
    with torch.no_grad():
        assert torch.equal(model(IDS, MASKS["right"], token_type_ids=types).logits, model(**inputs).logits)
        assert not torch.equal(model(IDS, MASKS["right"]).logits, model(**inputs).logits)
    rounded = load_integer(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        assert rounded(**inputs).logits.dtype == torch.bfloat16
    assert _apart(rounded, **inputs) < 0.1


def test_tokens_that_are_hidden_are_not_computed(tmp_path: Path) -> None:
    model = _loaded("bert", tmp_path)
    rows: dict[str, list[int]] = {"intermediate": [], "key": []}
    last = model.bert.encoder.layer[-1]
    model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda _, inputs, output: rows["intermediate"].append(len(inputs[0]))
    )
    last.intermediate.dense.register_forward_hook(lambda _, inputs, output: rows["key"].append(len(inputs[0])))
    with torch.no_grad():
        model(IDS, MASKS["right"])
    assert rows == {"intermediate": [int(MASKS["right"].sum())], "key": [len(IDS)]}


@pytest.mark.parametrize("name", MODELS)
def test_a_call_for_more_than_logits_is_the_models_own(name: str, tmp_path: Path) -> None:
    model = _loaded(name, tmp_path)
    inputs = {"input_ids": IDS, "attention_mask": MASKS["right"]}
    labels = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        assert torch.equal(model(**inputs, labels=labels).loss, _own(model, **inputs, labels=labels).loss)
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
        assert isinstance(model(**inputs, return_dict=False), tuple)
        values = model.get_input_embeddings()(IDS)
        torch.testing.assert_close(model(inputs_embeds=values).logits, _own(model, inputs_embeds=values).logits)
    model.config.output_hidden_states = True
    with torch.no_grad():
        assert len(model(**inputs).hidden_states) == 3


def test_a_text_without_a_token_is_left_to_the_model(tmp_path: Path) -> None:
    model = _loaded("bert", tmp_path)
    mask = MASKS["right"].clone()
    mask[1] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(IDS, mask).logits, _own(model, input_ids=IDS, attention_mask=mask).logits)


def test_a_model_that_has_run_can_be_copied_pickled_and_inspected(tmp_path: Path) -> None:
    model = _loaded("bert", tmp_path)
    with torch.no_grad():
        expected = model(IDS, MASKS["right"]).logits
        torch.save(model, tmp_path / "model.pt")
        for copied in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert copied.forward.model is copied and torch.equal(copied(IDS, MASKS["right"]).logits, expected)
        copied.classifier.bias.add_(1.0)
        assert torch.equal(model(IDS, MASKS["right"]).logits, expected)
    assert "token_type_ids" in inspect.signature(model.forward).parameters


def _projections(model: Any) -> list[IntegerLinear]:
    attention = model.bert.encoder.layer[1].attention.self
    return [attention.query, attention.key, attention.value]


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("widths", [{}, {"A_out": 32}, {"E_out": 32}, {"A_out": 32, "E_out": 32}, {"weight": 4}])
def test_layers_side_by_side_give_the_codes_that_they_give_apart(
    widths: dict[str, int], has_kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = _projections(_loaded("bert", tmp_path, widths=widths))
    if not has_kernels:
        for kernel in KERNELS:
            monkeypatch.setattr(integer_linear, kernel, lambda device: False)
    assert JointLinear.fit(layers)
    joint = JointLinear(layers)
    for rows in (1, 3, 50, 4000):
        x = torch.randn(rows, layers[0].in_features, generator=torch.Generator().manual_seed(rows))
        expected = torch.cat([layer(x) / layer.output.step for layer in layers], 1)
        found = joint(x) / joint.output_steps
        apart = (found - expected).abs().round()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.002 and found.std() > 1


def test_a_closed_rank_among_open_ones_stays_closed(tmp_path: Path) -> None:
    layers = _projections(_loaded("bert", tmp_path))
    none = copy.deepcopy(layers[1])
    rows = slice(0, none.out_features)
    none.codes, none.sum_scales = none.codes[rows].contiguous(), none.sum_scales[rows]
    none.rank, none.is_stacked, none.bias = 0, False, none.bias[rows]
    mixed = [layers[0], none, layers[2]]
    assert JointLinear.fit(mixed)
    x = torch.randn(9, none.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(JointLinear(mixed)(x), torch.cat([layer(x) for layer in mixed], 1))
    assert not torch.equal(none(x), layers[1](x))


@pytest.mark.parametrize("widths", [{"out": 32}, {"in": 16}, {"weight": 32}])
def test_layers_that_do_not_fit_are_computed_apart(
    widths: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integer_linear, "has_weight_kernel", lambda device: False)  # which rounds to bfloat16
    model = _blora(build_tiny_bert(), TARGETS, widths, task_type="SEQ_CLS", quantize_input=True)
    export(model, tmp_path, format="integer")
    loaded: Any = load_integer(tmp_path)
    assert not JointLinear.fit(_projections(loaded))
    assert _apart(loaded, input_ids=IDS, attention_mask=MASKS["right"]) < 1e-5


def test_only_known_classifiers_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(BASES["llama"](layers=1), tmp_path / "llama", format="integer")
    assert not isinstance(load_integer(tmp_path / "llama").forward, ClassifierForward)
    monkeypatch.setattr(integer_classifier, "FAMILIES", {})
    export(BASES["bert"](layers=1), tmp_path / "bert", format="integer")
    assert not isinstance(load_integer(tmp_path / "bert").forward, ClassifierForward)
