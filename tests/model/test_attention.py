"""Attention and rotary positions against other ways to compute the same."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from halfpi.model.attention import attention, key_bias, rotate, rotation


def _qkv(t: int, s: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, t, 6, 8, generator=generator)
    key = torch.randn(2, 2, s, 8, generator=generator)
    value = torch.randn(2, 2, s, 8, generator=generator)
    return query, key, value


def test_grouped_attention_matches_torch() -> None:
    query, key, value = _qkv(5, 9)
    mask = torch.tensor([[True] * 7 + [False] * 2, [False] + [True] * 8])
    expected = F.scaled_dot_product_attention(
        query.transpose(1, 2), key, value, attn_mask=mask[:, None, None], enable_gqa=True
    )
    got = attention(query, [key], [value], key_bias(mask))
    torch.testing.assert_close(got, expected.transpose(1, 2).flatten(2))


def test_attention_without_bias_matches_torch() -> None:
    query, key, value = _qkv(5, 9)
    expected = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, enable_gqa=True)
    got = attention(query, [key], [value])
    torch.testing.assert_close(got, expected.transpose(1, 2).flatten(2))


def test_segments_are_one_sequence() -> None:
    query, key, value = _qkv(5, 9)
    bias = key_bias(torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) > 0.3)
    got = attention(query, torch.split(key, [4, 5], 2), torch.split(value, [4, 5], 2), bias)
    torch.testing.assert_close(got, attention(query, [key], [value], bias))


def test_a_row_without_valid_keys_is_finite() -> None:
    query, key, value = _qkv(5, 9)
    assert (
        attention(query, [key], [value], key_bias(torch.zeros(2, 9, dtype=torch.bool)))
        .isfinite()
        .all()
    )


def test_rotation_is_a_complex_product() -> None:
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 7, 100, 967, 1017]])
    frequency = 10_000.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    angle = positions[..., None, None] * frequency
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1).float()
    torch.testing.assert_close(rotate(x, rotation(positions, 8)), expected, atol=2e-4, rtol=0)
