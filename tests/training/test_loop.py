"""A hand-written loop: the penalty counted once, gates that close, budgets met, phases that change nothing."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayeslora import BayesLoop, BayesLoraError, BLoraConfig, describe, parameter_groups
from bayeslora.cost import bops_cost, bytes_cost, relative_bops
from bayeslora.methods.allocation import CostModel
from tests.methods.reference import (
    D_IN,
    FROZEN,
    LEARN,
    WARM_UP,
    Tiny,
    all_widths,
    layers_of,
    seeded,
    tiny_model,
    used_by_weights,
)
from tests.oracles import blora as oracle

X = torch.randn(8, D_IN, generator=torch.Generator().manual_seed(7))
Y = torch.arange(8) % 3
GATES = ("gates", "blora_rank.default.logits")


def _optimizer(model: nn.Module, lr: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, lr=lr), **options)


def _step(model: nn.Module, loop: BayesLoop, accumulation: int = 1, task: float = 1.0) -> float:
    """One optimizer step on the whole batch in equal micro-batches; returns the mean loss."""
    loop.step_begin()
    total = 0.0
    for x, y in zip(X.chunk(accumulation), Y.chunk(accumulation), strict=True):
        loss = nn.functional.cross_entropy(model(x), y) / accumulation
        (task * loss).backward()
        total += loss.item()
    loop.before_optimizer_step()
    loop.optimizer.step()
    loop.step_end()
    loop.optimizer.zero_grad()
    return total


def _named(model: nn.Module, *parts: str) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad and any(part in n for part in parts)}


def _snapshot(model: nn.Module, *parts: str) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in _named(model, *parts).items()}


@pytest.mark.parametrize("gates", ["evidence", "paper"])
def test_gates_and_ranges_have_no_optimizer_state_outside_their_phase(gates: str) -> None:
    """Whatever has a gradient, as everything does under DDP: Adam would count the step."""
    model = tiny_model(WARM_UP, gates=gates, warmup_fraction=0.25, freeze_fraction=0.25)
    loop = BayesLoop(model, _optimizer(model), total_steps=24)
    gated = _named(model, ".blora_quantizers.", ".blora_rank.")
    assert gates == "paper" or {name.rpartition(".")[2] for name in gated} == {"log_ranges"}
    counted = []
    for _ in range(24):
        loop.step_begin()
        nn.functional.cross_entropy(model(X), Y).backward()
        for p in _named(model, "").values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        loop.before_optimizer_step()
        loop.optimizer.step()
        loop.step_end()
        loop.optimizer.zero_grad()
        counted.append({int(loop.optimizer.state.get(p, {}).get("step", 0)) for p in gated.values()})
    assert counted == [{0}] * 6 + [{step} for step in range(1, 13)] + [{12}] * 6


# The penalty ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_penaltys_gradient_is_added_once_whatever_the_accumulation(accumulation: int) -> None:
    model = tiny_model(LEARN, gates="paper", bit_penalty=0.3, rank_penalty=0.7)
    loop = BayesLoop(model, _optimizer(model), total_steps=100, step=60)
    loop.step_begin()
    for x in X.chunk(accumulation):
        (model(x).sum() * 0).backward()
    loop.before_optimizer_step()
    layers = layers_of(model)
    gates = [layer.blora_quantizers["default"].gate_logits for layer in layers]
    ranks = [layer.blora_rank["default"].logits for layer in layers]
    penalty = 0.3 * oracle.bit_penalty(torch.cat(gates), torch.ones(14, 4))
    penalty = penalty + 0.7 * sum(oracle.rank_penalty(logits) for logits in ranks)
    for p, expected in zip([*gates, *ranks], torch.autograd.grad(penalty, [*gates, *ranks]), strict=True):
        torch.testing.assert_close(p.grad, expected, atol=1e-6, rtol=1e-5)
    assert not any(p.grad.any() for p in _named(model, "blora_A", "blora_B", "blora_E", "head").values())


def test_it_is_added_to_the_tasks_gradient() -> None:
    gradients = {}
    for weight in (0.0, 0.5):
        model = tiny_model(LEARN, gates="paper", bit_penalty=weight, rank_penalty=weight)
        loop = BayesLoop(model, _optimizer(model), total_steps=100, step=60)
        loop.step_begin()
        nn.functional.cross_entropy(model(X), Y).backward()
        task = {name: p.grad.clone() for name, p in _named(model, "").items() if p.grad is not None}
        loop.before_optimizer_step()
        gradients[weight] = {name: p.grad - task[name] for name, p in _named(model, "").items() if name in task}
    assert not any(g.any() for g in gradients[0.0].values())
    assert all(g.any() == any(part in name for part in GATES) for name, g in gradients[0.5].items())


def test_a_loss_scale_multiplies_the_penalty_so_that_unscaling_leaves_it() -> None:
    found = []
    for scale in (1.0, 1024.0):
        model = tiny_model(LEARN, gates="paper")
        loop = BayesLoop(model, _optimizer(model), total_steps=100, step=60)
        loop.step_begin()
        loop.before_optimizer_step(scale)
        found.append({n: p.grad / scale for n, p in _named(model, *GATES).items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=0, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"gates": "paper", "calibration": "absmax"},
        # Ranges of activations are means over micro-batches; those of four parts are not those of the whole.
        {"fixed_bits": dict.fromkeys(("A_out", "E_out", "out"), 32), "target_bops": 0.4, "target_rank": 2.5},
        {"mode": "ra", "target_rank": 2.5},
    ],
    ids=["paper", "evidence", "ranks by evidence"],
)
def test_four_micro_batches_train_as_one_batch_does(options: dict[str, Any]) -> None:
    states = []
    for accumulation in (1, 4):
        # The largest magnitude of four parts is that of the whole; the best range in least squares is not.
        model = tiny_model(WARM_UP, warmup_fraction=0.2, freeze_fraction=0.3, **options)
        loop = BayesLoop(model, _optimizer(model, lr=1e-3), total_steps=10)
        for _ in range(10):
            _step(model, loop, accumulation)
        # How many passes evidence took is that of the micro-batches.
        states.append({name: v for name, v in model.state_dict().items() if not name.endswith((".passes", ".ranges"))})
    for name, value in states[0].items():
        one, two = value, states[1][name]
        if "fixed_bits" in options:
            one, two = used_by_weights(name, one), used_by_weights(name, two)
        torch.testing.assert_close(two, one, atol=2e-5, rtol=1e-4, msg=name)


# Gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [20, 150])
def test_gates_nobody_resists_all_close_in_their_phase_at_the_derived_rate(steps: int) -> None:
    model = get_peft_model(
        seeded(Tiny), BLoraConfig(gates="paper", target_modules=["first", "second"], init_weights=False)
    ).train()
    loop = BayesLoop(model, _optimizer(model), total_steps=steps)
    for _ in range(steps):
        _step(model, loop, task=0.0)
    for layer in describe(model):
        assert set(layer.bits.values()) == {2} and layer.rank == 1


def test_gates_that_only_the_task_moves_do_not_all_close() -> None:
    """The other end: without a penalty widths stay what the initial logits make them, up to what the task wants."""
    model = tiny_model(WARM_UP, gates="paper", bit_penalty=0.0, rank_penalty=0.0)
    for layer in layers_of(model):
        all_widths(layer, 8)
        layer.blora_rank["default"].logits.data.fill_(6.0)
    loop = BayesLoop(model, _optimizer(model), total_steps=20)
    for _ in range(20):
        _step(model, loop, task=0.0)
    assert all(set(layer.bits.values()) == {8} and layer.rank == 4 for layer in describe(model))


def test_gates_are_still_outside_their_phase_and_the_weights_schedule_is_left_alone() -> None:
    model = tiny_model(WARM_UP, gates="paper", warmup_fraction=0.3, freeze_fraction=0.3)
    optimizer = _optimizer(model, lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)
    loop = BayesLoop(model, optimizer, total_steps=10)
    for step in range(10):
        gates, weights = _snapshot(model, *GATES), _snapshot(model, "blora_A", "blora_B")
        weight_ranges = _snapshot(model, "log_weight_range")
        calibrated = step == 2  # the step that ends the warm-up writes the ranges
        _step(model, loop)
        rates = {group["bayeslora_role"]: group["lr"] for group in optimizer.param_groups}
        assert rates["weights"] == pytest.approx(0.02 * (1 - step / 10))
        learns = 3 <= step < 7
        assert (rates["bit gates"] > 0) == (rates["rank gates"] > 0) == (rates["weight ranges"] > 0) == learns
        assert all(torch.equal(p, gates[n]) != learns for n, p in _named(model, *GATES).items()), step
        assert all(not torch.equal(p, weights[n]) for n, p in _named(model, "blora_A", "blora_B").items()), step
        if not calibrated:
            assert all(
                torch.equal(p, weight_ranges[n]) != learns for n, p in _named(model, "log_weight_range").items()
            )
        schedule.step()


def test_weights_train_on_the_deployed_network_once_gates_are_frozen() -> None:
    """In the frozen phase training and evaluation are one function, and the loss goes on falling."""
    model = tiny_model(WARM_UP, warmup_fraction=0.1, freeze_fraction=0.6)
    loop = BayesLoop(model, _optimizer(model, lr=3e-3), total_steps=60)
    losses = [_step(model, loop) for _ in range(30)]
    widths = [layer.bits for layer in describe(model)]
    assert torch.equal(model.train()(X), model.eval()(X))
    model.train()
    frozen = [_step(model, loop) for _ in range(30)]
    assert [layer.bits for layer in describe(model)] == widths
    assert frozen[-1] < frozen[0] and frozen[-1] < losses[0]


@pytest.mark.parametrize("options", [{}, {"betas": (0.5, 0.9)}, {"fused": True}, {"foreach": True}])
def test_any_adam_drives_it(options: dict[str, Any]) -> None:
    model = tiny_model(WARM_UP)
    loop = BayesLoop(model, _optimizer(model, **options), total_steps=12)
    for _ in range(12):
        _step(model, loop)
    assert int(layers_of(model)[0].blora_progress["default"].phase) == int(FROZEN)


@pytest.mark.parametrize("mode", ["q", "ra", "q+ra"])
def test_stochastic_gradient_descent_drives_it_in_every_mode(mode: str) -> None:
    model = tiny_model(WARM_UP, mode=mode)
    loop = BayesLoop(model, torch.optim.SGD(parameter_groups(model, lr=0.1)), total_steps=12)
    losses = [_step(model, loop) for _ in range(12)]
    assert int(layers_of(model)[0].blora_progress["default"].phase) == int(FROZEN)
    assert all(torch.tensor(losses).isfinite())


# The budget -----------------------------------------------------------------------------------------------------


def _run_under_a_budget(base: PreTrainedModel, **options: Any) -> tuple[nn.Module, list[float]]:
    """A model and its share of bit operations before training and after each of 20 steps; gates move in 3 to 16."""
    config = BLoraConfig(
        r=4,
        target_modules=["query", "key", "value"],
        warmup_fraction=0.1,
        freeze_fraction=0.2,
        init_weights=False,
        **options,
    )
    model = get_peft_model(base, config).train()
    loop = BayesLoop(model, _optimizer(model, lr=1e-3), total_steps=20)
    tokens = torch.arange(16).view(2, 8)
    shares = [relative_bops(model)["attention"]]
    for _ in range(20):
        loop.step_begin()
        model(input_ids=tokens, labels=torch.tensor([0, 1])).loss.backward()
        loop.before_optimizer_step()
        loop.optimizer.step()
        loop.step_end()
        loop.optimizer.zero_grad()
        shares.append(relative_bops(model)["attention"])
    return model, shares


def _fits(model: nn.Module, cost: CostModel, target: float, mode: str) -> list[Any]:
    """The gates of a small model that could be opened without leaving the budget, one at a time."""
    found: list[Any] = []
    now = cost.share({}, {})
    for layer in describe(model):
        for kind, bits in layer.bits.items():
            wider = {(layer.name, kind): 2 * bits}
            if bits < 32 and now < cost.share(wider, {}) <= target:
                found.append((layer.name, kind))
        if (
            mode != "q"
            and layer.rank < layer.initial_rank
            and now < cost.share({}, {layer.name: layer.rank + 1}) <= target
        ):
            found.append(layer.name)
    return found


def _mean_rank(model: nn.Module) -> float:
    ranks = [layer.rank for layer in describe(model)]
    return sum(ranks) / len(ranks)


@pytest.mark.parametrize(
    ("mode", "target"), [("q+ra", 0.6), ("q+ra", 0.25), ("q+ra", 0.05), ("q", 0.5), ("q", 0.25), ("q", 0.1)]
)
def test_a_budget_of_bit_operations_is_met_when_gates_freeze(
    mode: str, target: float, tiny_bert: PreTrainedModel
) -> None:
    model, shares = _run_under_a_budget(tiny_bert, mode=mode, target_bops=target)
    assert shares[0] == shares[2] > 0.8  # the warm-up is at full precision
    assert shares[-1] == shares[16]
    assert shares[-1] <= target
    assert shares[-1] >= 0.98 * target or not _fits(model, bops_cost(model, "attention"), target, mode)
    # A decision at the full budget may spend what the one before it has left.
    assert all(after <= max(before, target) for before, after in itertools.pairwise(shares))


@pytest.mark.parametrize(("mode", "target"), [("q+ra", 0.5), ("q+ra", 0.2), ("q", 0.4), ("q", 0.15)])
def test_a_budget_of_bytes_is_met(mode: str, target: float, tiny_bert: PreTrainedModel) -> None:
    model, _ = _run_under_a_budget(tiny_bert, mode=mode, target_bytes=target)
    share = bytes_cost(model).share({}, {})
    assert share <= target
    assert share >= 0.98 * target or not _fits(model, bytes_cost(model), target, mode)


@pytest.mark.parametrize(("mode", "target"), [("ra", 3.5), ("ra", 2.0), ("ra", 0.5), ("q+ra", 1.5)])
def test_a_mean_rank_is_met(mode: str, target: float, tiny_bert: PreTrainedModel) -> None:
    model, _ = _run_under_a_budget(
        tiny_bert, mode=mode, target_rank=target, **({"bops_price": 0.0} if "q" in mode else {})
    )
    assert _mean_rank(model) == target


@pytest.mark.parametrize("rank", [2.0, 3.0])
def test_ranks_and_bit_operations_have_budgets_of_their_own(rank: float, tiny_bert: PreTrainedModel) -> None:
    model, shares = _run_under_a_budget(tiny_bert, target_rank=rank, target_bops=0.25)
    assert 0.98 * 0.25 <= shares[-1] <= 0.25
    assert rank - 0.5 <= _mean_rank(model) <= rank


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bops": 1e-4}, "target_bops is 0.0001, but the least share that these widths and ranks can reach is"),
        ({"target_bytes": 1e-4, "mode": "q"}, "target_bytes is 0.0001, but the least share"),
        ({"target_bops": 0.1, "fixed_bits": {"weight": 32}}, "products with an operand fixed at 32 bits"),
    ],
)
def test_a_budget_out_of_reach_is_refused_before_the_first_step(
    options: dict[str, Any], message: str, tiny_bert: PreTrainedModel
) -> None:
    model = get_peft_model(tiny_bert, BLoraConfig(r=4, target_modules=["query", "key", "value"], **options))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BayesLoraError, match=message) as caught:
        BayesLoop(model, _optimizer(model), total_steps=100)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# Resuming -------------------------------------------------------------------------------------------------------


def _resumed_at_every_step(steps: int, at: list[int], **options: Any) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny_model(WARM_UP, warmup_fraction=0.3, freeze_fraction=0.3, **options)
        return model, _optimizer(model)

    model, optimizer = start()
    loop = BayesLoop(model, optimizer, total_steps=steps, seed=3)
    saved: dict[int, Any] = {}
    for step in range(steps):
        if step in at:
            saved[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        _step(model, loop)

    for step in at:
        again, optimizer = start()
        again.load_state_dict(saved[step][0])
        optimizer.load_state_dict(saved[step][1])
        loop = BayesLoop(again, optimizer, total_steps=steps, seed=3, step=step)
        for _ in range(step, steps):
            _step(again, loop)
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), f"resumed at {step}: {name}"
        assert [layer.to_dict() for layer in describe(again)] == [layer.to_dict() for layer in describe(model)]


@pytest.mark.parametrize(
    "options",
    [
        {"gates": "paper"},
        {"target_bops": 0.3},
        {"target_bytes": 0.3, "target_rank": 2.0},
        {"mode": "ra"},
        {"mode": "q", "target_bops": 0.3, "rank_pattern": {"second": 14}},
        {"bops_price": 0.5, "rank_price": 0.1},
    ],
    ids=lambda options: ", ".join(options),
)
def test_a_loop_resumed_from_its_saved_state_continues_bit_for_bit(options: dict[str, Any]) -> None:
    """In the warm-up, between decisions of the gates and while they are frozen."""
    _resumed_at_every_step(12, [1, 2, 3, 4, 5, 6, 7, 10], **options)


def test_a_loop_resumed_between_two_passes_of_one_decision_continues_bit_for_bit() -> None:
    steps = 600
    loop = BayesLoop(model := tiny_model(WARM_UP, warmup_fraction=0.3, freeze_fraction=0.3), _optimizer(model), steps)
    schedule = loop.tuner.run_state().schedule
    between = [step for step in schedule.passes if step - 1 in schedule.passes]
    assert len(between) == len(schedule.decisions) == 4
    _resumed_at_every_step(steps, [min(between), max(between)], target_bops=0.3, target_rank=2.5)


# What it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gates", "lacking"), [("evidence", "ranges"), ("paper", "bit gates, ranges, rank gates, weight ranges")]
)
def test_an_optimizer_without_the_groups_is_refused(gates: str, lacking: str) -> None:
    model = tiny_model(WARM_UP, gates=gates)
    with pytest.raises(BayesLoraError, match=f"lacks a group for the {lacking}, .*parameter_gr"):
        BayesLoop(model, torch.optim.AdamW(model.parameters()), total_steps=100)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: get_peft_model(m, LoraConfig(target_modules=["first"]))])
def test_a_model_without_our_adapter_is_refused(wrap: Any) -> None:
    model = wrap(Tiny())
    with pytest.raises(BayesLoraError, match="needs an adapter of bayeslora or IVON: wrap it with"):
        BayesLoop(model, _optimizer(model), total_steps=100)


def test_a_run_that_cannot_work_is_refused_when_the_loop_is_made() -> None:
    model = tiny_model(WARM_UP)
    with pytest.raises(BayesLoraError, match="train longer"):
        BayesLoop(model, _optimizer(model), total_steps=2)
    model = tiny_model(WARM_UP, gates="paper", gate_learning_rate=1e-5)
    with pytest.raises(BayesLoraError, match="cannot close"):
        BayesLoop(model, _optimizer(model), total_steps=100)


def test_two_active_adapters_are_refused() -> None:
    model = tiny_model(WARM_UP)
    model.add_adapter("other", BLoraConfig(r=2, target_modules=["first"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(
        BayesLoraError, match="adapters \\['default', 'other'\\] are active, but one is trained at a time"
    ):
        BayesLoop(model, _optimizer(model), total_steps=100)


def test_a_wrapped_model_is_looked_into() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = tiny_model(WARM_UP)
    assert BayesLoop(Wrapper(model), _optimizer(model), total_steps=100).tuner is model.base_model


def test_statistics_hold_the_penalty_that_was_added() -> None:
    model = tiny_model(LEARN, gates="paper", bit_penalty=1.0, rank_penalty=1.0)
    for layer in layers_of(model):
        for p in (layer.blora_quantizers["default"].gate_logits, layer.blora_rank["default"].logits):
            p.data.fill_(50.0)
    loop = BayesLoop(model, _optimizer(model), total_steps=100, step=60)
    loop.step_begin()
    loop.before_optimizer_step()
    values = loop.statistics()
    assert values["penalty_bits"] == pytest.approx(56.0) and values["penalty_rank"] == pytest.approx(8.0)
    assert values["relative_bops"] == pytest.approx(relative_bops(model)["attention"])
