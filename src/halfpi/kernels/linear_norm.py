"""A linear layer, the residual that it is added to, and LayerNorm, as one CUDA kernel for Hopper.

The blocks of a cluster have whole rows, each its share of the columns, and tell each other what
they know of mean and variance, from shared memory to shared memory. So partial products do not go
to memory and come back, as from `split_linear` to `layer_norm`, and there is a launch less. The
CUDA source, `cuda/linear_norm.cu`, is compiled at run time (extra `hopper`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.cuda_launch import load_once, tensor_map
from halfpi.kernels.cuda_source import is_available
from halfpi.kernels.hopper_linear import ALIGNED_BYTES, COLUMNS, GROUP_ROWS, LINE_BYTES
from halfpi.kernels.launches import FAST_SUM, FEW_ROWS
from halfpi.kernels.layer_norm import layer_norm_reference
from halfpi.kernels.rms_norm import NORM_EPS
from halfpi.kernels.spec import CLUSTERS, FP8, Device, check

_PEERS, _WARPS = 8, 4  # blocks of a cluster; warps of a block that multiply
_WIDEST = 208  # columns of a block, whose registers hold them
_MOST_STAGES = 8  # steps along K that a block has ahead of the one that is multiplied
# Steps along K, times multiprocessors that have none of the rows: with more a product that all of
# them share is faster, with a norm behind it. Measured between 1 800 and 2 300 (docs/LOG.md).
_MOST_IDLE = 2000


def linear_norm_reference(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    gain: Tensor,
    shift: Tensor,
    alpha: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What is left of `residual` (m, n), and its norm in fp32, both (m, n).

    r = residual + alpha · x · weightᵀ + bias and out = (r − mean(r)) / std(r) · gain + shift.
    x: (m, k), weight: (n, k), alpha: (1,). gain, shift, bias: (n,).
    """
    return layer_norm_reference(residual, gain, shift, F.linear(x, weight)[None], alpha, bias)


def supports(x: Tensor, residual: Tensor, device: Device) -> bool:
    """Whether the kernel is meant for these on `device`: several clusters that run at a time.

    It does any rows, but of few a cluster would read all weights alone, and a long product wants
    most multiprocessors.
    """
    m, n = residual.shape
    steps = math.ceil(x.shape[1] * x.itemsize / LINE_BYTES)
    idle = device.multiprocessors - math.ceil(m / GROUP_ROWS) * _PEERS
    return (
        device.capability == 90
        and is_available()
        and residual.dtype == torch.bfloat16
        and x.dtype in (torch.bfloat16, FP8)
        and FEW_ROWS < m <= GROUP_ROWS * CLUSTERS[_PEERS]
        and steps * idle <= _MOST_IDLE
        and _fits(n, x)
        and (x.dtype != FP8 or x.shape[1] <= FAST_SUM)
    )


def _fits(n: int, x: Tensor) -> bool:
    """Whether blocks have columns of a width that there are products of, and rows can be copied."""
    whole = x.shape[1] * x.itemsize % ALIGNED_BYTES == 0
    return whole and n % (_PEERS * COLUMNS) == 0 and n <= _PEERS * _WIDEST


def linear_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    gain: Tensor,
    shift: Tensor,
    out: Tensor,
    *,
    alpha: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    later: Tensor | None = None,
) -> None:
    """Write `linear_norm_reference` to `residual`, in place, and to `out`, both (m, n).

    x: (m, k), weight: (n, k), both bfloat16 or both E4M3. residual: bfloat16. gain, shift, bias:
    fp32 (n,). alpha: fp32 (1,), the product of the scales of E4M3 operands. scale: fp32 (1,),
    quantises an E4M3 `out`, which is bfloat16 without. later: weights that the next product reads,
    which are brought to the L2.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong, or the sizes that the
    kernel is not for.
    """
    (m, k), n = x.shape, weight.shape[0]
    check("x", x, (m, k), torch.bfloat16, FP8)
    check("weight", weight, (n, k), x.dtype)
    check("residual", residual, (m, n), torch.bfloat16)
    for name, row in (("gain", gain), ("shift", shift), ("bias", bias)):
        check(name, row, (n,), torch.float32)
    check("out", out, (m, n), torch.bfloat16 if scale is None else FP8)
    for name, number in (("alpha", alpha), ("scale", scale)):
        check(name, number, (1,), torch.float32)
    if not _fits(n, x):
        raise ValueError(
            f"weight must have rows of whole {ALIGNED_BYTES} bytes, and a multiple of "
            f"{_PEERS * COLUMNS} of them, at most {_PEERS * _WIDEST}, got {(n, k)}"
        )
    macros = defines(n, x.dtype, out.dtype, Device.of(x.device).shared_bytes)
    kernel = load_once("linear_norm", x.device, 32 * (_WARPS + 1), **macros)
    columns = LINE_BYTES // x.itemsize
    maps = (
        tensor_map(x, (GROUP_ROWS // _PEERS, columns)),
        # Two columns of each four of the output, side by side.
        tensor_map(weight.view(n // 4, 4, k), (n // _PEERS // 4, 2, columns)),
    )
    kernel(
        (math.ceil(m / GROUP_ROWS) * _PEERS,), *maps,
        alpha, bias, residual, gain, shift, out, scale, m, k,
        later, 0 if later is None else later.nbytes,
    )  # fmt: skip


def defines(
    n: int, dtype: torch.dtype, out_dtype: torch.dtype, most_bytes: int
) -> dict[str, float]:
    """The macros of `cuda/linear_norm.cu`, for at most so much shared memory of a block."""
    width = n // _PEERS
    step = (GROUP_ROWS + width) * LINE_BYTES + 16  # operands and barriers
    others = GROUP_ROWS * _PEERS * 8 + 3 * width * 4 + _WARPS * 8
    stages = min(_MOST_STAGES, (most_bytes - others) // step)
    return {
        "FP8": int(dtype == FP8),
        "OUT_FP8": int(out_dtype == FP8),
        "WIDTH": width,
        "STAGES": stages,
        "EPSILON": NORM_EPS,
        "SHARED_BYTES": stages * step + others,
    }
