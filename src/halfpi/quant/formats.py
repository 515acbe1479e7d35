"""Number formats with a static scale per tensor: x ≈ scale · q, where q is stored narrowly.

E4M3 (Micikevicius et al. 2022, "FP8 formats for deep learning") has 4 exponent and 3 mantissa bits,
no infinities and 448 as its largest value: its relative precision is the same from 448 down to
2⁻⁶, so a scale decides what saturates and what falls below that, and nothing in between.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
# The reciprocal of anything smaller overflows fp32.
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantise(x: Tensor, scale: float, dtype: torch.dtype = E4M3) -> Tensor:
    """The nearest values of `dtype` to `x` / scale, ties to even; what is too large saturates.

    x: floating, any shape. dtype: E4M3 or torch.bfloat16. Division is a product with the fp32
    reciprocal of the scale, as in the kernels.

    Raises ValueError when `x` has NaN or infinite values, or the scale is not positive and finite.
    """
    _check_scale(scale)
    bad = x.numel() - int(x.isfinite().sum())
    if bad:
        raise ValueError(f"only finite values can be quantised, got {bad} NaN or infinite ones")
    largest = torch.finfo(dtype).max
    return (x.float() * (1 / scale)).clamp(-largest, largest).to(dtype)


def dequantise(q: Tensor, scale: float) -> Tensor:
    """scale · `q` in fp32. Raises ValueError when the scale is not positive and finite."""
    _check_scale(scale)
    return q.float() * scale


def scale_for(largest: float, dtype: torch.dtype = E4M3) -> float:
    """The scale that maps the magnitude `largest` to the largest value of `dtype`.

    A tensor of zeros takes 1. Raises ValueError when `largest` is negative or not finite.
    """
    if not (math.isfinite(largest) and largest >= 0):
        raise ValueError(f"the largest magnitude must be finite and not negative, got {largest}")
    if largest == 0:
        return 1.0
    return max(largest / torch.finfo(dtype).max, _SMALLEST_SCALE)


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"a scale must be positive and finite, got {scale}")
