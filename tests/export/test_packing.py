"""Codes survive the way through bytes at every width and shape, and bytes that are no codes are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bayeslora import BayesLoraError
from bayeslora.export.container import pack, packed_size, unpack
from bayeslora.quantization import codes as quantizer_codes

SHAPES = st.lists(st.integers(0, 7), min_size=0, max_size=3)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from([2, 4, 8, 16]), shape=SHAPES, seed=st.integers(0, 1000))
def test_codes_come_back_and_take_no_more_bytes_than_their_bits(bits: int, shape: list[int], seed: int) -> None:
    level = (1 << (bits - 1)) - 1
    codes = torch.randint(-level, level + 1, shape, generator=torch.Generator().manual_seed(seed))
    data = pack(codes, bits)
    assert data.dtype == torch.uint8 and data.ndim == 1
    assert len(data) == packed_size(codes.numel(), bits) == -(-codes.numel() * bits // 8)
    again = unpack(data, bits, shape)
    assert again.shape == codes.shape and torch.equal(again.long(), codes)


@pytest.mark.parametrize(
    ("codes", "bits", "expected"),
    [
        ([1, -1, 0, 1, -1], 2, [0b01_00_11_01, 0b11]),
        ([7, -7, 3], 4, [0x97, 0x03]),
        ([127, -127], 8, [0x7F, 0x81]),
        ([256, -2], 16, [0x00, 0x01, 0xFE, 0xFF]),
    ],
)
def test_the_layout_is_the_documented_one(codes: list[int], bits: int, expected: list[int]) -> None:
    assert pack(torch.tensor(codes), bits).tolist() == expected


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_what_a_quantizer_makes_can_always_be_packed(bits: int) -> None:
    codes = quantizer_codes(torch.randn(5, 7) * 3, torch.tensor(1.3), bits)
    assert torch.equal(unpack(pack(codes, bits), bits, (5, 7)).int(), codes)


def test_32_bits_are_float32_bit_by_bit() -> None:
    x = torch.tensor([[1.5, -0.0, float("inf")], [1e-45, float("nan"), -3.25]])
    again = unpack(pack(x, 32), 32, (2, 3))
    assert torch.equal(again.view(torch.int32), x.view(torch.int32))
    assert unpack(pack(x.bfloat16(), 32), 32, (2, 3))[1, 2] == -3.25


def test_a_transposed_tensor_is_packed_in_its_own_order() -> None:
    codes = torch.tensor([[1, 0, -1], [0, 1, 1]]).T
    assert torch.equal(unpack(pack(codes, 2), 2, (3, 2)).long(), codes)


def test_bytes_that_pack_cannot_have_written_are_refused() -> None:
    with pytest.raises(BayesLoraError, match="have 3 bytes, but"):
        unpack(torch.zeros(3, dtype=torch.uint8), 2, (5,))
    with pytest.raises(BayesLoraError, match="not padded"):
        unpack(torch.tensor([0, 0b0100], dtype=torch.uint8), 2, (5,))
    for bits, data in ((2, [0b10]), (4, [0x8]), (8, [0x80]), (16, [0x00, 0x80])):
        with pytest.raises(BayesLoraError, match=f"not a code of {bits} bits"):
            unpack(torch.tensor(data, dtype=torch.uint8), bits, (1,))


def test_codes_that_do_not_fit_and_other_widths_are_refused() -> None:
    with pytest.raises(BayesLoraError, match="is ±2, but .* must be within ±1"):
        pack(torch.tensor([0, -2]), 2)
    for bits in (0, 1, 3, 64):
        with pytest.raises(BayesLoraError, match=f"the width is {bits}, but"):
            pack(torch.zeros(1), bits)
        with pytest.raises(BayesLoraError, match=f"the width is {bits}, but"):
            unpack(torch.zeros(1, dtype=torch.uint8), bits, (1,))
