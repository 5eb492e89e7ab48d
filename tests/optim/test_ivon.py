"""IVON against its equations, and every way that an implementation of it can go wrong quietly."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeslora import BayesLoraError
from bayeslora.optim import IVON, _flat
from tests.oracles import ivon as oracle

SHAPES = ((3, 5), (4,), (), (2, 0), (7, 3))


def _parameters(
    dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def _loss(parameters: list[nn.Parameter]) -> Tensor:
    """Curved, and different for every element."""
    return sum(((p * (index + 1)).sin() + p.square() / 2).sum() for index, p in enumerate(parameters))  # type: ignore[return-value]


def _take_steps(optimizer: IVON, parameters: list[nn.Parameter], steps: int) -> None:
    for _ in range(steps):
        optimizer.sample()
        optimizer.zero_grad()
        _loss(parameters).backward()
        optimizer.step()


def _values(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# The equations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("options", [{}, {"clip_radius": 0.5, "rescale_lr": False}], ids=["plain", "clipped"])
def test_steps_are_those_of_the_equations(samples: int, options: dict[str, Any]) -> None:
    parameters = _parameters(torch.float64)
    settings = {"lr": 0.1, "ess": 50.0, "hess_init": 0.5, "betas": (0.8, 0.9), "weight_decay": 0.02, **options}
    second = {**settings, "lr": 0.3, "hess_init": 2.0, "betas": (0.7, 0.95)}
    optimizer = IVON(
        [{"params": parameters[:3]}, {"params": parameters[3:], **second}], mc_samples=samples, **settings
    )
    chosen = [oracle.Options(**settings)] * 3 + [oracle.Options(**second)] * 2
    known = [
        [oracle.Weight(m, 0.0, o.hess_init) for m in p.flatten().tolist()]
        for p, o in zip(parameters, chosen, strict=True)
    ]
    for _ in range(4):
        draws, gradients = [], []
        for sample in range(samples):
            optimizer.sample()
            optimizer.zero_grad()
            draws.append([p.flatten().tolist() for p in parameters])
            _loss(parameters).backward()
            gradients.append([p.grad.flatten().tolist() for p in parameters])
            if samples > 1:
                optimizer.pair()
                assert (parameters[0].grad is None) == (sample < samples - 1)
        optimizer.step()
        known = [
            [
                oracle.step(w, [d[i][j] for d in draws], [g[i][j] for g in gradients], chosen[i])
                for j, w in enumerate(weights)
            ]
            for i, weights in enumerate(known)
        ]
        for index, parameter in enumerate(parameters):
            state = optimizer.state[parameter]
            for tensor, name in ((parameter, "m"), (state["momentum"], "g"), (state["hessian"], "h")):
                expected = torch.tensor([getattr(w, name) for w in known[index]], dtype=torch.float64)
                torch.testing.assert_close(tensor.detach().flatten(), expected, atol=1e-10, rtol=1e-10)
            deviations = [oracle.deviation(w, chosen[index]) for w in known[index]]
            found = optimizer.posterior(parameter)[1].flatten()
            torch.testing.assert_close(found, torch.tensor(deviations, dtype=torch.float64), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("samples", [1, 2])
def test_the_pieces_that_buffers_are_worked_on_in_change_nothing(
    samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for length in (1 << 20, 16, 24):  # all at once, a parameter or a part of one at a time, across their borders
        monkeypatch.setattr(_flat, "_PIECE", length)
        parameters = _parameters(torch.float64)
        optimizer = IVON(parameters, lr=0.1, ess=50.0, betas=(0.8, 0.9), clip_radius=0.5, mc_samples=samples)
        for _ in range(3):
            optimizer.step(functools.partial(_backward, optimizer, parameters))
        found.append([*_values(parameters), *(optimizer.state[p]["hessian"].clone() for p in parameters)])
    for pieces in found[1:]:
        torch.testing.assert_close(pieces, found[0], atol=1e-12, rtol=1e-12)


def _backward(optimizer: IVON, parameters: list[nn.Parameter]) -> Tensor:
    optimizer.zero_grad()
    loss = _loss(parameters)
    loss.backward()
    return loss.detach()


def test_draws_have_the_posteriors_deviation_and_differ_by_step_and_sample() -> None:
    parameter = nn.Parameter(torch.zeros(200, 50))
    optimizer = IVON([parameter], lr=0.1, ess=100.0, hess_init=0.3, weight_decay=0.1, mc_samples=2)
    optimizer.sample()
    first = parameter.detach().clone()
    assert first.std() == pytest.approx(optimizer.posterior(parameter)[1][0, 0].item(), rel=0.05)
    assert abs(first.mean()) < 0.01
    assert optimizer.is_drawn
    parameter.grad = torch.ones_like(parameter)
    optimizer.pair()
    assert not parameter.any() and not optimizer.is_drawn
    optimizer.sample()
    second = parameter.detach().clone()
    optimizer.restore()
    optimizer.sample(step=1)
    draws = [first, second, parameter.detach().clone()]
    correlations = torch.corrcoef(torch.stack([draw.flatten() for draw in draws]))
    assert (correlations - torch.eye(3)).abs().max() < 0.05


def test_a_draw_depends_on_seed_and_step_and_not_on_what_was_drawn_before() -> None:
    drawn = []
    for seed, before in ((3, 0), (3, 5), (4, 0)):
        torch.manual_seed(before)
        parameters = _parameters()
        optimizer = IVON(parameters, lr=0.1, ess=10.0, seed=seed)
        for step in range(before):
            optimizer.sample(step=step)
        optimizer.sample(step=7)
        drawn.append(_values(parameters))
    assert _same(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_a_conjugate_posterior_is_found() -> None:
    """Linear regression with orthogonal inputs, whose posterior is a Gaussian with independent entries."""
    count, noise, decay = 40, 0.5, 0.05
    design = torch.linalg.qr(torch.randn(count, 4))[0] * torch.tensor([2.0, 4.0, 6.0, 9.0])
    target = design @ torch.tensor([1.0, -2.0, 0.5, 0.0]) + noise * torch.randn(count)
    precision = design.square().sum(0) / noise**2 + count * decay
    mean = (design.T @ target / noise**2) / precision

    weight = nn.Parameter(torch.zeros(4))
    optimizer = IVON([weight], lr=0.05, ess=count, hess_init=1.0, betas=(0.9, 0.995), weight_decay=decay)
    optimizer.param_groups[0]["rescale_lr"] = False
    means, deviations = [], []
    for step in range(1500):
        optimizer.sample()
        weight.grad = (design.T @ (design @ weight.detach() - target)) / noise**2 / count
        optimizer.step()
        if step >= 600:
            means.append(weight.detach().clone())
            deviations.append(optimizer.posterior(weight)[1])
    exact = precision.rsqrt()
    # 900 steps are averaged, each with an estimate of h whose deviation is sqrt(2) h: 2.4% of the deviation.
    assert ((torch.stack(means).mean(0) - mean).abs() < 0.25 * exact).all()
    torch.testing.assert_close(torch.stack(deviations).mean(0), exact, rtol=0.08, atol=0.0)


# One update, however it is computed -----------------------------------------------------------------------------


def _batch_update(micro_batches: int, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(3, 32, 6, generator=generator), torch.randn(3, 32, 2, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = IVON(model.parameters(), lr=0.1, ess=32.0, hess_init=0.1, betas=(0.9, 0.9), **options)
    for step in range(3):
        optimizer.sample()
        for part in torch.arange(32).chunk(micro_batches):
            loss = nn.functional.mse_loss(model(x[step, part]), y[step, part])
            (loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _values(list(model.parameters())), [optimizer.state[p]["hessian"].clone() for p in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}], ids=["plain", "clipped"])
def test_four_micro_batches_of_eight_are_one_batch_of_32(options: dict[str, Any]) -> None:
    whole, parts = _batch_update(1, **options), _batch_update(4, **options)
    for expected, found in zip((*whole[0], *whole[1]), (*parts[0], *parts[1]), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    moved = [h for h in whole[1] if (h - 0.1).abs().max() > 1e-3]
    assert len(moved) == len(whole[1])


def _one_step(edit: Callable[[list[nn.Parameter]], None], **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    parameters = _parameters()
    optimizer = IVON(parameters, lr=0.1, ess=20.0, betas=(0.9, 0.5), **options)
    optimizer.sample()
    _loss(parameters).backward()
    edit(parameters)
    optimizer.step()
    return _values(parameters), [optimizer.state[p]["hessian"].clone() for p in parameters]


def test_clipping_scales_the_gradient_that_is_paired_inside_and_outside_of_the_optimizer_alike() -> None:
    inside = _one_step(lambda ps: None, max_grad_norm=0.5)
    outside = _one_step(lambda ps: torch.nn.utils.clip_grad_norm_(ps, 0.5))
    unclipped = _one_step(lambda ps: None)
    assert _same(inside[0], outside[0]) and _same(inside[1], outside[1])
    for clipped, free in ((inside[0], unclipped[0]), (inside[1], unclipped[1])):
        assert (clipped[0] - free[0]).abs().max() > 1e-3


def test_gradients_of_a_scaled_loss_are_used_as_they_are_after_unscaling() -> None:
    def scale_and_unscale(parameters: list[nn.Parameter]) -> None:
        for p in parameters:
            p.grad.mul_(1024.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.zeros(()))
        scaler.unscale_(torch.optim.SGD(parameters, lr=1.0))

    expected, found = _one_step(lambda ps: None), _one_step(scale_and_unscale)
    assert _same(found[0], expected[0]) and _same(found[1], expected[1])


def test_a_scale_given_to_pair_is_divided_out_of_each_sample_before_clipping() -> None:
    results = []
    for scale in (1.0, 256.0):
        parameters = _parameters()
        optimizer = IVON(parameters, lr=0.1, ess=20.0, mc_samples=2, max_grad_norm=0.7)
        for _ in range(2):
            optimizer.sample()
            (_loss(parameters) * scale).backward()
            optimizer.pair(scale)
        handed_back = [p.grad / scale for p in parameters]
        optimizer.step()
        results.append([*_values(parameters), *(optimizer.state[p]["hessian"] for p in parameters), *handed_back])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_a_step_that_mixed_precision_skips_leaves_the_mean_and_starts_over() -> None:
    parameters = _parameters()
    optimizer = IVON(parameters, lr=0.1, ess=20.0, mc_samples=2)
    before = _values(parameters)
    for _ in range(2):
        optimizer.sample()
        (_loss(parameters) * float("inf")).backward()
        optimizer.pair()
    assert not all(p.grad.isfinite().all() for p in parameters)  # for a scaler to see
    assert _same(_values(parameters), before)
    optimizer.zero_grad()
    for _ in range(2):
        optimizer.sample()
        _loss(parameters).backward()
        optimizer.pair()
    optimizer.step()
    assert all(p.isfinite().all() for p in parameters) and not torch.equal(parameters[0], before[0])


def test_a_closure_is_called_for_every_sample() -> None:
    by_hand, by_closure = _parameters(), _parameters()
    first = IVON(by_hand, lr=0.1, ess=20.0, mc_samples=3)
    for _ in range(3):
        first.sample()
        _loss(by_hand).backward()
        first.pair()
    first.step()

    second = IVON(by_closure, lr=0.1, ess=20.0, mc_samples=3)
    losses = []

    def closure() -> Tensor:
        second.zero_grad()
        loss = _loss(by_closure)
        loss.backward()
        losses.append(loss.detach())
        return loss

    returned = second.step(closure)
    assert _same(_values(by_closure), _values(by_hand))
    assert len({float(loss) for loss in losses}) == 3
    torch.testing.assert_close(returned.detach(), torch.stack(losses).mean())


# The mean is never lost -----------------------------------------------------------------------------------------


def test_whatever_a_closure_raises_leaves_the_mean() -> None:
    parameters = _parameters()
    optimizer = IVON(parameters, lr=0.1, ess=20.0, mc_samples=2)
    _run_closure = lambda: optimizer.step(lambda: _loss(parameters).backward())  # noqa: E731
    _run_closure()
    before, state = _values(parameters), copy.deepcopy(optimizer.state_dict())
    calls = []

    def closure() -> None:
        calls.append(optimizer.is_drawn)
        _loss(parameters).backward()
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert calls == [True, True] and not optimizer.is_drawn
    assert _same(_values(parameters), before)
    for old, new in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_restoring_gives_every_bit_back() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        parameters = _parameters(dtype)
        before = _values(parameters)
        optimizer = IVON(parameters, lr=0.1, ess=20.0)
        for _ in range(3):
            optimizer.sample()  # a further draw starts from the mean, too
        assert not torch.equal(parameters[0], before[0])
        optimizer.restore()
        assert _same(_values(parameters), before)


def test_a_draw_for_prediction_is_undone_when_the_block_raises() -> None:
    parameters = _parameters()
    optimizer = IVON(parameters, lr=0.1, ess=20.0)
    before = _values(parameters)
    with pytest.raises(RuntimeError, match="inside"), optimizer.sampled(seed=1):
        assert not torch.equal(parameters[0], before[0])
        raise RuntimeError("inside")
    assert _same(_values(parameters), before)


def test_a_step_without_a_draw_is_refused_and_changes_nothing() -> None:
    parameters = _parameters()
    optimizer = IVON(parameters, lr=0.1, ess=20.0, mc_samples=2)
    before = _values(parameters)
    _loss(parameters).backward()
    with pytest.raises(BayesLoraError, match=r"0 of 2 draws.*call sample\(\)"):
        optimizer.step()
    optimizer.sample()
    with pytest.raises(BayesLoraError, match="1 of 2 draws"):
        optimizer.step()
    assert _same(_values(parameters), before)
    with pytest.raises(BayesLoraError, match="call sample"):
        optimizer.pair()


def test_prediction_in_the_middle_of_a_step_is_refused() -> None:
    parameters = _parameters()
    optimizer = IVON(parameters, lr=0.1, ess=20.0)
    mean, deviation = optimizer.posterior(parameters[0])
    optimizer.sample()
    with pytest.raises(BayesLoraError, match="draw of a training step"), optimizer.sampled():
        pass
    assert optimizer.is_drawn
    assert torch.equal(optimizer.posterior(parameters[0])[0], mean)
    assert torch.equal(optimizer.posterior(parameters[0])[1], deviation)


def test_the_storage_of_a_parameter_is_never_replaced() -> None:
    parameters = _parameters()
    pointers = [p.data_ptr() for p in parameters]
    optimizer = IVON(parameters, lr=0.1, ess=20.0)
    _take_steps(optimizer, parameters, 2)
    with optimizer.sampled():
        assert [p.data_ptr() for p in parameters] == pointers
    assert [p.data_ptr() for p in parameters] == pointers


def test_a_weight_that_was_changed_between_steps_stays_changed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        parameters = _parameters(dtype)
        optimizer = IVON(parameters, lr=1e-4, ess=1e9)
        _take_steps(optimizer, parameters, 1)
        with torch.no_grad():
            parameters[0][0].fill_(100.0)
        _take_steps(optimizer, parameters, 1)
        assert (parameters[0][0] - 100.0).abs().max() < 1.0
        assert (optimizer.posterior(parameters[0])[0][0] - 100.0).abs().max() < 1.0


# Which parameters, of what type ---------------------------------------------------------------------------------


def test_parameters_without_gradient_stay_and_do_not_change_the_others() -> None:
    plain, mixed = _parameters(), _parameters()
    reference, optimizer = IVON(plain, lr=0.1, ess=20.0), IVON(mixed, lr=0.1, ess=20.0)
    for step in range(3):
        for parameters, used in ((plain, reference), (mixed, optimizer)):
            used.sample()
            used.zero_grad()
            kept = parameters if step != 1 or used is reference else parameters[:1] + parameters[2:]
            sum(p.square().sum() for p in kept).backward()
            used.step()
    assert [float(optimizer.state[p]["step"]) for p in mixed] == [3, 2, 3, 3, 3]
    for index, (found, expected) in enumerate(zip(mixed, plain, strict=True)):
        assert found.numel() == 0 or torch.equal(found, expected) == (index != 1)
    state = copy.deepcopy(optimizer.state[mixed[1]])
    before = mixed[1].detach().clone()
    optimizer.zero_grad()
    optimizer.sample()
    assert not torch.equal(mixed[1], before)
    optimizer.step()
    assert torch.equal(mixed[1], before)
    assert all(torch.equal(state[name], optimizer.state[mixed[1]][name]) for name in state)


def test_a_frozen_parameter_is_never_drawn_and_does_not_change_the_others_noise() -> None:
    plain, frozen = _parameters(), _parameters()
    frozen[0].requires_grad_(False)
    optimizers = [IVON(parameters, lr=0.1, ess=20.0) for parameters in (plain, frozen)]
    kept = frozen[0].detach().clone()
    for optimizer in optimizers:
        optimizer.sample()
    assert torch.equal(frozen[0], kept) and _same(_values(frozen[1:]), _values(plain[1:]))
    for optimizer in optimizers:
        optimizer.restore()
    with optimizers[0].sampled(seed=2):
        expected = _values(plain[1:])
    with optimizers[1].sampled(seed=2):
        assert torch.equal(frozen[0], kept) and _same(_values(frozen[1:]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_weight_moves_by_steps_that_it_cannot_hold(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = IVON([weight], lr=1e-4, ess=1.0, betas=(0.0, 0.99999), weight_decay=0.0)
    for _ in range(100):
        optimizer.sample()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    state = optimizer.state[weight]
    assert all(state[name].dtype == torch.float32 for name in ("mean", "momentum", "hessian"))
    moved = 1 - state["mean"]
    assert ((moved > 5e-3) & (moved < 2e-2)).all()
    assert torch.equal(weight.detach(), state["mean"].to(dtype))


# State ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_continues_bit_for_bit(dtype: torch.dtype) -> None:
    straight = _parameters(dtype)
    optimizer = IVON(straight, lr=0.1, ess=20.0, betas=(0.9, 0.9))
    _take_steps(optimizer, straight, 3)
    stored = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "weights": _values(straight)}, stored)
    _take_steps(optimizer, straight, 3)

    stored.seek(0)
    loaded = torch.load(stored)
    resumed = [nn.Parameter(value) for value in loaded["weights"]]
    again = IVON(resumed, lr=9.0, ess=1.0)
    again.load_state_dict(loaded["optimizer"])
    assert again.steps_taken == 3
    _take_steps(again, resumed, 3)
    assert _same(_values(resumed), _values(straight))
    for ours, theirs in zip(straight, resumed, strict=True):
        for name, value in optimizer.state[ours].items():
            assert value.dtype == again.state[theirs][name].dtype and torch.equal(value, again.state[theirs][name])


def test_loading_does_not_tie_the_optimizer_to_what_it_was_loaded_from() -> None:
    parameters = _parameters()
    optimizer = IVON(parameters, lr=0.1, ess=20.0)
    _take_steps(optimizer, parameters, 1)
    stored = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(stored)
    optimizer.load_state_dict(stored)
    _take_steps(optimizer, parameters, 1)
    assert all(torch.equal(stored["state"][i]["hessian"], kept["state"][i]["hessian"]) for i in kept["state"])


def test_entries_of_others_in_the_state_are_kept_and_loaded_in_their_precision() -> None:
    parameters = _parameters(torch.bfloat16)
    optimizer = IVON(parameters, lr=0.1, ess=20.0)
    for parameter in parameters:
        optimizer.state[parameter]["importance"] = torch.full(parameter.shape, 1 / 3)
    _take_steps(optimizer, parameters, 1)
    again = IVON(parameters, lr=0.1, ess=20.0)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[parameters[0]]["importance"], torch.full((3, 5), 1 / 3))


def test_a_copy_of_the_optimizer_is_whole() -> None:
    parameters = _parameters()
    optimizer = IVON(parameters, lr=0.1, ess=20.0, mc_samples=2, seed=5, max_grad_norm=1.0)
    optimizer.step(lambda: _loss(parameters).backward())
    again = copy.deepcopy(optimizer)
    assert (again.mc_samples, again.seed, again.max_grad_norm, again.steps_taken) == (2, 5, 1.0, 1)


def test_a_step_at_rate_0_without_a_draw_makes_the_state_as_distributed_checkpoints_need() -> None:
    parameters = _parameters()
    optimizer = IVON(parameters, lr=0.0, ess=20.0)
    before = _values(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(closure=None)
    assert _same(_values(parameters), before) and optimizer.steps_taken == 0
    assert set(optimizer.state[parameters[0]]) == {"step", "momentum", "hessian"}


# The posterior for prediction -----------------------------------------------------------------------------------


def test_prediction_draws_replay_by_seed_and_number_and_pair_up_when_antithetic() -> None:
    parameters = _parameters()
    optimizer = IVON(parameters, lr=0.1, ess=20.0)
    _take_steps(optimizer, parameters, 2)
    drawn = {}
    for seed, draw in ((0, 0), (0, 1), (1, 0), (0, 0)):
        with torch.inference_mode(), optimizer.sampled(seed, draw):
            values = _values(parameters)
            assert (seed, draw) not in drawn or _same(values, drawn[seed, draw])
            drawn[seed, draw] = values
    assert not torch.equal(drawn[0, 0][0], drawn[0, 1][0]) and not torch.equal(drawn[0, 0][0], drawn[1, 0][0])
    pair = []
    for draw in (0, 1):
        with optimizer.sampled(0, draw, antithetic=True):
            pair.append(parameters[0].detach().clone())
    torch.testing.assert_close((pair[0] + pair[1]) / 2, parameters[0].detach())
    _take_steps(optimizer, parameters, 1)  # buffers made while predicting are no inference tensors


def test_a_first_prediction_in_inference_mode_does_not_spoil_training() -> None:
    parameters = _parameters()
    optimizer = IVON(parameters, lr=0.1, ess=20.0)
    with torch.inference_mode(), optimizer.sampled():
        pass
    _take_steps(optimizer, parameters, 1)
    assert optimizer.steps_taken == 1


# Input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"ess": 0.0}, "ess is 0.0"),
        ({"ess": float("inf")}, "ess is inf"),
        ({"hess_init": 0.0}, "hess_init is 0.0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"clip_radius": 0.0}, "clip_radius is 0.0"),
        ({"mc_samples": 0}, "mc_samples is 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
    ],
)
def test_an_option_out_of_its_range_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BayesLoraError, match=message):
        IVON(_parameters(), **{"lr": 0.1, "ess": 10.0, **options})


def test_what_it_cannot_train_is_refused() -> None:
    class FlatParameter(nn.Parameter):
        pass

    with pytest.raises(BayesLoraError, match="FSDP2"):
        IVON([FlatParameter(torch.zeros(3))], lr=0.1, ess=10.0)
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = IVON(embedding.parameters(), lr=0.1, ess=10.0)
    optimizer.sample()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(BayesLoraError, match="sparse=False"):
        optimizer.step()
    optimizer.restore()
    with pytest.raises(BayesLoraError, match="is not one that IVON trains"):
        optimizer.posterior(nn.Parameter(torch.zeros(2)))
