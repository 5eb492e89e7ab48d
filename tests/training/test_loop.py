"""A hand-written loop: the penalty counted once, gates that close, budgets met, phases that change nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayeslora import BayesLoop, BayesLoraError, BLoraConfig, describe, parameter_groups
from bayeslora.cost import relative_bops
from tests.methods.reference import D_IN, FROZEN, LEARN, WARM_UP, Tiny, all_widths, layers_of, seeded, tiny_model
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


def test_gates_and_ranges_have_no_optimizer_state_outside_their_phase() -> None:
    """Whatever has a gradient, as everything does under DDP: Adam would count the step."""
    model = tiny_model(WARM_UP, warmup_fraction=0.25, freeze_fraction=0.25)
    loop = BayesLoop(model, _optimizer(model), total_steps=24)
    gated = _named(model, ".blora_quantizers.", ".blora_rank.")
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
    model = tiny_model(LEARN, bit_penalty=0.3, rank_penalty=0.7)
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
        model = tiny_model(LEARN, bit_penalty=weight, rank_penalty=weight)
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
        model = tiny_model(LEARN)
        loop = BayesLoop(model, _optimizer(model), total_steps=100, step=60)
        loop.step_begin()
        loop.before_optimizer_step(scale)
        found.append({n: p.grad / scale for n, p in _named(model, *GATES).items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=0, rtol=1e-6)


def test_four_micro_batches_train_as_one_batch_does() -> None:
    states = []
    for accumulation in (1, 4):
        # The largest magnitude of four parts is that of the whole; the best range in least squares is not.
        model = tiny_model(WARM_UP, calibration="absmax", warmup_fraction=0.2, freeze_fraction=0.3)
        loop = BayesLoop(model, _optimizer(model, lr=1e-3), total_steps=10)
        for _ in range(10):
            _step(model, loop, accumulation)
        states.append(model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=2e-5, rtol=1e-4, msg=name)


# Gates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [20, 150])
def test_gates_nobody_resists_all_close_in_their_phase_at_the_derived_rate(steps: int) -> None:
    model = get_peft_model(seeded(Tiny), BLoraConfig(target_modules=["first", "second"], init_weights=False)).train()
    loop = BayesLoop(model, _optimizer(model), total_steps=steps)
    for _ in range(steps):
        _step(model, loop, task=0.0)
    for layer in describe(model):
        assert set(layer.bits.values()) == {2} and layer.rank == 1


def test_gates_that_only_the_task_moves_do_not_all_close() -> None:
    """The other end: without a penalty widths stay what the initial logits make them, up to what the task wants."""
    model = tiny_model(WARM_UP, bit_penalty=0.0, rank_penalty=0.0)
    for layer in layers_of(model):
        all_widths(layer, 8)
        layer.blora_rank["default"].logits.data.fill_(6.0)
    loop = BayesLoop(model, _optimizer(model), total_steps=20)
    for _ in range(20):
        _step(model, loop, task=0.0)
    assert all(set(layer.bits.values()) == {8} and layer.rank == 4 for layer in describe(model))


def test_gates_are_still_outside_their_phase_and_the_weights_schedule_is_left_alone() -> None:
    model = tiny_model(WARM_UP, warmup_fraction=0.3, freeze_fraction=0.3)
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


def _shares_under_a_budget(base: PreTrainedModel, mode: str, target: float) -> list[float]:
    """The share of bit operations before training and after each of 20 steps, of which the gates learn in 3 to 16."""
    config = BLoraConfig(
        r=4,
        target_modules=["query", "key", "value"],
        mode=mode,
        target_bops=target,
        bit_penalty=1e-6,
        rank_penalty=0.0,
        warmup_fraction=0.1,
        freeze_fraction=0.2,
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
    return shares


@pytest.mark.parametrize(("mode", "target"), [("q+ra", 0.25), ("q", 0.5)])
def test_a_budget_is_met_when_gates_freeze(mode: str, target: float, tiny_bert: PreTrainedModel) -> None:
    shares = _shares_under_a_budget(tiny_bert, mode, target)
    assert shares[0] == shares[1] > 0.8  # the warm-up is at full precision
    assert shares[-1] == shares[16] <= target


def test_a_budget_is_not_overshot_by_much(tiny_bert: PreTrainedModel) -> None:
    assert _shares_under_a_budget(tiny_bert, "q", 0.5)[-1] > 0.5 / 3


def test_a_penalty_under_a_budget_grows_above_it_and_shrinks_below_it() -> None:
    for share, grows in ((0.9, True), (0.1, False)):
        model = tiny_model(LEARN, target_bops=0.3)
        before = model.base_model.penalty()["bits"].item()
        model.base_model.update_budget_multiplier(share)
        assert (model.base_model.penalty()["bits"].item() > before) == grows


def test_closing_the_weakest_gate_lowers_one_width_by_one_step() -> None:
    model = tiny_model(LEARN, target_bops=0.3)
    for layer in layers_of(model):
        all_widths(layer, 8)
    weakest = layers_of(model)[1].blora_quantizers["default"]
    with torch.no_grad():
        weakest.gate_logits[weakest.kinds.index("E"), 1] = 0.5  # open, but less than any other
    assert model.base_model.close_lowest_gate()
    first, second = describe(model)
    assert set(first.bits.values()) == {8}
    assert second.bits == {**dict.fromkeys(first.bits, 8), "E": 4}
    for config in model.peft_config.values():
        config.fixed_bits = dict.fromkeys(set(first.bits) - {"B"}, 8)  # of these no gate is closed
    for layer in layers_of(model):
        all_widths(layer, 4)
    assert model.base_model.close_lowest_gate() and model.base_model.close_lowest_gate()
    assert [each.bits for each in describe(model)] == [{**dict.fromkeys(first.bits, 4), "B": 2}] * 2
    assert not model.base_model.close_lowest_gate()
    for config in model.peft_config.values():
        config.fixed_bits = None
    for layer in layers_of(model):
        all_widths(layer, 2)
    assert not model.base_model.close_lowest_gate()


# Resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 6, 10], ids=["warm-up", "gates learn", "frozen"])
def test_a_loop_resumed_from_its_saved_state_continues_bit_for_bit(at: int) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = tiny_model(WARM_UP, warmup_fraction=0.3, freeze_fraction=0.3, target_bops=0.3)
        return model, _optimizer(model)

    model, optimizer = start()
    loop = BayesLoop(model, optimizer, total_steps=12, seed=3)
    saved: Any = None
    for step in range(12):
        if step == at:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        _step(model, loop)

    again, optimizer = start()
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    loop = BayesLoop(again, optimizer, total_steps=12, seed=3, step=at)
    for _ in range(at, 12):
        _step(again, loop)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


# What it refuses ------------------------------------------------------------------------------------------------


def test_an_optimizer_without_the_groups_is_refused() -> None:
    model = tiny_model(WARM_UP)
    with pytest.raises(
        BayesLoraError, match="lacks a group for the bit gates, ranges, rank gates, weight ranges.*parameter_gr"
    ):
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
    model = tiny_model(WARM_UP, gate_learning_rate=1e-5)
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
    model = tiny_model(LEARN, bit_penalty=1.0, rank_penalty=1.0)
    for layer in layers_of(model):
        for p in (layer.blora_quantizers["default"].gate_logits, layer.blora_rank["default"].logits):
            p.data.fill_(50.0)
    loop = BayesLoop(model, _optimizer(model), total_steps=100, step=60)
    loop.step_begin()
    loop.before_optimizer_step()
    values = loop.statistics()
    assert values["penalty_bits"] == pytest.approx(56.0) and values["penalty_rank"] == pytest.approx(8.0)
    assert values["relative_bops"] == pytest.approx(relative_bops(model)["attention"])
