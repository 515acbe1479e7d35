"""Linear operations as one CUDA kernel for Hopper: any width of tiles, weights ahead of the wait.

One wave of tiles fills a GPU only if tiles may be of any width, and Triton's are powers of two.
A block fetches its first weights before it waits for the kernel before, and brings its share of the
next product's to the L2. Blocks of a cluster may share the weights of a tile. The CUDA source,
`cuda/linear.cu`, is compiled at run time (extra `hopper`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfpi.kernels.cuda_launch import load_once, tensor_map
from halfpi.kernels.spec import FP8
from halfpi.kernels.tile import TileLaunch

LINE_BYTES = 128  # of a row of operands, that a copy brings
GROUP_ROWS = 64  # of a group of 128 threads
COLUMNS = 16  # of which the width of a tile is a multiple
WIDEST = {1: 256, 2: 256, 3: 192}  # columns of a tile, by groups that share a multiprocessor
_CROWDED = 3  # groups, of which the shares of registers are too small
ALIGNED_BYTES = 16  # of rows that are copied
# What follows the product, as in `cuda/epilogue.cuh`.
_PLAIN, _GATED, _ROTATED = range(3)


@dataclass(frozen=True)
class Rotated:
    """Keys and values (s, kv, k) and the factors of rotations (s, k/2), see `qkv_rope`."""

    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor
    offset: Tensor | None


@dataclass(frozen=True)
class Variant:
    """What is compiled for, beside the launch. head: of queries and keys that are rotated, or 0."""

    dtype: torch.dtype
    out_dtype: torch.dtype
    bias_bytes: int = 0
    gelu: bool = False
    gated: bool = False
    head: int = 0

    def held(self, launch: TileLaunch) -> bool:
        """Whether a tile is finished during the next one's products."""
        return bool(launch.programs) and self.gated and launch.block_m > GROUP_ROWS

    def threads(self, launch: TileLaunch) -> int:
        """Of a block: its groups, and a warp that copies, or a group that leaves them registers."""
        groups = launch.block_m // GROUP_ROWS
        return 128 * groups + (128 if groups >= _CROWDED or self.held(launch) else 32)

    def defines(self, launch: TileLaunch) -> dict[str, int]:
        """The macros of `cuda/linear.cu`."""
        return {
            "FP8": int(self.dtype == FP8),
            "OUT_FP8": int(self.out_dtype == FP8),
            "GROUPS": launch.block_m // GROUP_ROWS,
            "WIDTH": launch.block_n,
            "STAGES": launch.num_stages,
            "PEERS": launch.peers,
            "ONE_TILE": int(not launch.programs),
            "HELD": int(self.held(launch)),
            "THREADS": self.threads(launch),
            "EPILOGUE": _GATED if self.gated else _ROTATED if self.head else _PLAIN,
            "BIAS": self.bias_bytes,
            "GELU": int(self.gelu),
            "HEAD": self.head,
            "SHARED_BYTES": shared_bytes(
                launch, self.out_dtype.itemsize, bias=self.bias_bytes > 0, gated=self.gated
            ),
        }


def hopper_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor | None,
    launch: TileLaunch,
    *,
    alpha: Tensor | None = None,
    bias: Tensor | None = None,
    gelu: bool = False,
    gated: bool = False,
    rotated: Rotated | None = None,
    scale: Tensor | None = None,
    count: Tensor | None = None,
    later: Tensor | None = None,
) -> None:
    """Write alpha · x · weightᵀ to `out`, (m, n) or (split_k, m, n), with what follows it.

    x: (m, k), weight: (n, k), bfloat16 or E4M3, as `out`. bias, gelu, scale, count, later: see
    `linear`. gated: as `geglu` does, with (m, n/2). rotated: as `qkv_rope` does, with the query or
    None. The caller has checked what those check. Raises ValueError naming the tensor, or the
    launch, whose rows are not of whole 16 bytes.
    """
    (m, k), n = x.shape, weight.shape[0]
    if launch.programs and bias is not None:
        raise ValueError(f"a block with several tiles has no bias, got {launch}")
    results = (out,) if rotated is None else (out, rotated.keys, rotated.values)
    last = results[-1]
    assert last is not None  # only the query may be
    for name, tensor in (("x", x), ("weight", weight), *(("out", one) for one in results)):
        if tensor is not None:
            _check_rows(name, tensor)
    if (launch.block_n // 2 if gated else launch.block_n) * last.itemsize % ALIGNED_BYTES:
        raise ValueError(f"tiles must have rows of whole {ALIGNED_BYTES} bytes, got {launch}")
    what = Variant(
        dtype=x.dtype,
        out_dtype=last.dtype,
        bias_bytes=0 if bias is None else bias.itemsize,
        gelu=gelu,
        gated=gated,
        head=0 if rotated is None else rotated.keys.shape[-1],
    )
    kernel = load_once("linear", x.device, what.threads(launch), **what.defines(launch))
    columns = LINE_BYTES // x.itemsize
    maps = (
        tensor_map(x, (launch.block_m, columns)),
        tensor_map(weight, (launch.block_n // launch.peers, columns)),
    )
    clusters = math.ceil(m / (launch.block_m * launch.peers)) * math.ceil(n / launch.block_n)
    blocks = clusters * launch.peers * launch.split_k
    grid = min(blocks, launch.programs or blocks)
    kernel(
        (grid,), *maps, out, bias, alpha, scale, count, m, n, k, launch.split_k,
        later, 0 if later is None else later.nbytes, *_rotation(rotated, n),
    )  # fmt: skip


def _check_rows(name: str, tensor: Tensor) -> None:
    whole = tensor.shape[-1] * tensor.itemsize % ALIGNED_BYTES == 0 and tensor.is_contiguous()
    if not whole or tensor.dtype not in (torch.bfloat16, FP8):
        raise ValueError(
            f"{name} must be bfloat16 or E4M3 in rows of whole {ALIGNED_BYTES} bytes one behind "
            f"another, got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
        )


def _rotation(rotated: Rotated | None, n: int) -> tuple[Tensor | int | None, ...]:
    """The kernel's last arguments."""
    if rotated is None:
        return (None,) * 5 + (0,) * 3
    keys = rotated.keys
    kv_width = keys.shape[1] * keys.shape[2]
    tensors = (rotated.cos, rotated.sin, keys, rotated.values, rotated.offset)
    return (*tensors, n - 2 * kv_width, kv_width, keys.shape[0])


def shared_bytes(launch: TileLaunch, out_itemsize: int, *, bias: bool, gated: bool) -> int:
    """Shared memory of a block, as `cuda/linear.cu` lays it out."""
    width = launch.block_n // 2 if gated else launch.block_n
    ring = launch.num_stages * (launch.block_m + launch.block_n) * LINE_BYTES
    staged = launch.block_m * (width * out_itemsize + 16)
    tiles = ring + staged if launch.programs else max(ring, staged)
    return tiles + bias * launch.block_n * 4 + launch.num_stages * 16
