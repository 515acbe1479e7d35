"""The formats against every value that E4M3 has, enumerated from its definition."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfpi.quant.formats import E4M3, dequantise, quantise, scale_for


def e4m3_magnitudes() -> list[float]:
    """All 127 magnitudes in order: code s.eeee.mmm with bias 7, and no NaN among them."""
    values = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        if exponent == 0:
            values.append(mantissa / 8 * 2.0**-6)
        else:
            values.append((1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return values


MAGNITUDES = e4m3_magnitudes()


def nearest(x: float) -> float:
    """The nearest E4M3 value, of two equally near the one with the even code; saturating."""
    distances = [abs(abs(x) - value) for value in MAGNITUDES]
    best = min(distances)
    codes = [code for code, distance in enumerate(distances) if distance == best]
    return math.copysign(MAGNITUDES[min(codes, key=lambda code: code % 2)], x)


def test_the_enumeration_is_of_torchs_format() -> None:
    codes = torch.arange(0x7F, dtype=torch.uint8)
    assert codes.view(E4M3).float().tolist() == MAGNITUDES
    assert MAGNITUDES[-1] == 448


def test_every_value_is_its_own_quantisation() -> None:
    values = torch.tensor(MAGNITUDES + [-value for value in MAGNITUDES])
    assert torch.equal(quantise(values, 1.0).float(), values)


def test_every_midpoint_goes_to_the_even_neighbour() -> None:
    midpoints = [(low + high) / 2 for low, high in pairwise(MAGNITUDES)]
    expected = [MAGNITUDES[code + code % 2] for code in range(len(midpoints))]
    assert quantise(torch.tensor(midpoints), 1.0).float().tolist() == expected


def test_beside_every_midpoint_it_goes_to_the_nearer_neighbour() -> None:
    low, high = torch.tensor(MAGNITUDES[:-1]), torch.tensor(MAGNITUDES[1:])
    midpoint = (low + high) / 2
    below = torch.nextafter(midpoint, torch.zeros(()))
    above = torch.nextafter(midpoint, torch.tensor(1e9))
    assert torch.equal(quantise(below, 1.0).float(), low)
    assert torch.equal(quantise(above, 1.0).float(), high)


@settings(deadline=None)
@given(st.floats(-1e6, 1e6, width=32))
def test_it_is_the_nearest_value(x: float) -> None:
    assert quantise(torch.tensor(x), 1.0).float().item() == nearest(x)


def test_too_large_saturates_on_both_sides() -> None:
    far = torch.tensor([449.0, 464.0, 480.0, 3e38])
    assert (quantise(far, 1.0).float() == 448).all()
    assert (quantise(-far, 1.0).float() == -448).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_moves_the_range(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 97).to(dtype)
    scale = scale_for(3.0)
    restored = dequantise(quantise(x, scale), scale)
    assert restored.dtype == torch.float32
    assert restored.abs().max().item() == pytest.approx(3.0)
    # Half a unit in the last of four binary digits, or half of the smallest value.
    bound = (x.float().abs() / 16).clamp_min(scale * 2**-10) * 1.001
    assert ((restored - x.float()).abs() <= bound).all()


def test_bf16_rounds_to_nearest_even_and_saturates() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    bits = x.numpy().view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    assert torch.equal(
        quantise(x, 1.0, torch.bfloat16).float(), torch.from_numpy(rounded.view(np.float32))
    )
    largest = torch.finfo(torch.bfloat16).max
    assert quantise(torch.tensor(torch.finfo().max), 1.0, torch.bfloat16).item() == largest


def test_the_scale_maps_the_largest_to_448_and_zeros_to_anything() -> None:
    assert scale_for(448.0) == 1.0
    assert scale_for(0.0) == 1.0


def test_a_scale_of_tiny_values_has_a_finite_reciprocal() -> None:
    tiny = torch.tensor([1e-44])
    assert quantise(tiny, scale_for(tiny.item())).float().isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="only finite values can be quantised, got 1"):
        quantise(torch.tensor([1.0, value]), 1.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_must_be_positive_and_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="a scale must be positive and finite, got"):
        quantise(torch.ones(1), scale)
    with pytest.raises(ValueError, match="a scale must be positive and finite, got"):
        dequantise(torch.ones(1), scale)


@pytest.mark.parametrize("largest", [-1.0, math.nan, math.inf])
def test_a_magnitude_must_be_finite(largest: float) -> None:
    with pytest.raises(ValueError, match="the largest magnitude must be finite"):
        scale_for(largest)
