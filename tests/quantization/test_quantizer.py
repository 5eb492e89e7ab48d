"""The mixture quantizer against the one-page reference, analytic formulas and the identities of nested grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bayeslora.quantization import (
    WIDTHS,
    active_widths,
    codes,
    grid_step,
    hard_concrete,
    mixture_weights,
    optimal_range,
    quantize,
    quantize_mixture,
    rank_gates,
)
from tests.oracles import blora as oracle

# The same examples every time, on a busy machine too.
repeatable = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
seeds = st.integers(0, 2**31)
ranges = st.floats(2**-10, 2**6, width=32)
gates = st.lists(st.floats(0.015625, 0.984375, width=32), min_size=4, max_size=4)
grids = st.sampled_from(WIDTHS[:4])

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantize_gated(x: Tensor, range: Tensor, gates: Tensor) -> Tensor:
    """The mixture over all widths for the gates of 4, 8, 16 and 32 bits."""
    return quantize_mixture(x, range, mixture_weights(gates.float()), WIDTHS)


def between_ties(range: float | Tensor, *shape: int, seed: int) -> Tensor:
    """Values up to 1.3 ranges, each at most 0.4 steps from a level of the 16-bit grid.

    The steps are odd multiples of one another, so a tie of a coarse grid is a tie of every finer one: float32 and
    float64 round these values alike at all widths.
    """
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(-42_000, 42_001, shape, generator=generator).double()
    offset = torch.rand(*shape, generator=generator, dtype=torch.float64) * 0.8 - 0.4
    return ((code + offset) * oracle.step(torch.as_tensor(range, dtype=torch.float64), 16)).float()


def leaf(value: Tensor | float | list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.as_tensor(value).detach().to(dtype).clone().requires_grad_()


def gradients(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of a random projection of it, on fresh leaves of the same dtypes."""
    leaves = [leaf(value, value.dtype) for value in inputs]
    output = function(*leaves)
    upstream = draw(*output.shape, seed=seed + 1).to(output.dtype)
    return output.detach(), list(torch.autograd.grad(output, leaves, upstream))


def assert_equals_reference(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], x: Tensor, range: Tensor, *more: Tensor
) -> None:
    """Values and gradients in float32 against the reference in float64, to a few units in the last place."""
    value, (grad_x, *grads) = gradients(function, x, range, *more)
    expected, (expected_x, *expected_grads) = gradients(reference, *(t.double() for t in (x, range, *more)))
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6 * float(range.max()))
    torch.testing.assert_close(grad_x.double(), expected_x, rtol=0, atol=1e-12)
    # A reduced gradient is a sum over x of terms no larger than `scale`, each good to a few parts in 10^6.
    for grad, wanted, scale in zip(grads, expected_grads, (1.0, float(range.max())), strict=False):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5 * scale * x.numel() ** 0.5)


# Grids


@pytest.mark.parametrize(("bits", "levels"), [(2, 3), (4, 15), (8, 255)])
def test_a_grid_has_two_to_the_bits_less_one_levels_symmetric_about_zero(bits: int, levels: int) -> None:
    x = torch.linspace(-1.4, 1.4, 20_001)
    code = codes(x, torch.tensor(1.0), bits)
    assert code.dtype == torch.int32
    assert code.unique().tolist() == list(range(-(levels // 2), levels // 2 + 1))
    values = quantize(x, torch.tensor(1.0), bits).unique()
    assert len(values) == levels and 0.0 in values
    assert torch.equal(values, -values.flip(0))


def test_two_bits_are_ternary_at_two_thirds_of_the_range() -> None:
    x = torch.tensor([-9.0, -1.6, -0.51, -0.49, 0.0, 0.49, 0.51, 1.4, 9.0])
    torch.testing.assert_close(
        quantize(x, torch.tensor(1.5), 2), torch.tensor([-1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    )


def test_sixteen_bits_reach_the_largest_code_and_no_further() -> None:
    assert codes(torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0]), torch.tensor(1.0), 16).tolist() == [
        -32767, -32767, 0, 32767, 32767,
    ]  # fmt: skip


@repeatable
@given(ranges, grids)
def test_steps_divide_the_doubled_range_and_nest(range: float, bits: int) -> None:
    step = grid_step(torch.tensor(range), bits).item()
    assert step == pytest.approx(2 * range / (2**bits - 1), rel=1e-6)
    if bits < 16:
        assert grid_step(torch.tensor(range), 2 * bits).item() == pytest.approx(step / (2**bits + 1), rel=1e-6)


@repeatable
@given(seeds, ranges, grids)
def test_every_level_is_a_level_of_the_finer_grids(seed: int, range: float, bits: int) -> None:
    x, bound = between_ties(range, 64, seed=seed), torch.tensor(range)
    fixed = quantize(x, bound, bits)
    for finer in [width for width in WIDTHS if bits < width < 32]:
        factor = (2**finer - 1) // (2**bits - 1)
        assert torch.equal(codes(fixed, bound, finer), codes(x, bound, bits) * factor)
        torch.testing.assert_close(quantize(fixed, bound, finer), fixed, rtol=1e-6, atol=0)


@repeatable
@given(seeds, ranges, st.sampled_from(WIDTHS))
def test_quantizing_is_idempotent_and_odd(seed: int, range: float, bits: int) -> None:
    x, bound = draw(97, seed=seed) * range, torch.tensor(range)
    fixed = quantize(x, bound, bits)
    assert torch.equal(quantize(fixed, bound, bits), fixed)
    assert torch.equal(quantize(-x, bound, bits), -fixed)
    if bits < 32:
        torch.testing.assert_close(codes(x, bound, bits) * grid_step(bound, bits), fixed, rtol=1e-6, atol=0)


@repeatable
@given(seeds, ranges, grids)
def test_the_error_inside_the_range_is_at_most_half_a_step(seed: int, range: float, bits: int) -> None:
    bound = torch.tensor(range)
    x = (draw(97, seed=seed) * range).clamp(-bound, bound)
    error = (quantize(x, bound, bits) - x).abs().max().item()
    assert error <= (0.5 + 1e-5) * oracle.step(bound.double(), bits).item() + 1e-6 * range


@repeatable
@given(seeds, ranges)
def test_thirty_two_bits_clip_and_round_nothing(seed: int, range: float) -> None:
    x, bound = draw(97, seed=seed) * range, torch.tensor(range)
    assert torch.equal(quantize(x, bound, 32), x.clamp(-range, range))


# Values and gradients


@repeatable
@given(seeds, ranges, st.sampled_from(WIDTHS))
def test_a_fixed_width_equals_the_reference(seed: int, range: float, bits: int) -> None:
    x = between_ties(range, 64, seed=seed)
    assert_equals_reference(
        lambda x, r: quantize(x, r, bits), lambda x, r: oracle.fixed_width(x, r, bits), x, torch.tensor(range)
    )


@repeatable
@given(seeds, ranges, gates)
def test_the_mixture_equals_the_running_residual_away_from_ties(seed: int, range: float, z: list[float]) -> None:
    x = between_ties(range, 64, seed=seed)
    assert_equals_reference(quantize_gated, oracle.mixture, x, torch.tensor(range), torch.tensor(z))


@repeatable
@given(seeds, ranges, st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=4, max_size=4))
def test_gates_at_the_ends_have_the_reference_gradients_too(seed: int, range: float, z: list[float]) -> None:
    x = between_ties(range, 64, seed=seed)
    assert_equals_reference(quantize_gated, oracle.mixture, x, torch.tensor(range), torch.tensor(z))


@repeatable
@given(seeds, st.lists(st.floats(-6, 6, width=32), min_size=4, max_size=4))
def test_gradients_reach_the_gate_logits_as_in_the_reference(seed: int, phi: list[float]) -> None:
    noise = torch.rand(4, generator=torch.Generator().manual_seed(seed)).clamp(1e-3, 1 - 1e-3)
    assert_equals_reference(
        lambda x, r, p: quantize_gated(x, r, hard_concrete(p, noise)),
        lambda x, r, p: oracle.mixture(x, r, oracle.hard_concrete(p, noise.double())),
        between_ties(1.0, 64, seed=seed),
        torch.tensor(1.0),
        torch.tensor(phi),
    )


def test_the_gradients_are_the_printed_formulas() -> None:
    x, bound, z = torch.tensor([-2.5, -0.9, -0.1, 0.0, 0.33, 0.71, 1.7]), 1.1, [0.8, 0.6, 0.4, 0.2]
    value, (grad_x, grad_range, grad_z) = gradients(quantize_gated, x, torch.tensor(bound), torch.tensor(z))
    upstream = draw(7, seed=1).tolist()
    weights = [0.2, 0.8 * 0.4, 0.8 * 0.6 * 0.6, 0.8 * 0.6 * 0.4 * 0.8, 0.8 * 0.6 * 0.4 * 0.2]
    expected_range, expected_z = 0.0, [0.0] * 4
    for element, (v, g) in enumerate(zip(x.tolist(), upstream, strict=True)):
        clipped = min(bound, max(-bound, v))
        fixed, slope = [], 0.0
        for bits, weight in zip(WIDTHS[:4], weights, strict=False):
            step = 2 * bound / (2**bits - 1)
            limit = 2 ** (bits - 1) - 1
            code = min(limit, max(-limit, round(clipped / step)))
            fixed.append(code * step)
            slope += weight * (code - v / step) * 2 / (2**bits - 1)
        fixed.append(clipped)
        epsilon = [fine - coarse for coarse, fine in zip(fixed[:-1], fixed[1:], strict=True)]
        outside = abs(v) > bound
        mixed = sum(weight * level for weight, level in zip(weights, fixed, strict=True))
        assert value[element].item() == pytest.approx(mixed, abs=1e-6)
        assert grad_x[element].item() == pytest.approx(0.0 if outside else g)
        expected_range += g * (math.copysign(1.0, v) if outside else slope)
        for first in range(4):
            before = math.prod(z[:first])
            inner = sum(epsilon[k] * math.prod(z[first + 1 : k + 1]) for k in range(first, 4))
            expected_z[first] += g * before * inner
    assert grad_range.item() == pytest.approx(expected_range, abs=1e-5)
    assert grad_z.tolist() == pytest.approx(expected_z, abs=1e-5)


@pytest.mark.parametrize("bits", WIDTHS)
def test_an_entry_at_the_range_itself_counts_as_inside(bits: int) -> None:
    """The largest entry of a tensor calibrated by its largest magnitude stands exactly there."""
    x, bound = torch.tensor([-1.5, 1.5]), torch.tensor(1.5)
    leaves = [leaf(x), leaf(bound)]
    grad_x, grad_range = torch.autograd.grad(quantize(*leaves, bits)[1], leaves)
    assert grad_x.tolist() == [0.0, 1.0]
    # The level below the range is (2^b - 2) / (2^b - 1) of it, half a step away.
    assert grad_range.item() == pytest.approx(0.0 if bits == 32 else -1 / (2**bits - 1), abs=1e-6)


@repeatable
@given(gates)
def test_mixture_weights_are_the_probabilities_of_stopping_at_a_width(z: list[float]) -> None:
    weights = mixture_weights(torch.tensor(z, dtype=torch.float64))
    z4, z8, z16, z32 = z
    expected = [1 - z4, z4 * (1 - z8), z4 * z8 * (1 - z16), z4 * z8 * z16 * (1 - z32), z4 * z8 * z16 * z32]
    assert weights.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("opened", range(5))
def test_gates_that_are_all_open_or_shut_round_once(opened: int) -> None:
    """To the last bit, so that training on frozen gates, evaluation and export are the same function."""
    z = torch.tensor([1.0] * opened + [0.0] * (4 - opened))
    ties = torch.arange(-40, 41) / 30  # includes half-integers of the grids
    x, bound = torch.cat([draw(500), ties]), torch.tensor(1.0)
    assert torch.equal(quantize_gated(x, bound, z), quantize(x, bound, WIDTHS[opened]))


@pytest.mark.parametrize("shut", range(4))
def test_gates_behind_a_shut_gate_have_no_effect(shut: int) -> None:
    x, bound = draw(200), torch.tensor(1.0)
    z = torch.ones(4)
    z[shut] = 0.0
    assert torch.equal(quantize_gated(x, bound, z), quantize(x, bound, WIDTHS[shut]))


@repeatable
@given(seeds, st.lists(st.sampled_from([-30.0, -1.0, 0.5, 30.0]), min_size=4, max_size=4))
def test_leaving_out_widths_of_zero_weight_changes_neither_values_nor_gradients(seed: int, phi: list[float]) -> None:
    noise = torch.rand(4, generator=torch.Generator().manual_seed(seed)).clamp(0.4, 0.6)
    widths = active_widths(hard_concrete(torch.tensor(phi), noise).tolist())

    def reduced(x: Tensor, bound: Tensor, p: Tensor) -> Tensor:
        return quantize_mixture(x, bound, mixture_weights(hard_concrete(p, noise)), widths)

    def full(x: Tensor, bound: Tensor, p: Tensor) -> Tensor:
        return quantize_gated(x, bound, hard_concrete(p, noise))

    inputs = between_ties(1.0, 64, seed=seed), torch.tensor(1.0), torch.tensor(phi)
    value, grads = gradients(reduced, *inputs)
    expected, expected_grads = gradients(full, *inputs)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-5)


def test_a_nan_comes_through() -> None:
    out = quantize_gated(torch.tensor([math.nan, 0.3]), torch.tensor(1.0), torch.full((4,), 0.5))
    assert out.isnan().tolist() == [True, False]


# Shapes and dtypes


@repeatable
@given(seeds, gates)
def test_per_channel_ranges_equal_a_range_for_each_row(seed: int, z: list[float]) -> None:
    bounds = torch.rand(5, 1, generator=torch.Generator().manual_seed(seed)) + 0.1
    x = between_ties(bounds, 5, 16, seed=seed)
    upstream = draw(5, 16, seed=seed + 1)
    x_all, r_all, z_all = leaf(x), leaf(bounds), leaf(z)
    together = quantize_gated(x_all, r_all, z_all)
    grad_x, grad_r, grad_z = torch.autograd.grad(together, [x_all, r_all, z_all], upstream)
    assert grad_r.shape == bounds.shape
    total = torch.zeros(4)
    for row in range(5):
        x_row, r_row, z_row = leaf(x[row]), leaf(bounds[row, 0]), leaf(z)
        alone = quantize_gated(x_row, r_row, z_row)
        gx, gr, gz = torch.autograd.grad(alone, [x_row, r_row, z_row], upstream[row])
        torch.testing.assert_close(together[row], alone, rtol=1e-6, atol=1e-7)  # the order of the sum may differ
        assert torch.equal(grad_x[row], gx)
        torch.testing.assert_close(grad_r[row, 0], gr, rtol=1e-5, atol=1e-6)
        total += gz
    torch.testing.assert_close(grad_z, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_per_channel_ranges_at_a_fixed_width_equal_a_range_for_each_row(bits: int) -> None:
    bounds = torch.tensor([[0.3], [1.0], [4.0]])
    x = between_ties(bounds, 3, 16, seed=bits)
    value, (grad_x, grad_r) = gradients(lambda x, r: quantize(x, r, bits), x, bounds)
    expected, (expected_x, expected_r) = gradients(
        lambda x, r: oracle.fixed_width(x, r, bits), x.double(), bounds.double()
    )
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_x.double(), expected_x)
    torch.testing.assert_close(grad_r.double(), expected_r, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_range_of_one_number_keeps_its_shape_in_the_gradient(shape: tuple[int, ...]) -> None:
    bound = leaf(torch.full(shape, 1.0))
    x = between_ties(1.0, 3, 4, seed=0).t()  # not contiguous
    z = torch.full((4,), 0.5)
    out = quantize_gated(x, bound, z)
    out.sum().backward()
    assert out.shape == x.shape and bound.grad.shape == shape
    expected = oracle.mixture(x.double(), torch.ones((), dtype=torch.float64), z.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_zeros_stay_zero_with_finite_gradients(dtype: torch.dtype, per_channel: bool) -> None:
    x = torch.zeros(6, 8, dtype=dtype)
    bound = optimal_range(x, dim=1 if per_channel else None)
    for z in ([1.0] * 4, [0.0] * 4, [0.7, 0.5, 0.3, 0.1]):
        value, grads = gradients(quantize_gated, x, bound, torch.tensor(z))
        assert value.dtype == dtype and not value.any()
        assert [grad.dtype for grad in grads] == [dtype, torch.float32, torch.float32]
        assert all(torch.isfinite(grad).all() for grad in grads)
    for bits in WIDTHS:
        value, grads = gradients(lambda x, r, bits=bits: quantize(x, r, bits), x, bound)
        assert not value.any() and all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_is_rounded_in_float32_and_handed_back_as_it_came(dtype: torch.dtype) -> None:
    x = between_ties(1.0, 256, seed=0).to(dtype)
    bound, z = torch.tensor(1.0), torch.tensor([0.9, 0.8, 0.7, 0.6])
    value, (grad_x, grad_range, grad_z) = gradients(quantize_gated, x, bound, z)
    wide = leaf(x.float()), leaf(bound), leaf(z)
    expected = quantize_gated(*wide)
    upstream = draw(256, seed=1).to(dtype).float()
    expected_x, expected_range, expected_z = torch.autograd.grad(expected, wide, upstream)
    assert value.dtype == grad_x.dtype == dtype
    assert torch.equal(value, expected.to(dtype))
    assert torch.equal(grad_x, expected_x.to(dtype))
    assert torch.equal(grad_range, expected_range) and torch.equal(grad_z, expected_z)


def test_sixteen_bits_differ_from_eight_in_bfloat16_gradients_of_the_gates() -> None:
    """Eight significant bits are too few for the difference; float32 inside keeps it."""
    x = draw(512).to(torch.bfloat16)
    _, (_, _, grad_z) = gradients(quantize_gated, x, torch.tensor(4.0), torch.full((4,), 0.5))
    assert grad_z[2] != 0


@pytest.mark.parametrize("shape", [(0,), (0, 7), (7, 0)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_empty_tensors_have_empty_values_and_zero_gradients(shape: tuple[int, ...], per_channel: bool) -> None:
    """What the matrices of a module are once its last rank is cut out."""
    if per_channel and len(shape) == 1:
        pytest.skip("a vector has no channels")
    x = torch.zeros(shape)
    bound = optimal_range(x, dim=1 if per_channel else None)
    assert (bound > 0).all()
    value, (grad_x, grad_range, grad_z) = gradients(quantize_gated, x, bound, torch.full((4,), 0.5))
    assert value.shape == grad_x.shape == shape
    assert grad_range.shape == bound.shape and not grad_range.any() and not grad_z.any()
    for bits in WIDTHS:
        assert gradients(lambda x, r, bits=bits: quantize(x, r, bits), x, bound)[0].shape == shape
    assert codes(x, bound, 4).shape == shape


# Under autocast, checkpointing and compilation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_quantizer_in_float32(dtype: torch.dtype) -> None:
    inputs = draw(64, 16).to(dtype), torch.tensor(1.7), torch.tensor([0.9, 0.8, 0.7, 0.6])
    expected, expected_grads = gradients(quantize_gated, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grads = gradients(quantize_gated, *inputs)
    assert value.dtype == dtype and torch.equal(value, expected)
    assert all(torch.equal(grad, wanted) for grad, wanted in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    inputs = draw(32, 16), draw(8, 16, seed=1), torch.tensor(1.7), torch.tensor([0.9, 0.8, 0.7, 0.6])

    def layer(x: Tensor, weight: Tensor, bound: Tensor, z: Tensor) -> Tensor:
        return quantize_gated(torch.tanh(x) @ quantize_gated(weight, bound, z).T, bound, z)

    expected, expected_grads = gradients(layer, *inputs)
    leaves = [leaf(value) for value in inputs]
    value = checkpoint(layer, *leaves, use_reentrant=reentrant)
    value.backward(draw(*value.shape, seed=1))
    assert torch.equal(value, expected)
    assert all(torch.equal(tensor.grad, wanted) for tensor, wanted in zip(leaves, expected_grads, strict=True))


@contextmanager
def saved_bytes() -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps for the backward pass, by address."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("per_channel", [False, True])
def test_only_the_input_the_range_and_the_gates_are_kept_for_the_backward_pass(
    dtype: torch.dtype, per_channel: bool
) -> None:
    x = leaf(draw(64, 128), dtype)
    bound = leaf(torch.full((64, 1) if per_channel else (), 2.0))
    logits = leaf([0.5, 0.2, 0.1, -0.3])
    with saved_bytes() as kept:
        gate = hard_concrete(logits, torch.full((4,), 0.5))
        out = quantize_gated(x, bound, gate)
    own = x.numel() * x.element_size()
    assert x.untyped_storage().data_ptr() in kept
    assert sum(kept.values()) - own <= bound.numel() * 4 + 1024  # 1024 bytes for a handful of four-element tensors
    assert out.untyped_storage().data_ptr() not in kept


def test_a_fixed_width_keeps_no_more() -> None:
    x, bound = leaf(draw(64, 128)), leaf(2.0)
    with saved_bytes() as kept:
        quantize(x, bound, 4)
    assert sum(kept.values()) - x.numel() * 4 <= 256


def compiled_cases() -> list[tuple[Tensor, Tensor, Tensor]]:
    z = torch.tensor([0.9, 0.6, 0.4, 0.2])
    rows = torch.linspace(0.5, 2.0, 6)[:, None]
    edge = between_ties(1.0, 6, 20, seed=0)
    edge[0, :2] = torch.tensor([1.0, -1.0])  # the range itself
    return [
        (edge, torch.tensor(1.0), z),
        (between_ties(rows, 6, 20, seed=1), rows, z),
        (between_ties(1.0, 6, 20, seed=2), torch.tensor(1.0), torch.tensor([1.0, 0.0, 0.0, 0.0])),
    ]


def assert_compiled_equals_eager(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(quantize_gated, backend=backend, fullgraph=True)
    for inputs in compiled_cases():
        expected, expected_grads = gradients(quantize_gated, *inputs)
        value, grads = gradients(compiled, *inputs)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        for grad, wanted in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=2e-5)


def test_tracing_finds_one_graph_with_the_values_and_gradients_of_eager_mode() -> None:
    assert_compiled_equals_eager("aot_eager")


def has_cpp_compiler() -> bool:
    from torch._inductor import config, exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(config.cpp.cxx) and bool(get_cpp_compiler())
    except exc.InvalidCxxCompiler:
        return False


needs_compiler = pytest.mark.skipif("not has_cpp_compiler()", reason="no C++ compiler")


@pytest.mark.slow
@needs_compiler
def test_compiled_values_and_gradients_equal_eager_mode() -> None:
    assert_compiled_equals_eager("inductor")


@pytest.mark.parametrize("rows", [1, 256])
@pytest.mark.parametrize("widths", [(4,), (2, 4), WIDTHS])
def test_large_tensors_have_the_values_and_gradients_of_the_reference(rows: int, widths: tuple[int, ...]) -> None:
    """Of the size of a real weight matrix, a range a tensor or a range a row, with one, two or all widths."""
    bounds = torch.linspace(0.5, 2.0, rows)[:, None]
    x = between_ties(bounds, 256, 256, seed=0)
    z = torch.tensor([0.6 if bits in widths[1:] else float(bits in widths[:1]) for bits in WIDTHS[1:]])
    weights = mixture_weights(z)
    value, (grad_x, grad_range) = gradients(lambda x, r: quantize_mixture(x, r, weights, widths), x, bounds)
    expected, (expected_x, expected_range) = gradients(
        lambda x, r: oracle.mixture(x, r, z.double()), x.double(), bounds.double()
    )
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(grad_x.double(), expected_x)
    torch.testing.assert_close(grad_range.double(), expected_range, rtol=1e-4, atol=5e-3)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_large_tensor_is_rounded_as_its_pieces_are(bits: int) -> None:
    """To the last bit, ties included: an output must not depend on the size of the batch it was computed in."""
    x, bound = torch.cat([draw(40_000), torch.arange(-400, 401) / 300]), torch.tensor(1.37)
    whole = quantize(x, bound, bits)
    assert torch.equal(whole, torch.cat([quantize(piece, bound, bits) for piece in x.split(10_000)]))
    assert torch.equal(quantize(whole, bound, bits), whole)


# Algorithm 1


KINDS = ("weight", "A", "E", "B", "A_out", "E_out", "out")


@pytest.mark.parametrize("quantize_input", [False, True])
def test_algorithm_1_built_from_these_parts_equals_the_reference(quantize_input: bool) -> None:
    rank, d_in, d_out = 4, 12, 10
    tensors = {
        "x": draw(3, 5, d_in, seed=1),
        "weight": draw(d_out, d_in, seed=2) * 0.3,
        "bias": draw(d_out, seed=3) * 0.1,
        "A": draw(rank, d_in, seed=4) * 0.4,
        "E": draw(rank, seed=5),
        "B": draw(d_out, rank, seed=6) * 0.4,
        "xi": torch.tensor([6.0, 2.0, 1.5, -2.0]),
    }
    kinds = (*KINDS, "in") if quantize_input else KINDS
    for index, kind in enumerate(kinds):
        tensors[f"range/{kind}"] = torch.tensor(1.3 + 0.1 * index)
        tensors[f"gates/{kind}"] = torch.rand(4, generator=torch.Generator().manual_seed(index)) * 0.8 + 0.1

    def reference(*values: Tensor) -> Tensor:
        t = dict(zip(tensors, values, strict=True))
        quantizers = {kind: oracle.Quantizer(t[f"range/{kind}"], t[f"gates/{kind}"]) for kind in kinds}
        return oracle.forward(
            t["x"], t["weight"], t["bias"], t["A"], t["E"], t["B"], 2.0, oracle.rank_gates(t["xi"]), quantizers
        )

    def built(*values: Tensor) -> Tensor:
        t = dict(zip(tensors, values, strict=True))

        def q(kind: str, value: Tensor) -> Tensor:
            return quantize_gated(value, t[f"range/{kind}"], t[f"gates/{kind}"])

        x = q("in", t["x"]) if quantize_input else t["x"]
        low = q("A_out", torch.nn.functional.linear(x, q("A", t["A"])))
        low = q("E_out", low * (q("E", t["E"]) * rank_gates(t["xi"])))
        update = torch.nn.functional.linear(low, q("B", t["B"]))
        return q("out", torch.nn.functional.linear(x, q("weight", t["weight"]), t["bias"]) + 2.0 * update)

    value, grads = gradients(built, *tensors.values())
    expected, expected_grads = gradients(reference, *(tensor.double() for tensor in tensors.values()))
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-4)
    for name, grad, wanted in zip(tensors, grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        assert wanted.abs().sum() > 0, name
