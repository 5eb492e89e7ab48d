"""Numbers by place: against a page of plain Python, against published hashes, and against their distributions."""

from __future__ import annotations

import math

import pytest
import torch

from bayeslora.posterior import noise

CPU = torch.device("cpu")
INCREMENT = 0x9E3779B97F4A7C15
WORD = (1 << 64) - 1


def mixed(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def hashed(key: int, stream: int, place: int) -> int:
    start = mixed((key + (stream + 1) * INCREMENT) & WORD)
    return mixed((start + (place + 1) * INCREMENT) & WORD)


def oracle(key: int, stream: int, count: int) -> list[float]:
    """Standard normal numbers of one stream, by the equations of the module."""
    found: list[float] = []
    while len(found) < count:
        word = hashed(key, stream, len(found) // 2)
        angle = 2 * math.pi * (word % (1 << 24)) / (1 << 24)
        radius = math.sqrt(-2 * math.log(((word >> 24) + 0.5) / (1 << 40)))
        found += [radius * math.cos(angle), radius * math.sin(angle)]
    return found[:count]


def test_the_hash_is_the_published_one() -> None:
    # The first outputs of SplitMix64 from the state 0, as in the test vectors of several implementations.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    states = torch.arange(1, 4).mul_(noise._signed(INCREMENT))
    assert [word & WORD for word in noise._mixed(states).tolist()] == published
    assert [mixed(i * INCREMENT & WORD) for i in (1, 2, 3)] == published


@pytest.mark.parametrize("key", [0, 1, WORD, noise.key_of("7/layer/")])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_numbers_are_those_of_the_equations(key: int, count: int) -> None:
    streams = [0, 5, 1 << 40]
    drawn = noise.seeded_normal(key, streams, count, CPU)
    expected = torch.tensor([oracle(key, stream, count) for stream in streams]).view(3, count)
    torch.testing.assert_close(drawn, expected, rtol=2e-6, atol=2e-6)
    fractions = [[((hashed(key, s, i) >> 41) + 0.5) / (1 << 23) for i in range(count)] for s in streams]
    assert noise.seeded_uniform(key, streams, count, CPU).tolist() == torch.tensor(fractions).view(3, count).tolist()
    signs = [[2 * (hashed(key, s, i) >> 63) - 1 for i in range(count)] for s in streams]
    assert noise.seeded_signs(key, streams, count, CPU).tolist() == signs


@pytest.mark.parametrize("draw", [noise.seeded_normal, noise.seeded_uniform, noise.seeded_signs])
def test_a_part_is_a_part_of_the_whole(draw: object, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(9, range(6), 41, CPU)  # type: ignore[operator]
    assert torch.equal(draw(9, range(2, 6, 2), 30, CPU), whole[2:6:2, :30])  # type: ignore[operator]
    assert torch.equal(draw(9, [4], 41, CPU), whole[4:5])  # type: ignore[operator]
    monkeypatch.setattr(noise, "_AT_ONCE", 24)
    assert torch.equal(draw(9, range(6), 41, CPU), whole)  # type: ignore[operator]


def test_a_number_is_normal_and_independent_of_its_neighbours_in_place_and_stream() -> None:
    drawn = noise.seeded_normal(noise.key_of("distribution"), range(400), 1000, CPU).double()
    error = drawn.numel() ** -0.5
    assert abs(drawn.mean()) < 4 * error
    assert abs(drawn.square().mean() - 1) < 4 * error * 2**0.5
    assert abs(drawn.pow(3).mean()) < 4 * error * 15**0.5
    assert abs(drawn.pow(4).mean() - 3) < 4 * error * 96**0.5
    for left, right in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:, :-2], drawn[:, 2:]), (drawn[:-1], drawn[1:])):
        assert abs((left * right).mean()) < 4 * error
        assert abs(((left.square() - 1) * (right.square() - 1)).mean()) < 8 * error
    expected = torch.special.ndtr(torch.linspace(-4, 4, 33).double())
    found = (drawn.flatten()[:, None] < torch.linspace(-4, 4, 33)).double().mean(0)
    assert (found - expected).abs().max() < 1.6 * error  # Kolmogorov and Smirnov's bound at 1%


def test_uniform_numbers_are_flat_and_never_at_an_end() -> None:
    drawn = noise.seeded_uniform(3, range(100), 4000, CPU)
    assert 0 < drawn.min() and drawn.max() < 1
    assert (drawn.histc(50, 0, 1) / drawn.numel() * 50 - 1).abs().max() < 4 * (50 / drawn.numel()) ** 0.5
