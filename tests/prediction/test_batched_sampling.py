"""Several draws in one batch, the shared prefix and the cut last block: the same numbers as one plain pass a draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from bayeslora import predict
from bayeslora.errors import BayesLoraError
from bayeslora.methods.variational import stochastic_layers
from bayeslora.prediction.batched_sampling import MAX_ELEMENTS, BatchedSampler, first_token_only, repeat_rows
from tests.prediction.models import TARGETS, classifier, inputs, merged_draw, noisy

FAMILIES = sorted(TARGETS)


def read(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch).logits
    return logits


def count_calls(modules: list[nn.Module]) -> list[int]:
    """Rows of every forward call of any of the modules from here on."""
    calls: list[int] = []
    for module in modules:
        module.register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("method", ["melora", "blob"])
@pytest.mark.parametrize("layers", [None, [1, 2], [2]], ids=["all", "late", "last"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_draws_are_the_models_that_hold_each_draw_in_their_weights(
    family: str, layers: list[int] | None, method: str
) -> None:
    model = noisy(classifier(family), TARGETS[family], method, layers_to_transform=layers)
    batch, draws = inputs(), [0, 1, 5]
    with first_token_only(model):
        run = BatchedSampler(model, read, seed=3)
        found = run.logits(batch, draws)
    expected = torch.stack([read(merged_draw(model, 3, draw), batch) for draw in draws])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((found[0] - found[1]).abs().max()) > 1e-3
    assert run.batchable and run.shareable


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prefix_runs_once_for_all_draws(family: str) -> None:
    model = noisy(classifier(family), TARGETS[family], layers_to_transform=[2])
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 3]
    first = next(part for part in lists[0][0].modules() if isinstance(part, nn.LayerNorm) or "Norm" in str(type(part)))
    calls = count_calls([first])
    BatchedSampler(model, read, seed=0).logits(inputs(rows=4), range(6))
    assert calls == [4]


@torch.no_grad()
def test_equal_inputs_are_multiplied_by_a_base_weight_once() -> None:
    model = noisy(classifier("bert"), ["query", "key"], layers_to_transform=[1, 2])
    layers = stochastic_layers(model)
    first = [layer.base_layer for path, layer in layers.items() if ".1." in path]
    second = [layer.base_layer for path, layer in layers.items() if ".2." in path]
    products: dict[int, int] = {}
    for base in [*first, *second]:
        products[id(base)] = 0
        forward = base.forward

        def counted(x: Tensor, base: nn.Module = base, forward: Any = forward) -> Tensor:
            products[id(base)] += len(x)
            out: Tensor = forward(x)
            return out

        base.forward = counted
    BatchedSampler(model, read, seed=0).logits(inputs(rows=4), range(6))
    assert [products[id(base)] for base in first] == [4, 4]
    assert [products[id(base)] for base in second] == [24, 24]


@torch.no_grad()
@pytest.mark.parametrize("elements", [1, 28, 60, 10_000])
def test_how_draws_are_split_into_passes_changes_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy(classifier("bert"), TARGETS["bert"])
    whole = BatchedSampler(model, read, seed=1).logits(inputs(), range(5))
    monkeypatch.setitem(MAX_ELEMENTS, "cpu", elements)
    torch.testing.assert_close(
        BatchedSampler(model, read, seed=1).logits(inputs(), range(5)), whole, rtol=0, atol=1e-6
    )


@torch.no_grad()
def test_a_model_that_multiplies_something_else_than_the_batch_takes_draws_one_at_a_time() -> None:
    """DeBERTa sends its table of relative positions, one row, through the adapted projections."""
    model = noisy(classifier("deberta"), ["query_proj", "key_proj"], layers_to_transform=[1, 2])
    run = BatchedSampler(model, read, seed=2)
    found = run.logits(inputs(), range(3))
    assert not run.batchable and run.shareable
    expected = torch.stack([read(merged_draw(model, 2, draw), inputs()) for draw in range(3)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_several_rows_of_a_batch_may_make_one_example() -> None:
    model = noisy(classifier("bert", num_labels=1), TARGETS["bert"], layers_to_transform=[1, 2])

    def pairs(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return read(model, batch).view(-1, 2)

    found = BatchedSampler(model, pairs, seed=0).logits(inputs(rows=6), range(3))
    expected = torch.stack([pairs(merged_draw(model, 0, draw), inputs(rows=6)) for draw in range(3)])
    assert found.shape == (3, 3, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Mixing(nn.Module):
    """Blocks that look at the number of rows, as repeated outputs of the blocks before do not expect."""

    def __init__(self, error: type[Exception] = RuntimeError) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.rows: list[int] = []
        self.error = error

    def forward(self, x: Tensor) -> Any:
        self.rows.append(len(x))
        first = self.blocks[0](x)
        if len(self.rows) == 2:
            raise self.error("not with outputs that are given")
        return type("Output", (), {"logits": self.blocks[2](self.blocks[1](first))})()


@torch.no_grad()
def test_a_model_that_fails_with_given_outputs_runs_in_full() -> None:
    base = Mixing()
    model = noisy(base, ["blocks.1", "blocks.2"])
    x = torch.randn(4, 8)
    run = BatchedSampler(model, lambda m, batch: m(batch["x"]).logits, seed=0)
    found = run.logits({"x": x}, range(3))
    assert not run.shareable and base.rows == [4, 12, 12]
    merged = merged_draw(model, 0, 2)
    torch.testing.assert_close(found[2], merged(x).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("error", [BayesLoraError, torch.OutOfMemoryError, KeyError])
def test_an_error_that_says_nothing_about_given_outputs_is_not_hidden_by_a_full_run(error: type[Exception]) -> None:
    model = noisy(Mixing(error), ["blocks.1", "blocks.2"])
    with pytest.raises(error):
        BatchedSampler(model, lambda m, batch: m(batch["x"]).logits, seed=0).logits({"x": torch.randn(4, 8)}, range(3))


@torch.no_grad()
def test_models_and_their_forwards_are_as_before() -> None:
    model = noisy(classifier("llama"), TARGETS["llama"], layers_to_transform=[2])
    before = read(model, inputs())
    own = {module for module in model.modules() if "forward" in module.__dict__}
    hooks = [(dict(module._forward_pre_hooks), dict(module._forward_hooks)) for module in model.modules()]
    BatchedSampler(model, read, seed=0).logits(inputs(), range(3))
    assert {module for module in model.modules() if "forward" in module.__dict__} == own
    assert [(dict(m._forward_pre_hooks), dict(m._forward_hooks)) for m in model.modules()] == hooks
    assert torch.equal(read(model, inputs()), before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "deberta"])
def test_the_last_block_works_on_the_first_token_only_and_only_inside_the_context(family: str) -> None:
    model = classifier(family)
    before = read(model, inputs())
    last = model.base_model.encoder.layer[-1]
    seen: list[int] = []
    last.intermediate.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1]))
    with first_token_only(model):
        torch.testing.assert_close(read(model, inputs()), before, rtol=0, atol=1e-6)
    read(model, inputs())
    assert seen == [1, 7]
    model.config.output_hidden_states = True
    with first_token_only(model):
        read(model, inputs())
    assert seen[-1] == 7


class MeanPoolBertForSequenceClassification(BertForSequenceClassification):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SequenceClassifierOutput:
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.classifier(hidden.mean(1)))


@torch.no_grad()
@pytest.mark.parametrize("samples", [0, 2])
def test_a_classifier_of_ones_own_may_read_every_token(samples: int) -> None:
    torch.manual_seed(0)
    model = noisy(MeanPoolBertForSequenceClassification(classifier("bert").config), TARGETS["bert"]).eval()
    found = predict(model, inputs(), samples=samples, seed=3, per_sample=True).sample_probabilities
    draws = [merged_draw(model, 3, draw) for draw in range(samples)] or [model]
    expected = torch.stack([read(each, inputs()).double().softmax(-1) for each in draws])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_rows_are_repeated_draw_by_draw_and_other_tensors_left_alone() -> None:
    rows, other = torch.tensor([[1], [2]]), torch.zeros(3, 1)
    repeated = repeat_rows({"a": (rows, [other, None]), "b": 7}, 2, 2)
    assert repeated["a"][0].flatten().tolist() == [1, 2, 1, 2]
    assert repeated["a"][1][0] is other and repeated["a"][1][1] is None and repeated["b"] == 7
