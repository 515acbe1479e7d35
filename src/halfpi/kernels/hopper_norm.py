"""LayerNorm and RMSNorm as one CUDA kernel for Hopper: a warp has a row, a block its share of rows.

A block brings what all rows need, the weights of the norm, before it waits for the kernel before.
All that a row reads is asked for at once. The CUDA source, `cuda/row_norm.cu`, is compiled at run
time (extra `hopper`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from halfpi.kernels.cuda_launch import load_once
from halfpi.kernels.cuda_source import is_available
from halfpi.kernels.spec import FP8, Case, Device, Launch, row_launches

_CHUNK = 8  # numbers that a lane loads at once
_MOST_ROWS, _MOST_NUMBERS = 8, 2048  # of a block, of a row


def supports(d: int, dtype: torch.dtype) -> bool:
    """Whether the kernel is for rows of `d` numbers of `dtype`: it keeps them in registers."""
    return dtype == torch.bfloat16 and d % _CHUNK == 0 and d <= _MOST_NUMBERS


def norm_launches(case: Case, device: Device) -> tuple[Launch, ...]:
    """Launches of LayerNorm and RMSNorm worth measuring; the first is the default."""
    triton = row_launches(case["d"], device)
    hopper = device.capability == 90 and is_available() and supports(case["d"], case.dtype)
    return (Launch(pdl=True, kernel="hopper"), *triton) if hopper else triton


def hopper_norm(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    partials: Tensor | None = None,
    alpha: Tensor | None = None,
    partials_bias: Tensor | None = None,
    kept: Tensor | None = None,
    scale: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """As `layer_norm` with a bias, else as `rms_norm`, which have checked all but `partials`.

    kept: gets `x` with partials added, maybe in place.

    Raises ValueError naming the tensor that is not bfloat16, or whose rows have another width.
    """
    m, d = x.shape
    for name, tensor in (("x", x), ("partials", partials)):
        if tensor is not None and not supports(d, tensor.dtype):
            raise ValueError(
                f"{name} must be bfloat16 with rows of at most {_MOST_NUMBERS} numbers, a multiple "
                f"of {_CHUNK}, got {d} of {tensor.dtype}"
            )
    rows = min(math.ceil(m / Device.of(x.device).multiprocessors), _MOST_ROWS)
    splits = 0 if partials is None else partials.shape[0]
    macros = defines(d, splits, rows, eps, out.dtype, layer=bias is not None)
    kernel = load_once("row_norm", x.device, 32 * rows, **macros)
    kernel(
        (math.ceil(m / rows),),
        x, kept, weight, bias, partials, alpha, partials_bias, out, scale, count, m,
    )  # fmt: skip


def defines(
    d: int, splits: int, rows: int, eps: float, out_dtype: torch.dtype, *, layer: bool
) -> dict[str, float]:
    """The macros of `cuda/row_norm.cu`, for `rows` rows a block; LayerNorm if `layer`."""
    return {
        "D": d,
        "SPLITS": splits,
        "LAYER": int(layer),
        "OUT_FP8": int(out_dtype == FP8),
        "THREADS": 32 * rows,
        "EPSILON": eps,
        "SHARED_BYTES": (1 + layer) * d * 4,
    }
