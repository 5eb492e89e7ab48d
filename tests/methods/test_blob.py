"""BLoB: flipout against its equation and against drawn weights, its numbers, and the published alternation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

import bayeslora
from bayeslora import BayesLoop, BayesLoraError, BlobConfig, describe, parameter_groups
from bayeslora.posterior import Noise
from tests.methods.reference import D_IN, D_OUT, RANK, Tiny, layers_of
from tests.methods.variational_models import CPU, X, blob_adapter, config, tiny
from tests.oracles import blob


def _close(actual: Tensor, expected: Tensor, **kwargs: Any) -> None:
    torch.testing.assert_close(actual, expected, **{"atol": 1e-5, "rtol": 1e-5, **kwargs})


# Flipout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_flipout_equals_its_equation(kind: str) -> None:
    layer = layers_of(model := tiny("blob", kind))[0]
    noise = Noise("token", 3, "first")
    eps = noise.normal(1, (RANK, D_IN), CPU)[0]
    signs = noise.signs(X.shape, CPU, "in"), noise.signs((3, 5, RANK), CPU, "out")
    weight = layer.base_layer.weight.T if kind == "conv1d" else layer.base_layer.weight
    expected = blob.flipout(X, weight.detach(), layer.base_layer.bias, blob_adapter(layer), eps, *signs)
    with bayeslora.sampling(model, "token", seed=3):
        _close(layer(X), expected)


@pytest.mark.parametrize("scope", ["token", "example", "batch"])
def test_every_scope_has_the_mean_and_variance_of_drawn_weights(scope: str) -> None:
    layer = layers_of(tiny("blob"))[0]
    adapter, x, draws = blob_adapter(layer), X[:1, :1], 4000
    a = adapter.M + adapter.G**2 * torch.randn(20_000, RANK, D_IN)
    by_weight = adapter.scaling * (a @ x[0, 0]) @ adapter.B.T
    by_weight = by_weight + layer.base_layer(x)[0, 0].detach()
    deviation = by_weight.std(0)
    layer.noise, layer.is_controlled = Noise(scope), True
    with torch.no_grad():
        if scope == "example":
            drawn = layer(x.expand(draws, 1, D_IN))[:, 0]
        else:  # one draw a pass, or one with random signs
            drawn = torch.stack([layer(x)[0, 0] for _ in range(draws)])
    assert ((drawn.mean(0) - by_weight.mean(0)) / deviation).abs().max() < 0.09
    assert (drawn.var(0) / deviation**2 - 1).abs().max() < 0.15


def test_training_uses_flipout_and_tokens_of_a_row_differ() -> None:
    layer = layers_of(tiny("blob"))[0]
    y = layer(X[:1, :1].expand(2, 3, D_IN))
    assert len({tuple(token.tolist()) for row in y for token in row}) > 3
    layer.eval()
    y = layer(X[:1, :1].expand(2, 3, D_IN))
    _close(y, y[:1, :1].expand_as(y), atol=1e-6)


# Divergence and numbers ----------------------------------------------------------------------------------------


def test_the_divergence_is_the_references_sum_over_layers() -> None:
    model = tiny("blob", prior_std=0.3, kl_weight=2.0, num_examples=40)
    expected = sum(blob.kl(blob_adapter(layer), 0.3) for layer in layers_of(model))
    assert model.base_model.kl().item() == pytest.approx(expected, rel=1e-4)
    assert model.base_model.penalty()["kl"].item() == pytest.approx(2.0 / 40 * expected, rel=1e-4)


def test_deviations_start_between_half_and_all_of_the_squared_scale_and_the_update_at_zero() -> None:
    model = get_peft_model(Tiny(), config("blob", initial_scale=0.1))
    for layer in layers_of(model):
        mean, std, prior = layer.posterior("default")
        assert 0.005 <= std.min() and std.max() <= 0.01 and std.max() > 0.008 and prior == 0.0
        assert not layer.blob_B["default"].any() and mean.abs().max() > 0.1
        x = X[..., : layer.in_features]
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_parameter_count_is_two_first_factors_and_one_second(rank: int) -> None:
    model = get_peft_model(Tiny(), config("blob", r=rank))
    first, second = describe(model)
    assert first.parameters == blob.parameters(D_IN, D_OUT, rank)
    assert second.parameters == blob.parameters(D_OUT, D_OUT, rank)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == first.parameters + second.parameters


def test_the_published_counts_of_7b_and_13b_come_out() -> None:
    for width, layers, vocabulary, expected in ((4096, 32, 32000, 6_612_992), (5120, 40, 32000, 10_168_320)):
        count = 2 * layers * blob.parameters(width, width, 8) + blob.parameters(width, vocabulary, 8)
        assert count == expected


def test_variances_have_their_rate_and_only_b_decays() -> None:
    model = tiny("blob", variance_lr_factor=3.0)
    names = {id(p): name.split(".")[-2] for name, p in model.named_parameters()}
    found = {
        names[id(p)]: (group["bayeslora_role"], round(group["lr"], 6), group["weight_decay"])
        for group in parameter_groups(model, lr=0.01, weight_decay=0.1)
        for p in group["params"]
    }
    assert found == {
        "blob_M": ("means", 0.01, 0.0),
        "blob_G": ("variances", 0.03, 0.0),
        "blob_B": ("weights", 0.01, 0.1),
    }


# The published alternation -------------------------------------------------------------------------------------


def _alternating(steps: int, cycle: int, **options: Any) -> tuple[nn.Module, BayesLoop, torch.optim.Optimizer]:
    model = tiny("blob", kl_schedule="blob", kl_cycle=cycle, num_examples=None, **options)
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.0), lr=0.0)
    return model, BayesLoop(model, optimizer, total_steps=steps), optimizer


def test_the_alternation_adds_no_penalty_and_steps_as_its_equation_says() -> None:
    """Rate: linear over the first 6% of the steps, then linearly to 0; weights double within each cycle."""
    steps, cycle, rate = 50, 4, 1e-4
    model, loop, optimizer = _alternating(steps, cycle, kl_learning_rate=rate, prior_std=0.3)
    expected = [blob_adapter(layer) for layer in layers_of(model)]
    weights = blob.cycle_weights(cycle)
    assert sum(weights) == pytest.approx(1.0)
    warm = 3  # 6% of 50
    start = [adapter.G for adapter in expected]
    for step in range(steps):
        loop.step_begin()
        model(X).square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        loop.before_optimizer_step()
        for name, p in model.named_parameters():
            assert p.grad is None or torch.equal(p.grad, gradients[name]), name
        optimizer.step()
        loop.step_end()
        optimizer.zero_grad()
        now = rate * min(1.0, (step + 1) / warm, (steps - step) / (steps - warm)) * weights[step % cycle]
        expected = [blob.kl_step(adapter, 0.3, now) for adapter in expected]
        for layer, reference in zip(layers_of(model), expected, strict=True):
            _close(layer.blob_M["default"], reference.M, atol=1e-6)
            _close(layer.blob_G["default"], reference.G, atol=1e-6)
            assert torch.equal(layer.blob_B["default"], reference.B)
    assert all((a.G - g).abs().max() > 1e-3 for a, g in zip(expected, start, strict=True))
    assert model.base_model.penalty() == {} and model.base_model.penalty_names == ()
    assert "penalty_kl" not in loop.statistics() and loop.statistics()["kl"] > 0


def test_the_weights_of_a_cycle_sum_to_one_in_the_layers_too() -> None:
    """At a constant small rate the divergence's gradient stands still: the moves of a cycle add up to one step."""
    model, loop, _ = _alternating(10_000, 6, kl_learning_rate=1e-6)
    tuner = model.base_model
    tuner._kl_rate = lambda step: 1e-6  # type: ignore[method-assign]
    parameters = [layer.blob_M["default"] for layer in layers_of(model)]
    gradients = torch.autograd.grad(tuner.kl(), parameters)
    start = [p.detach().double().clone() for p in parameters]
    for step in range(6):
        tuner.step_end(step)
    for p, before, gradient in zip(parameters, start, gradients, strict=True):
        _close((before - p.double()) / 1e-6, gradient.double(), rtol=0.02, atol=0.2)


def test_the_alternation_needs_a_cycle_but_no_n_and_its_cycle_nothing_else() -> None:
    model = tiny("blob", kl_schedule="blob")
    with pytest.raises(BayesLoraError, match="kl_schedule 'blob' needs kl_cycle"):
        BayesLoop(model, torch.optim.SGD(parameter_groups(model, lr=0.1)), total_steps=10)
    _alternating(10, 2)
    for options, message in (
        ({"kl_cycle": 3}, "kl_cycle is 3, but belongs to kl_schedule='blob'"),
        ({"kl_schedule": "blob", "kl_cycle": 0}, "kl_cycle is 0, but must be at least 1"),
        ({"kl_schedule": "x"}, "kl_schedule is 'x', but must be 'elbo' or 'blob'"),
        ({"initial_scale": 0.0}, "initial_scale is 0.0, but must be above 0"),
    ):
        with pytest.raises(BayesLoraError, match=message):
            BlobConfig(target_modules=["first"], **options)


def test_the_configuration_survives_a_file(tmp_path: Any) -> None:
    options = config("blob", kl_schedule="blob", kl_cycle=8, initial_scale=0.1)
    options.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is BlobConfig and again.to_dict() == options.to_dict()
    assert BlobConfig().noise_scope == "token"
