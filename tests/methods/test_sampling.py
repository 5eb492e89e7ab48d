"""When a layer draws and when it does not, and that what it draws is the weight the seed stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bayeslora
from bayeslora import BayesLoraError
from bayeslora.methods.variational import has_posterior, stochastic_layers
from bayeslora.posterior import IndivisibleBatchError, Noise
from tests.methods.reference import Tiny, layers_of, seeded
from tests.methods.variational_models import (
    METHODS,
    X,
    config,
    draw,
    examples,
    noise_shape,
    oracle,
    randomize,
    sampled,
    tiny,
)

ALL = tuple(METHODS)
each_method = pytest.mark.parametrize("method", ALL)


def _close(actual: Tensor, expected: Tensor, **kwargs: Any) -> None:
    torch.testing.assert_close(actual, expected, **{"atol": 1e-5, "rtol": 1e-5, **kwargs})


# The function of a seed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@each_method
def test_a_draw_for_each_row_is_that_rows_weight(method: str, kind: str) -> None:
    model = tiny(method, kind, bias=kind == "conv1d")
    layer = layers_of(model)[0]
    with bayeslora.sampling(model, "example", seed=3):
        _close(layer(X), oracle(layer, X, examples(layer, "first", 3, len(X))))
        _close(layer(X[:, 0]), oracle(layer, X[:, :1], examples(layer, "first", 3, len(X)))[:, 0])


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@each_method
def test_folded_draws_are_those_draws_one_after_the_other(method: str, kind: str, antithetic: bool) -> None:
    model = tiny(method, kind)
    layer, draws = layers_of(model)[0], [4, 0, 5]
    folded = X.repeat(len(draws), 1, 1)
    noise = [draw(layer, "first", 3, number, antithetic) for number in draws for _ in X]
    with bayeslora.sampling(model, "batch", seed=3, draws=draws, antithetic=antithetic):
        _close(layer(folded), oracle(layer, folded, noise))
    together = sampled(model, folded, scope="batch", seed=3, draws=draws, antithetic=antithetic)
    alone = [sampled(model, X, scope="batch", seed=3, draws=[d], antithetic=antithetic) for d in draws]
    _close(together, torch.cat(alone))
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


@each_method
def test_a_seed_replays_its_function_whatever_the_generator_does_and_another_is_another(method: str) -> None:
    model = tiny(method)
    for scope in ("example", "token", "batch"):
        torch.manual_seed(1)
        first = sampled(model, X, scope=scope, seed=0)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        assert torch.equal(sampled(model.eval(), X, scope=scope, seed=0), first)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.allclose(sampled(model.train(), X, scope=scope, seed=1), first, atol=1e-3)
        fresh = [sampled(model, X, scope=scope) for _ in range(2)]
        assert not torch.allclose(*fresh, atol=1e-3)


@each_method
def test_a_batch_draw_is_one_weight_that_can_be_written_out(method: str) -> None:
    model = tiny(method)
    layer = layers_of(model)[0]
    a = layer.drawn_A("default", Noise("batch", 3, "first", [2]))
    weight = layer.base_layer.weight + layer.scaling["default"] * layer.B("default") @ a
    with bayeslora.sampling(model, "batch", seed=3, draws=[2]):
        _close(layer(X), nn.functional.linear(X, weight, layer.base_layer.bias))


@each_method
def test_an_empty_batch_stays_empty(method: str) -> None:
    model = tiny(method)
    for scope in ("example", "token", "batch"):
        assert sampled(model, X[:0], scope=scope, seed=0).shape == (0, 5, 3)


@each_method
def test_antithetic_training_noise_has_pairs_whose_mean_is_the_mean(method: str) -> None:
    model = tiny(method, noise_scope="example", antithetic=True)
    layer = layers_of(model)[0]
    y = layer(X[:1].repeat(4, 1, 1))
    with bayeslora.posterior_mean(model):
        mean = layer(X[:1])
    for first, second in ((0, 2), (1, 3)):
        _close((y[first] + y[second]) / 2, mean[0], atol=1e-4)
    assert not torch.allclose(y[0], y[1], atol=1e-2)


# Modes ---------------------------------------------------------------------------------------------------------


@each_method
def test_evaluation_is_the_mean_and_training_is_not(method: str) -> None:
    model = tiny(method)
    first = layers_of(model)[0]
    mean = oracle(first, X, [None] * len(X))
    assert not torch.allclose(first(X), mean, atol=1e-2) and not torch.allclose(first(X), first(X), atol=1e-2)
    model.eval()
    _close(first(X), mean)
    assert torch.equal(model(X), model(X))
    model.train()
    with bayeslora.posterior_mean(model):
        _close(first(X), mean)
        with bayeslora.sampling(model, seed=0):
            inner = first(X)
            assert not torch.allclose(inner, mean, atol=1e-2)
        _close(first(X), mean)
    assert not torch.allclose(first(X), mean, atol=1e-2)


@each_method
def test_an_error_inside_leaves_no_noise_behind(method: str) -> None:
    model = tiny(method).eval()
    mean = model(X)
    with pytest.raises(RuntimeError, match="inside"), bayeslora.sampling(model, seed=0):
        raise RuntimeError("inside")
    assert torch.equal(model(X), mean)
    assert not any(layer.is_controlled or layer.noise for layer in layers_of(model))


@each_method
def test_a_disabled_adapter_is_exactly_the_base_model_in_every_mode(method: str) -> None:
    expected = seeded(Tiny)(X)
    model = tiny(method)
    for training in (True, False):
        model.train(training)
        with model.disable_adapter():
            assert torch.equal(model(X), expected)
            with bayeslora.sampling(model, seed=0):
                assert torch.equal(model(X), expected)


@each_method
def test_an_adapter_added_to_a_model_in_evaluation_mode_does_not_sample(method: str) -> None:
    model = tiny(method).eval()
    model.add_adapter("second", config(method))
    model.set_adapter("second")
    for layer in layers_of(model):
        randomize(layer, "second", seed=5)
    assert torch.equal(model(X), model(X))
    _close(layers_of(model)[0](X), oracle(layers_of(model)[0], X, [None] * 3, "second"))


@each_method
def test_stochastic_layers_are_named_by_their_path_with_and_without_wrappers(method: str) -> None:
    model = tiny(method)
    assert list(stochastic_layers(model)) == ["first", "second"] and has_posterior(model)
    assert list(stochastic_layers(torch.nn.Sequential(model))) == ["first", "second"]
    assert not has_posterior(get_peft_model(Tiny(), LoraConfig(target_modules=["first"])))


# What cannot work ----------------------------------------------------------------------------------------------


def test_a_posterior_asked_of_a_deterministic_adapter_is_refused() -> None:
    for deterministic in (
        Tiny(),
        get_peft_model(Tiny(), LoraConfig(target_modules=["first"])),
        get_peft_model(Tiny(), bayeslora.BLoraConfig(target_modules=["first"])),
    ):
        with pytest.raises(BayesLoraError, match="has no posterior, but sampling draws from one"):
            with bayeslora.sampling(deterministic):
                pass
        with bayeslora.posterior_mean(deterministic):
            deterministic(X)


@each_method
def test_sampling_a_merged_model_is_refused(method: str) -> None:
    model = tiny(method).eval()
    model.merge_adapter()
    with pytest.raises(BayesLoraError, match="merged into the base weights.*unmerge_adapter"):
        with bayeslora.sampling(model):
            pass
    model.unmerge_adapter()
    assert sampled(model, X, seed=0).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "row"}, "scope is 'row'"),
        ({"draws": 0}, "0 draws"),
        ({"draws": 3}, "3 draws share a batch, but scope is 'example': give scope='batch'"),
        ({"scope": "token", "antithetic": True}, "antithetic is True, but scope is 'token'"),
    ],
)
def test_impossible_noise_is_refused_before_anything_changes(options: dict[str, Any], message: str) -> None:
    model = tiny("melora").eval()
    with pytest.raises(BayesLoraError, match=message), bayeslora.sampling(model, **options):
        pass
    assert torch.equal(model(X), model(X))


@each_method
def test_rows_that_do_not_divide_among_the_draws_raise_in_the_forward_pass(method: str) -> None:
    model = tiny(method)
    with pytest.raises(IndivisibleBatchError, match="a layer got 3 rows, but 2 draws need equal parts"):
        sampled(model, X, scope="batch", seed=0, draws=2)


# Several adapters ----------------------------------------------------------------------------------------------


def _with_second(method: str, **options: Any) -> nn.Module:
    model = tiny(method)
    model.add_adapter("second", config(method, **options))
    for index, layer in enumerate(layers_of(model)):
        if "second" in layer.adapter_names:
            randomize(layer, "second", seed=10 + index)
    return model.eval()


@each_method
def test_rows_of_a_mixed_batch_use_their_own_adapter(method: str) -> None:
    model = _with_second(method, r=3)
    expected = []
    for name in ("default", "second"):
        model.set_adapter(name)
        expected.append(model(X))
    with model.disable_adapter():
        expected.append(model(X))
    mixed = model(X, adapter_names=["second", "__base__", "default"])
    _close(mixed, torch.stack([expected[1][0], expected[2][1], expected[0][2]]))
    folded = X.repeat(2, 1, 1)
    with bayeslora.sampling(model, "batch", seed=3, draws=2), torch.no_grad():
        y = model(folded, adapter_names=["second", "__base__", "default"] * 2)
    _close(y[[1, 4]], expected[2][[1, 1]])
    for name, row in (("second", 0), ("default", 2)):
        model.set_adapter(name)
        both = sampled(model, folded, scope="batch", seed=3, draws=2)
        _close(y[[row, 3 + row]], both[[row, 3 + row]])
        assert not torch.allclose(y[row], y[3 + row], atol=1e-2)


@each_method
def test_two_active_adapters_add_up_and_draw_independently(method: str) -> None:
    model = _with_second(method)
    layer = layers_of(model)[0]
    updates = []
    for name in ("default", "second"):
        model.set_adapter(name)
        updates.append(layer(X) - layer.base_layer(X))
    model.base_model.set_adapter(["default", "second"])
    _close(layer(X), layer.base_layer(X) + updates[0] + updates[1], atol=1e-4)
    noise = Noise("batch", 3, "first")
    shape = noise_shape(layer)
    layer.is_controlled, layer.noise = True, noise
    first, second = (
        layer.noise_of(name, i).normal(1, shape, X.device) for i, name in enumerate(("default", "second"))
    )
    assert (first != second).all()


# Precision, checkpointing, compilation -------------------------------------------------------------------------


@each_method
def test_noise_is_float32_under_autocast(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(method)
    drawn: list[torch.dtype] = []
    for name in ("normal", "normal_per_token", "signs"):
        original = getattr(Noise, name)

        def recorded(self: Noise, *args: Any, original: Any = original) -> Tensor:
            drawn.append((value := original(self, *args)).dtype)
            return value

        monkeypatch.setattr(Noise, name, recorded)
    for scope in ("example", "token", "batch"):
        exact = sampled(model, X, scope=scope, seed=0)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = sampled(model, X, scope=scope, seed=0)
        assert rounded.dtype == torch.bfloat16
        assert (rounded.float() - exact).norm() / exact.norm() < 0.02, scope
    assert set(drawn) == {torch.float32} and len(drawn) >= 12


@pytest.mark.parametrize("scope", ["example", "token", "batch"])
@pytest.mark.parametrize("reentrant", [True, False])
@each_method
def test_gradient_checkpointing_gives_the_same_gradients(method: str, reentrant: bool, scope: str) -> None:
    model = tiny(method, noise_scope=scope)
    gradients = []
    for wrapped in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        x = X.clone().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if wrapped else model(x)
        torch.rand(3)  # what comes between the passes moves the generator on
        y.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(("rho" in name or "_G" in name) and value.any() for name, value in gradients[0].items())
    for name, value in gradients[0].items():
        assert torch.equal(gradients[1][name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["example", "token", "batch"])
@each_method
def test_a_layer_compiles_as_one_graph_in_training_and_evaluation(method: str, scope: str) -> None:
    model = tiny(method, noise_scope=scope)
    layer = layers_of(model)[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    y = compiled(X)
    y.square().sum().backward()
    assert not torch.allclose(y, compiled(X), atol=1e-2)
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    torch.manual_seed(0)
    layer(X).square().sum().backward()
    for name, p in layer.named_parameters():
        if p.grad is not None:
            _close(gradients[name], p.grad, atol=1e-4, rtol=1e-4)
    layer.eval()
    _close(compiled(X), layer(X))


def test_gradients_of_the_noise_reach_means_and_variances_as_they_should() -> None:
    """For a fixed draw the output is linear in the mean and in the deviation: d y / d std = eps times d y / d mean."""
    layer = layers_of(model := tiny("melora"))[0]
    with bayeslora.sampling(model, "batch", seed=3):
        y = layer(X).square().sum()
    mean, rho = torch.autograd.grad(y, [layer.melora_M["default"], layer.melora_rho["default"]])
    eps = draw(layer, "first", 3, 0)
    _close(rho, mean * eps * torch.sigmoid(layer.melora_rho["default"]), atol=1e-3, rtol=1e-4)
