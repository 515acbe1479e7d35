"""Attention of few queries with one head of keys, as one CUDA kernel for Hopper.

All heads of a token are rows of one product. A cluster of eight blocks has 64 rows and shares out
the keys; its blocks merge their averages from shared memory to shared memory, where the Triton
kernel needs a second one. The CUDA source lies in `cuda/` and is compiled at run time (extra
`hopper`).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from halfpi.kernels.cuda_launch import CudaKernel, load, tensor_map
from halfpi.kernels.cuda_source import is_available
from halfpi.kernels.spec import FP8, Case, Device

HEAD_DIM = 256
_ROWS, _TILE, _LINE = 64, 128, 64  # rows of a cluster, keys and dimensions of a copy
_PEERS = 8
_DEFINES = {"SHARED_BYTES": 184_832}
_THREADS = 256
_MOST_ROWS = 15 * _ROWS  # as many clusters run at a time


def supports(case: Case, device: Device) -> bool:
    """Whether the kernel can do a `case` of attention on `device`, and is meant for it."""
    few = case["t"] * case["q"] <= _MOST_ROWS
    fits = (case["k"], case["kv"]) == (HEAD_DIM, 1) and case.dtype == torch.bfloat16
    return few and fits and device.capability == 90 and is_available()


def packed_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    *,
    key_count: Tensor | None = None,
    query_count: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """As `attention`, of (b, t, q, 256) and (b, s, 1, 256); invalid keys must be finite.

    The caller has checked what `attention` checks. Raises ValueError naming the tensor with other
    sizes, or whose sequences and heads do not lie side by side.
    """
    b, t, q, _ = query.shape
    for name, tensor, heads in (("query", query, q), ("keys", keys, 1), ("values", values, 1)):
        expected = (b, tensor.shape[1], heads, HEAD_DIM)
        if tensor.shape != expected or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {expected}, "
                f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    kernel = _kernel(out.dtype == FP8, query.device)
    maps = (
        tensor_map(operand.view(-1, HEAD_DIM), (rows, _LINE))
        for operand, rows in ((query, _ROWS), (keys, _TILE), (values, _TILE))
    )
    kernel(
        (_PEERS, math.ceil(t * q / _ROWS), b), *maps, out, scale, key_count, query_count,
        keys.shape[1], t * q, q,
    )  # fmt: skip


@functools.cache
def _kernel(quantises: bool, device: torch.device) -> CudaKernel:
    defines = {**_DEFINES, "FP8": int(quantises)}
    return load("packed_attention", defines, device, _THREADS, dependent=True)
