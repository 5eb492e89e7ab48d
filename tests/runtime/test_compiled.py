"""Compiled models: the same scores, from one graph, and refusals where they would not be the same."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

from bayeslora import BayesLoraError, compile_inference, export, load_integer
from tests.conftest import build_tiny_bert, build_tiny_llama
from tests.export.test_integer import BASES, TOKENS

PROMPT = torch.arange(3, 9).view(1, 6)
SCORES = {"output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()
    counters.clear()


def _integer(path: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    export(BASES["llama"](**{"layers": 1, **options}), path, format="integer")
    return load_integer(path, dtype=dtype)


def _compiled(model: Any, backend: str, max_length: int | None = 32) -> Any:
    compile_inference(model, max_length, backend)
    return model


def _generated(model: Any, prompt: Tensor = PROMPT, **settings: Any) -> Any:
    length = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **length, **settings)


def test_one_graph_serves_calls_of_every_length_up_to_the_longest(tmp_path: Path) -> None:
    plain = _integer(tmp_path, layers=2)
    model = _compiled(load_integer(tmp_path), "eager")
    for length in (6, 4, 5):
        prompt = PROMPT[:, :length]
        assert torch.equal(_generated(model, prompt), _generated(plain, prompt))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_two_models_a_copy_and_a_cast_model_have_graphs_of_their_own(tmp_path: Path) -> None:
    plain = [_integer(tmp_path / "a"), _integer(tmp_path / "b", widths={"A_out": 2, "E_out": 2, "out": 4})]
    models = [_compiled(copy.deepcopy(each), "eager") for each in plain]
    expected = [_generated(each, **SCORES).logits for each in plain]
    assert not torch.equal(expected[0][-1], expected[1][-1])

    def check(model: nn.Module, wanted: tuple[Tensor, ...], tolerance: float = 1e-3) -> None:
        for ours, theirs in zip(_generated(model, **SCORES).logits, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)

    for model, wanted in zip(models, expected, strict=True):
        check(model, wanted)
    another = copy.deepcopy(models[0])
    another.lm_head = nn.Linear(another.lm_head.in_features, another.lm_head.out_features)
    assert another.get_compiled_call.model is another
    check(another, _generated(_plain_again(another), **SCORES).logits)
    check(models[0], expected[0])
    check(models[0].to(torch.bfloat16), _generated(plain[0].to(torch.bfloat16), **SCORES).logits, 0.02)


def _plain_again(model: Any) -> Any:
    """The same model without compilation."""
    found = copy.deepcopy(model)
    del found.get_compiled_call
    found.generation_config.cache_implementation = found.generation_config.compile_config = None
    found.generation_config.max_cache_len = None
    return found


def test_a_configuration_of_the_caller_is_the_one_that_counts(tmp_path: Path) -> None:
    model = _compiled(_integer(tmp_path), "eager")
    assert model.get_compiled_call(model.generation_config.compile_config) is model.get_compiled_call.run()
    own = model.get_compiled_call(CompileConfig(backend="eager", mode="default"))
    assert own is model._compiled_call and own is not model.get_compiled_call.run()


@pytest.mark.parametrize("widths", [{"in": 16}, {"in": 32, "out": 16}, {"A": 16}, {"weight": 16, "in": 16}], ids=str)
def test_layers_without_an_integer_product_are_compiled_too(widths: dict[str, int], tmp_path: Path) -> None:
    plain = _integer(tmp_path, widths=widths)
    compiled = _compiled(load_integer(tmp_path), "eager")
    for ours, theirs in zip(_generated(compiled, **SCORES).logits, _generated(plain, **SCORES).logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_code_of_the_compiler_gives_the_same_scores(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = _integer(tmp_path, dtype)
    compiled = _compiled(load_integer(tmp_path, dtype=dtype), "inductor")
    tolerance = 0.01 if dtype == torch.float32 else 0.15
    for ours, theirs in zip(_generated(compiled, **SCORES).logits, _generated(plain, **SCORES).logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_an_encoder_is_one_graph_for_every_length(tmp_path: Path) -> None:
    export(BASES["bert"](layers=1), tmp_path, format="integer")
    plain, model = load_integer(tmp_path), _compiled(load_integer(tmp_path), "eager", None)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    for rows, length in ((2, 12), (2, 7), (3, 9), (4, 12)):
        tokens = torch.arange(rows * length).view(rows, length)
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-3, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    again = copy.deepcopy(model)
    again.classifier = nn.Linear(again.classifier.in_features, 7)
    assert again(TOKENS).logits.shape == (2, 7) and model(TOKENS).logits.shape == plain(TOKENS).logits.shape


def test_what_cannot_be_compiled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _integer(tmp_path)
    with pytest.raises(BayesLoraError, match="max_length is 1, but must be at least 2 tokens"):
        compile_inference(model, max_length=1)
    with pytest.raises(BayesLoraError, match="BertForSequenceClassification does not generate"):
        compile_inference(build_tiny_bert().eval(), max_length=8)
    with pytest.raises(BayesLoraError, match="Linear is not a Transformers model"):
        compile_inference(nn.Linear(2, 2))
    with pytest.raises(BayesLoraError, match="in training mode"):
        compile_inference(build_tiny_bert().train())
    adapted = get_peft_model(build_tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    for each in (adapted, adapted.base_model.model):
        with pytest.raises(BayesLoraError, match="would not notice when the adapter changes"):
            compile_inference(each)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BayesLoraError, match="compiles with no-such-compiler, but it is not installed"):
        compile_inference(model)
    assert "get_compiled_call" not in vars(model) and model.generation_config.cache_implementation is None
