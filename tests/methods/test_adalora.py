"""AdaLoRA: PEFT's ranks step for step, every score against the reference, a budget that is met, exact resumption."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import bayeslora
from bayeslora import AdaLoraConfig, BayesLoraError, describe, parameter_groups, shrink
from bayeslora.methods.adalora import AdaLoraModel
from bayeslora.methods.adalora.importance import IMPORTANCES
from bayeslora.methods.adalora.orthogonality import distance_from_orthogonal
from bayeslora.methods.tuner import BayesTuner
from tests.conftest import build_tiny_gpt2
from tests.methods.adalora_models import (
    FIRST,
    STEPS,
    TARGET,
    Scored,
    WithPosterior,
    X,
    Y,
    adapter_of,
    advance,
    config,
    diagonals,
    loop_of,
    masks,
    randomized,
    scored,
)
from tests.methods.reference import D_IN, D_OUT, layers_of, seeded
from tests.oracles import adalora as oracle

FINAL = STEPS - 6


def _close(actual: Tensor, expected: Tensor, **kwargs: Any) -> None:
    torch.testing.assert_close(actual, expected, **{"atol": 1e-5, "rtol": 1e-5, **kwargs})


# PEFT's AdaLoRA, side by side ----------------------------------------------------------------------------------


def _theirs(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    settings = {"init_r": FIRST, "target_r": TARGET, "lora_alpha": 6, "total_step": STEPS, "beta2": 0.7}
    settings |= {"tinit": 3, "tfinal": 6, "deltaT": 2, "target_modules": ["first", "second"], **options}
    model = get_peft_model(seeded(Scored), peft.AdaLoraConfig(**settings)).train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)


def _ours_like(theirs: nn.Module, **options: Any) -> nn.Module:
    """The same start; PEFT divides by r + 1e-5."""
    model = scored(beta2=0.7, **options)
    for layer, other in zip(layers_of(model), _peft_layers(theirs), strict=True):
        for tensor, part in zip(layer.triplets("default"), "AEB", strict=True):
            tensor.data.copy_(getattr(other, f"lora_{part}")["default"].data.reshape(tensor.shape))
        layer.scaling["default"] = 6 / (FIRST + 1e-5)
    return model


def _peft_layers(model: nn.Module) -> list[Any]:
    return [model.base_model.model.first, model.base_model.model.second]


@pytest.mark.parametrize("weights", ["after the step", "that the gradient was taken at"])
@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_with_sensitivity_it_is_pefts_adalora_at_every_step(gamma: float, weights: str) -> None:
    """As documented, PEFT multiplies the gradient by the weights it has led to; told to do so, so does this one.

    With PEFT's own sensitivities taken before the step instead, nothing has to be told.
    """
    theirs, their_optimizer = _theirs(orth_reg_weight=gamma)
    model = _ours_like(theirs, orth_reg_weight=gamma)
    loop = loop_of(model, weight_decay=0.0)
    allocator, allocations = theirs.base_model.rankallocator, 0
    update = allocator.update_ipt
    for step in range(STEPS):
        theirs.base_model(X, Y).loss.backward()
        if weights != "after the step":
            allocator.update_ipt = lambda model: None
            if step + 1 < FINAL:
                update(theirs.base_model.model)
        their_optimizer.step()
        pattern = theirs.peft_config["default"].rank_pattern
        theirs.base_model.update_and_allocate(step + 1)
        their_optimizer.zero_grad()

        loop.step_begin()
        model(X, Y).loss.backward()
        loop.before_optimizer_step()
        loop.optimizer.step()
        if weights == "after the step":
            loop.tuner.observe(step, loop.optimizer)
        loop.step_end()
        loop.optimizer.zero_grad()

        found = theirs.peft_config["default"].rank_pattern
        if found is not pattern:
            allocations += 1
            assert masks(model) == list(found.values()), step
            assert sum(map(sum, found.values())) < 2 * FIRST
        for layer, other in zip(layers_of(model), _peft_layers(theirs), strict=True):
            for tensor, part in zip(layer.triplets("default"), "AEB", strict=True):
                _close(tensor.flatten(), getattr(other, f"lora_{part}")["default"].flatten(), atol=1e-4, rtol=1e-3)
    assert allocations == 6 and sum(map(sum, masks(model))) == 2 * TARGET


def test_a_layer_without_gradients_is_left_out_where_peft_stops() -> None:
    theirs, their_optimizer = _theirs()
    theirs.base_model.model.second.requires_grad_(False)
    theirs.base_model(X, Y).loss.backward()
    their_optimizer.step()
    with pytest.raises(TypeError):
        theirs.base_model.update_and_allocate(1)
    model = scored(orth_reg_weight=0.0)
    layers_of(model)[1].requires_grad_(False)
    loop = loop_of(model)
    for _ in range(STEPS):
        advance(loop)
    assert masks(model) == [[True] * FIRST, [False] * FIRST]


# The layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_forward_pass_is_the_references(kind: str) -> None:
    layer = layers_of(randomized(scored(kind)))[0]
    base = layer.base_layer.weight.T if kind == "conv1d" else layer.base_layer.weight
    _close(layer(X), oracle.forward(X, base, layer.base_layer.bias, adapter_of(layer)))
    assert layer.scaling["default"] == 6 / FIRST


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merging_and_exporting_give_the_same_function(kind: str, tmp_path: Path) -> None:
    model = randomized(scored(kind)).eval()
    with torch.no_grad():
        layers_of(model)[0].bayes_adalora_E["default"][1] = 0.0
        layers_of(model)[1].bayes_adalora_E["default"].zero_()
    expected = model(X).logits
    result = bayeslora.export(model, tmp_path)
    assert result["ranks"] == {"first": FIRST - 1, "second": 1}  # plain LoRA has no rank 0
    plain = PeftModel.from_pretrained(seeded(lambda: Scored(kind)), tmp_path).eval()
    _close(plain(X).logits, expected)
    model.merge_adapter()
    _close(model(X).logits, expected)
    model.unmerge_adapter()
    _close(model(X).logits, expected)
    with model.disable_adapter():
        _close(model(X).logits, seeded(lambda: Scored(kind))(X).logits)


def test_a_new_adapter_changes_nothing_and_has_no_rank_yet() -> None:
    model = scored()
    assert torch.equal(model(X).logits, seeded(Scored)(X).logits)
    first, second = describe(model)
    assert [first.rank, first.initial_rank, second.rank] == [0, FIRST, 0]
    assert first.parameters == FIRST * (D_IN + D_OUT + 1)
    a, e, b = layers_of(model)[0].triplets("default")
    assert not e.any() and 0.01 < a.std() < 0.03 and 0.01 < b.std() < 0.03


# The penalty ---------------------------------------------------------------------------------------------------


def test_the_penalty_and_its_gradient_are_the_references() -> None:
    model = randomized(scored(orth_reg_weight=0.3))
    parts = [layer.triplets("default") for layer in layers_of(model)]
    ((name, value),) = model.base_model.penalty().items()
    expected = oracle.orthogonality([oracle.Adapter(*part, 1.0) for part in parts], 0.3)
    assert name == "orthogonality"
    _close(value, expected)
    matrices = [matrix for a, _, b in parts for matrix in (a, b)]
    for found, wanted in zip(
        torch.autograd.grad(value, matrices), torch.autograd.grad(expected, matrices), strict=True
    ):
        assert wanted.abs().max() > 1e-3
        _close(found, wanted)
    assert scored(orth_reg_weight=0.0).base_model.penalty() == {}


def test_orthonormal_and_empty_matrices_have_no_distance_and_no_gradient() -> None:
    rows, empty = torch.eye(3, 5).requires_grad_(), torch.empty(0, 5, requires_grad=True)
    value = distance_from_orthogonal([rows, empty], [])
    assert value.item() == 0.0
    assert not any(gradient.any() for gradient in torch.autograd.grad(value, [rows, empty]))
    a, b = (torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in ((2, 4), (4, 2)))
    assert torch.autograd.gradcheck(lambda a, b: distance_from_orthogonal([a], [b, b * 2]), (a, b))


def test_the_gradient_in_closed_form_is_autograds_and_is_added_to_what_is_there() -> None:
    found = []
    for add_penalty in (BayesTuner.add_penalty, AdaLoraModel.add_penalty):
        model = randomized(scored(orth_reg_weight=0.3)).double()
        (a, _, b), (other_a, other_e, other_b) = (layer.triplets("default") for layer in layers_of(model))
        a.grad = torch.ones_like(a)
        value = add_penalty(model.base_model, [a, b, other_a, other_e], scale=8.0)["orthogonality"]
        assert other_b.grad is None and other_e.grad is None  # not asked for; not in the penalty
        assert a.grad.sub(1).abs().max() > 0.1
        found.append([value, a.grad, b.grad, other_a.grad])
    assert not found[0][0].requires_grad
    for by_hand, by_autograd in zip(*reversed(found), strict=True):
        _close(by_hand, by_autograd, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("importance", ["sensitivity", "snr_abs"])
def test_four_micro_batches_allocate_and_train_as_one_batch_does(importance: Any) -> None:
    found = []
    for accumulation in (1, 4):
        model = scored(importance=importance)
        loop = loop_of(model, WithPosterior)
        for _ in range(STEPS):
            advance(loop, accumulation)
        found.append(model)
    assert masks(found[0]) == masks(found[1])
    for name, value in found[0].state_dict().items():
        _close(found[1].state_dict()[name], value, atol=1e-4, rtol=1e-3, msg=name)


# Allocation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_each_allocation_keeps_what_the_reference_keeps(importance: Any) -> None:
    """A, E and B are anything, as are their gradients; the reference scores one element at a time."""
    model = randomized(scored(importance=importance, orth_reg_weight=0.0))
    loop = loop_of(model, WithPosterior)
    trained = [tensor for layer in layers_of(model) for tensor in layer.triplets("default")]
    averages = {id(p): [oracle.Averages() for _ in range(p.numel())] for p in trained}
    for step in range(FINAL):
        loop.step_begin()
        for p in trained:
            p.grad = torch.randn_like(p)
            if step + 1 < FINAL:
                for element, weight, gradient in zip(averages[id(p)], p.flatten(), p.grad.flatten(), strict=True):
                    element.observe(weight.item(), gradient.item())
        loop.before_optimizer_step()
        loop.optimizer.step()
        before = [tensor.detach().clone() for tensor in trained]
        loop.step_end()
        due = step + 1 == FINAL or (step + 1 > 3 and (step + 1) % 2 == 0)
        if not due:
            assert all(torch.equal(b, p) for b, p in zip(before, trained, strict=True))
            continue
        scores = []
        for p, value in zip(trained, before, strict=True):
            if importance == "sensitivity":
                elements = [element.score for element in averages[id(p)]]
            else:
                std = loop.optimizer.posterior(p)[1].flatten().tolist()  # type: ignore[attr-defined]
                pairs = zip(value.flatten().tolist(), std, strict=True)
                elements = [oracle.posterior_score(importance, m, s) for m, s in pairs]
            scores.append(torch.tensor(elements, dtype=torch.float64).view(p.shape))
        triplets = [oracle.triplets(*scores[i : i + 3]) for i in range(0, len(scores), 3)]
        allowed = oracle.budget(step + 1, 3, 6, STEPS, 2 * FIRST, 2 * TARGET)
        assert masks(model) == oracle.kept(triplets, allowed)


def test_a_masked_entry_may_grow_again_until_the_last_allocation_and_not_after() -> None:
    model = scored()
    loop, seen = loop_of(model), []
    for _ in range(STEPS):
        advance(loop)
        seen.append([value != 0 for row in diagonals(model) for value in row])
    assert sum(seen[5]) < 2 * FIRST and sum(seen[6]) == 2 * FIRST  # masked at step 6, grown at step 7
    assert sum(seen[FINAL - 1]) == 2 * TARGET
    assert all(mask == seen[FINAL - 1] for mask in seen[FINAL:])
    values = [value for row in diagonals(model) for value in row]
    assert [value != 0 for value in values] == seen[FINAL - 1]


def test_what_was_cut_stays_cut_when_noise_is_added_to_the_weights() -> None:
    model = scored()
    loop = loop_of(model)
    for _ in range(FINAL):
        advance(loop)
    expected = model(X).logits.detach()
    with torch.no_grad():
        for layer, row in zip(layers_of(model), masks(model), strict=True):
            layer.bayes_adalora_E["default"][~torch.tensor(row)] = 5.0
    _close(model(X).logits, expected)
    loop.step_begin()
    model(X, Y).loss.backward()
    for layer in layers_of(model):
        gradient = layer.bayes_adalora_E["default"].grad
        assert [bool(g) for g in gradient] == [bool(m) for m in layer.adalora_mask["default"]]


def test_weights_from_before_the_last_allocation_bring_their_ranks_back() -> None:
    model = scored()
    loop = loop_of(model)
    for _ in range(FINAL - 1):
        advance(loop)
    full, expected = copy.deepcopy(model.state_dict()), model(X).logits.detach()
    advance(loop)
    cut, after = copy.deepcopy(model.state_dict()), model(X).logits.detach()
    model.load_state_dict(cut)
    assert all("default" in layer.adalora_mask for layer in layers_of(model)) and torch.equal(model(X).logits, after)
    model.load_state_dict(full)
    assert torch.equal(model(X).logits, expected)


@pytest.mark.parametrize("importance", ["sensitivity", "snr_abs"])
@pytest.mark.parametrize("stop", [7, FINAL - 1, FINAL, FINAL + 2])
def test_a_resumed_run_continues_bit_for_bit(stop: int, importance: Any) -> None:
    straight = scored(importance=importance)
    loop = loop_of(straight, WithPosterior)
    for step in range(STEPS):
        if step == stop:
            weights = copy.deepcopy(straight.state_dict())
            state = copy.deepcopy(loop.optimizer.state_dict())
        advance(loop)
        if step == stop:
            logged = loop.statistics()
    resumed = scored(importance=importance)
    resumed.load_state_dict(weights)
    optimizer = WithPosterior(parameter_groups(resumed, lr=1e-2))
    optimizer.load_state_dict(state)
    loop = loop_of(resumed, optimizer, step=stop)
    advance(loop)
    told = loop.statistics()
    assert told["rank_budget"] == logged["rank_budget"]
    assert stop < FINAL or {**told, "std_variation": 0} == {**logged, "std_variation": 0}
    for _ in range(stop + 1, STEPS):
        advance(loop)
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in straight.state_dict().items())


def test_a_loss_scale_leaves_the_importance_as_it_is() -> None:
    found = []
    for scale in (1.0, 1024.0):
        model = randomized(scored())
        loop = loop_of(model)
        loop.step_begin()
        (model(X, Y).loss * scale).backward()
        loop.before_optimizer_step(scale)
        loop.step_end()
        found.append([loop.optimizer.state[p]["importance"] for p in layers_of(model)[0].triplets("default")])
    for one, other in zip(*found, strict=True):
        assert one.any()
        _close(other, one, rtol=1e-4, atol=1e-9)


# Ranks, files, words -------------------------------------------------------------------------------------------


def test_ranks_are_described_cut_saved_and_reloaded_zero_included(tmp_path: Path) -> None:
    model = scored(target_r=1)
    loop = loop_of(model)
    for _ in range(STEPS):
        advance(loop)
    assert sum(layer.rank for layer in describe(model)) == 2
    with torch.no_grad():
        layers_of(model)[1].bayes_adalora_E["default"].zero_()
    ranks = [layer.rank for layer in describe(model)]
    assert ranks[1] == 0 and sum(ranks) <= 2
    model.eval()
    expected, scaling = model(X).logits, layers_of(model)[0].scaling["default"]
    assert shrink(model) == {"first": ranks[0], "second": 0}
    _close(model(X).logits, expected, atol=1e-6)
    assert layers_of(model)[0].bayes_adalora_A["default"].shape == (ranks[0], D_IN)
    assert [layer.initial_rank for layer in describe(model)] == [FIRST, FIRST]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(seeded(Scored), tmp_path).eval()
    assert layers_of(again)[0].scaling["default"] == scaling
    _close(again(X).logits, expected, atol=1e-6)
    assert [layer.rank for layer in describe(again)] == ranks


def test_the_log_says_the_budget_the_ranks_and_how_much_deviations_vary() -> None:
    model = scored(importance="snr_abs")
    loop = loop_of(model, WithPosterior)
    advance(loop)
    values = loop.statistics()
    assert values["rank_budget"] == 2 * FIRST and values["mean_rank"] == FIRST and "std_variation" not in values
    for _ in range(STEPS - 1):
        advance(loop)
    values = loop.statistics()
    assert values["rank_budget"] == 2 * TARGET and values["mean_rank"] == TARGET
    ranks = {layer.name: layer.rank for layer in describe(model)}
    assert values["rank/first"] == ranks["first"] and values["rank/second"] == ranks["second"]
    trained = [tensor for layer in layers_of(model) for tensor in layer.triplets("default")]
    stds = torch.cat([loop.optimizer.posterior(p)[1].flatten() for p in trained])  # type: ignore[attr-defined]
    assert values["std_variation"] == pytest.approx(float(stds.std() / stds.mean()), rel=1e-5)
    assert values["penalty_orthogonality"] > 0


@pytest.mark.parametrize("importance", ["snr", "snr_abs", "inverse_std", "mean_abs"])
def test_a_score_that_needs_a_posterior_is_refused_without_one(importance: Any) -> None:
    with pytest.raises(BayesLoraError, match=f"importance '{importance}' needs the posterior of the weights"):
        loop_of(scored(importance=importance))


@pytest.mark.parametrize("importance", ["sensitivity", "magnitude"])
def test_one_that_does_not_allocates_with_adamw_alone(importance: Any) -> None:
    model = scored(importance=importance)
    loop = loop_of(model)
    for _ in range(FINAL):
        advance(loop)
    assert sum(map(sum, masks(model))) == 2 * TARGET and "std_variation" not in loop.statistics()


def test_schedules_that_cannot_work_are_refused_before_the_first_step() -> None:
    with pytest.raises(BayesLoraError, match="tinit 3 and tfinal 6 leave none of 9 steps to allocate ranks in"):
        loop_of(scored(), steps=9)
    with pytest.raises(BayesLoraError, match="have 4 ranks and target_r 3 leaves 6, but some must be cut"):
        loop_of(scored(rank_pattern={"first": 2, "second": 2}))
    loop = loop_of(scored(tinit=None, tfinal=None), steps=100)
    assert (loop.tuner.run_state().warm_up_end, loop.tuner.run_state().final_step) == (10, 60)  # type: ignore[attr-defined]
    loop_of(scored(tinit=None, tfinal=None), steps=1)


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"importance": "x"}, "importance is 'x', but must be 'sensitivity', 'snr', .* or 'mean_abs'"),
    ({"target_r": 12}, "target_r is 12, but must be at least 0 and below init_r = 12"),
    ({"target_r": -1}, "target_r is -1, but must be"),
    ({"init_r": 0}, "init_r is 0, but must be at least 1"),
    ({"deltaT": 0}, "deltaT is 0, but must be at least 1"),
    ({"tinit": -1}, "tinit is -1, but must be at least 0"),
    ({"tfinal": -1}, "tfinal is -1, but must be at least 0"),
    ({"beta1": 1.0}, "beta1 is 1.0, but must be between 0 and 1"),
    ({"beta2": 0.0}, "beta2 is 0.0, but must be between 0 and 1"),
    ({"orth_reg_weight": -0.1}, "orth_reg_weight is -0.1, but must be at least 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(options) for options, _ in BAD_OPTIONS])
def test_options_that_cannot_work_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BayesLoraError, match=message) as caught:
        AdaLoraConfig(**{"target_modules": ["first"], **options})
    assert "\n" not in str(caught.value)


def test_the_configuration_survives_a_file_and_r_is_no_option(tmp_path: Any) -> None:
    options = config(init_r=5, tinit=None)
    options.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is AdaLoraConfig and again.to_dict() == options.to_dict() and again.r == 5
    with pytest.raises(TypeError, match="'r'"):
        AdaLoraConfig(r=5)  # type: ignore[call-arg]


def test_a_trainer_allocates_and_its_evaluation_loss_has_no_penalty(
    tiny_bert: PreTrainedModel, tmp_path: Path
) -> None:
    rows = [{"input_ids": [2, 5 + i % 9, 7 + i % 4, 3], "labels": i % 2} for i in range(16)]
    options = config(target_modules=["query", "key", "value"], tinit=2, tfinal=2, orth_reg_weight=10.0)
    model = get_peft_model(tiny_bert, options)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, logging_steps=1, use_cpu=True, save_strategy="no",
        report_to="none", disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = bayeslora.attach(Trainer(model, arguments, train_dataset=rows, eval_dataset=rows))
    trainer.train()
    assert sum(layer.rank for layer in describe(model)) == 6 * TARGET
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(model(**batch).loss.item(), abs=1e-4)
    logged = [entry for entry in trainer.state.log_history if "rank_budget" in entry]
    assert [entry["rank_budget"] for entry in logged][-1] == 6 * TARGET and logged[0]["rank_budget"] == 6 * FIRST
    assert logged[-1]["penalty_orthogonality"] > 1


def test_gpt2_trains_under_its_fused_projection() -> None:
    model = get_peft_model(build_tiny_gpt2(), config(target_modules=["c_attn"], init_weights=False))
    tokens = torch.arange(12).view(2, 6)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.any() for layer in layers_of(model) for p in layer.triplets("default"))
