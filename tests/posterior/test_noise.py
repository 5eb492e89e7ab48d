"""Noise: fresh numbers follow torch's generator, seeded ones replay, wherever and in whatever order they are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayeslora.errors import BayesLoraError
from bayeslora.posterior import IndivisibleBatchError, Noise
from tests.processes import run_code

CPU = torch.device("cpu")
SHAPE = (3, 5)


def drawn(draws: list[int], seed: int = 7, key: str = "layer", shape: tuple[int, ...] = SHAPE, **more: bool) -> Tensor:
    return Noise("batch", seed, key, draws, **more).normal(len(draws), shape, CPU)


# Seeded ---------------------------------------------------------------------------------------------------------


@given(draws=st.lists(st.integers(0, 40), min_size=1, max_size=8), antithetic=st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_numbers_of_a_draw_depend_on_no_other_draw(draws: list[int], antithetic: bool) -> None:
    together = drawn(draws, antithetic=antithetic)
    for number, one in zip(draws, together, strict=True):
        assert torch.equal(drawn([number], antithetic=antithetic)[0], one)


def test_seed_layer_and_draw_each_give_other_numbers() -> None:
    reference = drawn([0, 1])
    assert not torch.equal(reference[0], reference[1])
    for other in (drawn([0, 1], seed=8), drawn([0, 1], key="layer2")):
        assert (other != reference).all()


def test_draws_of_layers_and_seeds_are_uncorrelated() -> None:
    columns = [drawn([d], seed=s, key=k, shape=(4000,))[0] for s in (0, 1) for k in ("a", "b") for d in (0, 1)]
    correlations = torch.corrcoef(torch.stack(columns)) - torch.eye(8)
    assert correlations.abs().max() < 0.08
    values = torch.cat(columns)
    assert values.mean().abs() < 0.02 and abs(float(values.var()) - 1) < 0.03


@pytest.mark.parametrize("shape", [(1,), (2, 2), (3, 5), (4, 4), (17,)])
def test_rows_of_an_example_scope_keep_their_numbers_in_a_larger_batch(shape: tuple[int, ...]) -> None:
    noise = Noise("example", 3, "layer")
    large = noise.normal(9, shape, CPU)
    for count in (1, 2, 5, 8):
        assert torch.equal(noise.normal(count, shape, CPU), large[:count])
    assert len(large.unique()) == large.numel()


def test_token_numbers_of_a_row_do_not_depend_on_the_other_rows() -> None:
    noise = Noise("token", 3, "layer")
    assert torch.equal(noise.normal_per_token((2, 7, 3), CPU), noise.normal_per_token((5, 7, 3), CPU)[:2])


@pytest.mark.parametrize("scope", ["example", "batch", "token"])
def test_seeded_noise_replays_and_leaves_the_global_generator_alone(scope: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = Noise(scope, 5, "layer"), Noise(scope, 5, "layer")
    for noise in (first, second):
        noise.normal(1, SHAPE, CPU), noise.signs((4, 4), CPU, "in"), noise.normal_per_token((2, 3, 4), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first.normal(1, SHAPE, CPU), second.normal(1, SHAPE, CPU))
    assert torch.equal(first.signs((4, 4), CPU, "in"), second.signs((4, 4), CPU, "in"))
    assert torch.equal(first.normal_per_token((2, 3, 4), CPU), second.normal_per_token((2, 3, 4), CPU))


def test_two_processes_draw_the_same_numbers(tmp_path: Path) -> None:
    code = (
        "import torch; from bayeslora.posterior import Noise; cpu = torch.device('cpu')\n"
        "torch.manual_seed(99); torch.randn(7)\n"
        "a = Noise('batch', 7, 'layer', [4, 2]).normal(2, (3, 5), cpu)\n"
        "b = Noise('example', 7, 'layer').normal(6, (3, 5), cpu)\n"
        "c = Noise('token', 7, 'layer').signs((2, 3), cpu, 'in')\n"
        "print(*(value.hex() for value in torch.cat([a.flatten(), b.flatten(), c.flatten()]).tolist()))"
    )
    printed = run_code(code, tmp_path)
    expected = torch.cat(
        [
            drawn([4, 2]).flatten(),
            Noise("example", 7, "layer").normal(6, SHAPE, CPU).flatten(),
            Noise("token", 7, "layer").signs((2, 3), CPU, "in").flatten(),
        ]
    )
    assert printed.split() == [value.hex() for value in expected.tolist()]


def test_adapters_side_by_side_on_a_layer_draw_independently() -> None:
    noise = Noise("batch", 7, "layer")
    assert torch.equal(noise.for_adapter(0).normal(1, SHAPE, CPU), noise.normal(1, SHAPE, CPU))
    second = noise.for_adapter(1).normal(1, SHAPE, CPU)
    assert (second != noise.normal(1, SHAPE, CPU)).all()
    assert torch.equal(second, noise.for_adapter(1).normal(1, SHAPE, CPU))


def test_numbers_kept_from_inference_mode_may_meet_autograd() -> None:
    noise = Noise("batch", 7, "layer")
    with torch.inference_mode():
        noise.normal(1, SHAPE, CPU)
    weight = torch.ones(SHAPE, requires_grad=True)
    (weight * noise.normal(1, SHAPE, CPU)).sum().backward()
    assert torch.equal(weight.grad, drawn([0])[0])


# Fresh ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["example", "batch", "token"])
def test_fresh_noise_differs_in_every_call_and_follows_torchs_generator(scope: str) -> None:
    noise = Noise(scope)
    calls = (
        lambda: noise.normal(1, SHAPE, CPU),
        lambda: noise.signs((8, 8), CPU, "in"),
        lambda: noise.normal_per_token((2, 3, 4), CPU),
    )
    for call in calls:
        torch.manual_seed(0)
        first, second = call(), call()
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(call(), first) and torch.equal(call(), second)


def test_signs_are_fair_and_nothing_else() -> None:
    for noise in (Noise("token"), Noise("token", 3, "layer")):
        signs = noise.signs((100, 100), CPU, "in")
        assert signs.dtype == torch.float32 and set(signs.unique().tolist()) == {-1.0, 1.0}
        assert signs.mean().abs() < 0.05
    seeded = Noise("token", 3, "layer")
    assert not torch.equal(seeded.signs((9, 9), CPU, "in"), seeded.signs((9, 9), CPU, "out"))


# Pairs ----------------------------------------------------------------------------------------------------------


def test_seeded_antithetic_draws_are_pairs_of_opposite_noise() -> None:
    values = drawn([0, 1, 2, 3], antithetic=True)
    assert torch.equal(values[1], -values[0]) and torch.equal(values[3], -values[2])
    assert not torch.equal(values[0].abs(), values[2].abs())
    assert torch.equal(drawn([3], antithetic=True)[0], values[3])


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_antithetic_examples_cancel_in_pairs(seed: int | None, count: int) -> None:
    values = Noise("example", seed, "layer", antithetic=True).normal(count, SHAPE, CPU)
    half = (count + 1) // 2
    assert values.shape == (count, *SHAPE)
    assert torch.equal(values[half:], -values[: count - half])
    assert len(values[:half].unique()) == values[:half].numel()


# What cannot work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "row"}, "scope is 'row', but must be example or token or batch"),
        ({"draws": []}, "0 draws of the weights were given, but at least 1 is needed"),
        ({"draws": range(3)}, "3 draws share a batch, but scope is 'example': give scope='batch'"),
        (
            {"scope": "token", "antithetic": True},
            "antithetic is True, but scope is 'token': give scope=",
        ),
    ],
)
def test_noise_that_cannot_be_drawn_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BayesLoraError, match=message):
        Noise(**arguments)


def test_rows_that_do_not_divide_among_the_draws_are_refused_and_others_are_divided() -> None:
    noise = Noise("batch", 1, "layer", range(3))
    assert noise.groups(6) == 3 and noise.groups(0) == 3
    with pytest.raises(IndivisibleBatchError, match="a layer got 7 rows, but 3 draws need equal parts"):
        noise.groups(7)
    assert issubclass(IndivisibleBatchError, BayesLoraError)
    assert Noise("example").groups(7) == 7 and Noise("batch").groups(7) == 1
