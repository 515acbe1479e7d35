"""Softmax attention and rotary positions, shared by SigLIP, the prefix and the action expert.

In π0.5 a token is either readable by everybody or by nobody: the prefix is bidirectional among its
valid tokens, actions read the valid prefix and all actions. A mask over keys is therefore enough.
Rows of padded queries still attend to valid keys, so they stay finite, and nobody reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The masked logit of openpi gemma.py: finite, so that a row without valid keys is not NaN either.
MASKED_LOGIT = -2.3819763e38
ROPE_BASE = 10_000.0


class Rotation(NamedTuple):
    """Rotary factors of tokens, fp32, each (b, t, 1, k); the sign of the rotation is in `sin`."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, head_dim: int) -> Rotation:
    """Rotary factors of `positions` (b, t) int64, for the half-split layout of openpi gemma.py."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device) / head_dim
    angle = positions[..., None, None] * ROPE_BASE**-exponent
    cos, sin = angle.cos(), angle.sin()
    return Rotation(torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate each head of `x` (b, t, q, k) in fp32; the output has the dtype of `x`.

    The halves (x1, x2) of a head become (x1·cos − x2·sin, x2·cos + x1·sin).
    """
    wide = x.float()
    swapped = wide.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(wide * by.cos, swapped, by.sin).to(x.dtype)


def key_bias(mask: Tensor) -> Tensor:
    """What to add to logits to hide keys invalid in `mask` bool (b, s): fp32 (b, 1, 1, s)."""
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_fill(~mask, MASKED_LOGIT)[:, None, None]


def attention(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], bias: Tensor | None = None
) -> Tensor:
    """Attend from `query` (b, t, q, k) to segments of keys and values → (b, t, q·k).

    keys, values: one tensor (b, kv, s_i, k) a segment. Segments are joined as logits, so a prefix
    that many calls share is never copied. bias: `key_bias` over all segments.

    Products are in the working dtype, softmax in fp32. The query heads of a group become rows of
    one matrix product with their common key head.
    """
    b, t, q, k = query.shape
    kv = keys[0].shape[1]
    rows = query.view(b, t, kv, q // kv, k).transpose(1, 2).reshape(b, kv, -1, k)
    products = [rows @ key.mT for key in keys]
    logits = torch.cat(products, -1) if len(products) > 1 else products[0]
    scale = k**-0.5
    scaled = logits.float() * scale if bias is None else torch.add(bias, logits, alpha=scale)
    weights = torch.softmax(scaled, -1).to(query.dtype)
    parts = torch.split(weights, [value.shape[2] for value in values], -1)
    mixed = parts[0] @ values[0]
    for part, value in zip(parts[1:], values[1:], strict=True):
        mixed = mixed + part @ value
    return mixed.view(b, kv, t, q // kv, k).transpose(1, 2).reshape(b, t, q * k)
