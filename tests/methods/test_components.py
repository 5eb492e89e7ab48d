"""Components are weighed together: the sketch is the rows' Fisher matrix, the search finds the best set, and the rest
takes over."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from bayeslora import BayesLoop, BLoraConfig, parameter_groups
from bayeslora.methods.blora.components import BUCKETS, as_if_drawn, close_together, deal, taken_over
from tests.conftest import build_tiny_bert

ROWS, RANK = 32, 4


def random_columns(components: int, seed: int) -> Tensor:
    """Columns of correlated components, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(20, 6, generator=generator) @ torch.randn(6, components, generator=generator)
    noise = 0.3 * torch.randn(20, components, generator=generator)
    return (mixed + noise).double() * torch.logspace(-1, 1, components).double()


def loss(columns: Tensor, is_open: Tensor) -> float:
    return float(columns[:, ~is_open].sum(1).square().sum() / 2)


@pytest.mark.parametrize("seed", range(8))
def test_the_search_comes_close_to_the_best_set_and_beats_single_deltas(seed: int) -> None:
    columns, keep = random_columns(9, seed), 3
    masks = [torch.tensor([k in chosen for k in range(9)]) for chosen in itertools.combinations(range(9), keep)]
    best = min(loss(columns, mask) for mask in masks)
    found, _ = close_together(columns, limit=keep)
    alone = torch.zeros(9, dtype=torch.bool)
    alone[columns.square().sum(0).argsort(descending=True)[:keep]] = True
    assert int(found.sum()) == keep
    assert loss(columns, found) <= min(1.35 * best, loss(columns, alone)) + 1e-12


def test_two_components_that_cancel_close_together() -> None:
    columns = torch.eye(3).double()
    columns[:, 1] = -columns[:, 0] * 1.01
    columns[:, 2] *= 0.5
    is_open, _ = close_together(columns, limit=1)
    assert is_open.tolist() == [False, False, True]


def test_at_a_price_the_open_components_are_those_worth_more() -> None:
    sizes = torch.tensor([0.1, 2.0, 0.5, 1.0]).double()
    is_open, last = close_together(sizes.diag(), price=0.2)
    assert is_open.tolist() == [False, True, False, True]
    assert last == pytest.approx(0.125)


@pytest.mark.parametrize("rows", [3, 20])
def test_what_stays_takes_over_as_ridge_regression_says(rows: int) -> None:
    columns = random_columns(9, 1)[:rows]
    was_open, is_open = torch.ones(9, dtype=torch.bool), torch.arange(9) % 3 == 0
    was_open[1] = False
    factors = taken_over(columns, was_open, is_open)
    gone = columns[:, was_open & ~is_open].sum(1)
    c, damping = columns[:, is_open], 0.1 * columns.square().sum(0).mean()
    expected = 1 + torch.linalg.inv(c.T @ c + damping * torch.eye(3).double()) @ c.T @ gone
    torch.testing.assert_close(factors[is_open], expected)
    assert torch.equal(factors[~is_open], torch.ones(6).double())
    left = gone - c @ (factors[is_open] - 1)
    assert left.square().sum() < gone.square().sum()


def test_without_evidence_nothing_takes_over() -> None:
    factors = taken_over(torch.zeros(4, 3), torch.ones(3, dtype=torch.bool), torch.tensor([True, False, False]))
    assert torch.equal(factors, torch.ones(3).double())


def watched_model(num_labels: int) -> tuple[Any, Tensor, Tensor]:
    """A tiny BERT in float32 without dropout, ids and labels."""
    torch.manual_seed(0)
    base = build_tiny_bert()
    base.config.num_labels = num_labels
    base.num_labels = num_labels
    base.classifier = torch.nn.Linear(base.classifier.in_features, num_labels)
    config = BLoraConfig(
        task_type="SEQ_CLS", mode="ra", r=RANK, target_modules=["query", "value"], init_weights=False, target_rank=2.0
    )
    model = get_peft_model(base, config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.randint(5, 30, (ROWS, 8))
    labels = torch.rand(ROWS) if num_labels == 1 else ids[:, 0] % num_labels
    return model.train(), ids, labels


def sketches(
    model: Any, ids: Tensor, labels: Tensor, micro_batches: int, measured: bool = False
) -> tuple[Tensor, int]:
    """The sketch (m, K) after a watched step that moves no weight, and that step, `measured` or not."""
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.0), lr=0.0)
    run = BayesLoop(model, optimizer, total_steps=1000).tuner.run_state()
    step = min(run.schedule.passes) if measured else run.rotated_after
    for layer in model.base_model.adapted_layers() if measured else ():
        layer.start_learning("default")
    loop = BayesLoop(model, optimizer, total_steps=1000, step=step)
    loop.step_begin()
    for rows in torch.arange(ROWS).chunk(micro_batches):
        (model(input_ids=ids[rows], labels=labels[rows]).loss / micro_batches).backward()
    loop.before_optimizer_step()
    loop.step_end()
    layers = model.base_model.adapted_layers()
    return torch.cat([layer.evidence("default").rank_sketch for layer in layers], dim=1), step


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("num_labels", [1, 2])
def test_the_sketch_is_that_of_gradients_of_single_rows_with_drawn_labels(num_labels: int, measured: bool) -> None:
    model, ids, labels = watched_model(num_labels)
    found, step = sketches(model, ids, labels, 1, measured)
    passes = {float(layer.evidence("default").passes) for layer in model.base_model.adapted_layers()}
    assert passes == {float(measured)}
    diagonals = [layer.blora_E["default"] for layer in model.base_model.adapted_layers()]
    model.eval()  # training holds E
    rows = []
    for row in range(ROWS):
        logits = model(input_ids=ids[row : row + 1]).logits[0]
        # With two classes and with a Gaussian of variance 1/2 one derivative, up to its sign, has all of the Fisher
        # information: that of the difference of the logits times the standard deviation of a class, or of the mean.
        if num_labels == 1:
            scalar = logits[0] * 2**0.5
            sign = torch.sign(logits[0] - labels[row])
        else:
            p = torch.softmax(logits, -1).detach()
            scalar = (logits[1] - logits[0]) * p.prod().sqrt()
            sign = torch.tensor(1.0 if labels[row] == 0 else -1.0)
        gradients = torch.autograd.grad(scalar, diagonals)
        rows.append(sign * torch.cat([g * e.detach() for g, e in zip(gradients, diagonals, strict=True)]))
    dealt = deal({"input_ids": ids}, ROWS, step)
    expected = torch.zeros(BUCKETS, len(rows[0])).index_add_(
        0, dealt.buckets, dealt.signs[:, None] * torch.stack(rows)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_micro_batches_give_the_sketch_of_one_batch() -> None:
    (one, _), (four, _) = (sketches(*watched_model(3), micro_batches=n) for n in (1, 4))
    assert float(one.abs().max()) > 0
    torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)


def test_the_sketch_is_the_second_moment_on_average_over_deals() -> None:
    torch.manual_seed(0)
    gradients, ids = torch.randn(64, 5).double(), torch.randint(5, 3000, (64, 8))
    moments = torch.zeros(5, 5).double()
    for step in range(400):
        dealt = deal({"input_ids": ids}, 64, step)
        signed = dealt.signs.double().unsqueeze(1) * gradients
        sketch = torch.zeros(BUCKETS, 5).double().index_add_(0, dealt.buckets, signed)
        moments += sketch.T @ sketch / 400
    expected = gradients.T @ gradients
    torch.testing.assert_close(moments, expected, rtol=0, atol=0.05 * float(expected.diagonal().mean()))


def test_labels_that_the_model_would_draw_have_the_fisher_length() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 3)
    probability = torch.softmax(logits, -1)
    labels = torch.randint(3, (5,))
    given = (probability - torch.nn.functional.one_hot(labels, 3)).square().sum(1)
    lengths = (probability.unsqueeze(1) - torch.eye(3)).square().sum(2)  # of each label that may be drawn
    expected = ((probability * lengths).sum(1) / given).sqrt()
    factors = as_if_drawn(logits, labels, None)
    assert factors is not None
    torch.testing.assert_close(factors, expected)
    assert as_if_drawn(logits, None, None) is None


def test_a_run_keeps_no_sketch_after_its_last_decision() -> None:
    model, ids, labels = watched_model(2)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    loop = BayesLoop(model, optimizer, total_steps=24, num_examples=100)
    largest = 0
    for _ in range(24):
        loop.step_begin()
        model(input_ids=ids, labels=labels).loss.backward()
        loop.before_optimizer_step()
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
        layers = model.base_model.adapted_layers()
        largest = max(largest, len(layers[0].evidence("default").rank_sketch))
    assert largest == BUCKETS
    assert [len(layer.evidence("default").rank_sketch) for layer in layers] == [0] * len(layers)
    assert sum(layer.rank for layer in model.base_model.describe()) == 2 * len(layers)
