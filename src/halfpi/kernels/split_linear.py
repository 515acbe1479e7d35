"""Partial products of x · weightᵀ: few rows of x, all of a large weight.

The weights are read once and are nearly all that costs, so every multiprocessor should be reading
all the time: K is split among programs, and with pdl a program fetches its weights into L2 while
the kernel before it still runs. Partial products go to memory; the operation that consumes them
adds them in a fixed order in its own kernel. That makes results deterministic without atomics.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from halfpi.kernels.hopper_linear import hopper_linear
from halfpi.kernels.launches import hopper_launches, split_linear_launches
from halfpi.kernels.spec import (
    FLOATS,
    FP8,
    Case,
    Device,
    KernelSpec,
    Problem,
    check,
    moved_bytes,
    poisoned_output,
    random_operands,
)
from halfpi.kernels.tile import (
    TileLaunch,
    begin_product,
    part_cols,
    part_count,
    product_tile,
    store,
    tile_origin,
    valid_count,
)

# Sums of partial products are small kernels; their time hardly depends on the tile.
_SUM_TILE = {"BLOCK_M": 8, "BLOCK_N": 128, "BLOCK_K": 16}


def split_linear_reference(x: Tensor, weight: Tensor, split_k: int, block_k: int) -> tuple[Tensor]:
    """Products of x (m, k) and weight (n, k) over `split_k` ranges of K → (split_k, m, n).

    All ranges have the same whole number of steps of `block_k`, except where K ends.
    """
    length = math.ceil(math.ceil(x.shape[1] / block_k) / split_k) * block_k
    ranges = [slice(split * length, (split + 1) * length) for split in range(split_k)]
    return (torch.stack([F.linear(x[:, one], weight[:, one]) for one in ranges]),)


@triton.jit
def _split_linear_kernel(
    x, weight, tail, partials, count, M, N, K, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PROMOTE: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row, col = tile_origin(tl.program_id(0), M, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    STEP: tl.constexpr = BLOCK_K * (PROMOTE if PROMOTE > 0 else 1)
    length = tl.cdiv(tl.cdiv(K, STEP), SPLIT_K) * STEP
    k_first = split * length
    valid = valid_count(count, 0, M)
    begin_product(weight, col, k_first, N, K, BLOCK_N, BLOCK_K, AHEAD, PDL)
    if row < valid:
        product = product_tile(
            x, (weight, tail), row, col,
            k_first, tl.minimum(k_first + length, K), M, N, K,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA, PROMOTE,
        )  # fmt: skip
        rows = row + tl.arange(0, BLOCK_M)[:, None]
        for part in tl.static_range(part_count(BLOCK_N)):
            cols = part_cols(col, BLOCK_N, part)[None, :]
            inside = (rows < valid) & (cols < N)
            store(partials + (split * M + rows) * N + cols, product[part], 1.0, inside)


def split_linear(
    x: Tensor,
    weight: Tensor,
    partials: Tensor,
    launch: TileLaunch,
    *,
    count: Tensor | None = None,
    later: Tensor | None = None,
) -> None:
    """Write the products over `launch.split_k` ranges of K, see `split_linear_reference`.

    x: (m, k), weight: (n, k), both bfloat16 or both E4M3. partials: (split_k, m, n), float32 or
    bfloat16, which it is for a library. count: int32 (1,), the rows that are valid; others are
    neither computed nor written, except by a library. later: see `linear`.

    Raises ValueError naming the tensor that is not so.
    """
    (m, k), n = x.shape, weight.shape[0]
    check("x", x, (m, k), FP8, *FLOATS)
    check("weight", weight, (n, k), x.dtype)
    check("partials", partials, (launch.split_k, m, n), *FLOATS)
    check("count", count, (1,), torch.int32)
    if launch.kernel == "library":
        multiply(x, weight, partials[0])
        return
    if launch.kernel == "hopper":
        hopper_linear(x, weight, partials, launch, count=count, later=later)
        return
    tiles = triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n)
    _split_linear_kernel[(tiles, launch.split_k)](
        *_operands(x, weight, launch), partials, count, m, n, k, **_tile_constants(launch, k)
    )


def multiply(x: Tensor, weight: Tensor, out: Tensor, alpha: Tensor | None = None) -> None:
    """Write alpha · x · weightᵀ to bfloat16 `out` by cuBLAS; only E4M3 has an alpha.

    Exact sums of E4M3 products cost it no time, so they stay on.
    """
    if x.dtype == FP8:
        one = _one(x.device)
        alpha = one if alpha is None else alpha
        torch._scaled_mm(x, weight.T, alpha, one, out_dtype=out.dtype, out=out)
    else:
        torch.mm(x, weight.T, out=out)


@functools.cache
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)


def launch_linear(
    kernel: Any,
    x: Tensor,
    weight: Tensor,
    partials: Tensor | None,
    launch: TileLaunch,
    *arguments: Any,
    **constants: Any,
) -> None:
    """Run an operation's `kernel` over all tiles of x (m, k) · weight (n, k)ᵀ.

    With split_k > 1 or a library, `split_linear` first writes `partials` (split_k, m, n), and the
    kernel sums them. It is called with x or partials, weight and tail or None, `arguments`, M, N, K
    and the constants of `linear_tile`.
    """
    (m, k), n = x.shape, weight.shape[0]
    check("x", x, (m, k), FP8, *FLOATS)
    check("weight", weight, (n, k), x.dtype)
    if not launch.needs_partials:
        operands, tile = _operands(x, weight, launch), _tile_constants(launch, k)
    elif partials is None:
        raise ValueError(f"partials must be given, got None with {launch}")
    else:
        split_linear(x, weight, partials, launch)
        operands = (partials, None, None)
        plain = dataclasses.replace(launch, ahead=0, tma=False, promote=0)
        tile = _tile_constants(plain, k) | _SUM_TILE
    tiles = triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
    persistent = launch.programs > 0 and not launch.needs_partials
    grid = min(tiles, launch.programs) if persistent else tiles
    tile["PERSISTENT"] = persistent
    kernel[(grid,)](*operands, *arguments, m, n, k, **constants, **tile)


def _operands(x: Tensor, weight: Tensor, launch: TileLaunch) -> tuple[Any, ...]:
    """x, weight and tail as a kernel takes them: with TMA, a descriptor for each part of a tile."""
    if not launch.tma:
        return x, weight, None
    blocks = ((x, launch.block_m), *((weight, width) for width in launch.widths))
    descriptors = [
        TensorDescriptor.from_tensor(operand, [rows, launch.block_k]) for operand, rows in blocks
    ]
    return (*descriptors, None)[:3]


def _tile_constants(launch: TileLaunch, k: int) -> dict[str, Any]:
    return {
        "SPLIT_K": launch.split_k,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
        "EVEN_K": launch.tma or k % (launch.block_k * max(launch.promote, 1)) == 0,
        "AHEAD": launch.ahead,
        "TMA": launch.tma,
        "PROMOTE": launch.promote,
        **launch.options(),
    }


def _problem(case: Case, launch: TileLaunch, device: torch.device) -> Problem:
    m, n, k = case["m"], case["n"], case["k"]
    x, weight, _ = random_operands(m, n, k, case.dtype, device)
    valid = (torch.arange(m) < case["valid"]).expand(launch.split_k, m)
    partials = poisoned_output((launch.split_k, m, n), case, device, valid)
    count = torch.full((1,), case["valid"], dtype=torch.int32, device=device)
    return Problem(
        run=lambda: split_linear(x, weight, partials.tensor, launch, count=count),
        reference=split_linear_reference,
        inputs={
            "x": x,
            "weight": weight,
            "split_k": launch.split_k,
            "block_k": launch.block_k * max(launch.promote, 1),
        },
        outputs=(partials,),
        flops=2 * m * n * k,
        bytes=moved_bytes({"x": x, "weight": weight}, partials.tensor[0]),
    )


def _launches(case: Case, device: Device) -> tuple[TileLaunch, ...]:
    m, n, k, itemsize = case["m"], case["n"], case["k"], case.dtype.itemsize
    itemsizes = (itemsize, case.workspace_dtype.itemsize)
    launches = split_linear_launches(m, n, k, itemsize, device)
    # A fourth part costs the norm that adds them more than the product gains.
    return launches + hopper_launches(m, n, k, itemsizes, device, splits=(1, 2, 3))


def _cases() -> Iterator[Case]:
    both, wide = (torch.bfloat16, FP8), (torch.bfloat16,)
    real = (
        ("vision-fc2", 768, 1152, 4352, both),
        ("vision-out", 768, 1152, 1152, wide),
        ("prefill-down", 968, 2048, 16384, both),
        ("prefill-out", 968, 2048, 2048, wide),
        ("expert-out", 50, 1024, 2048, both),
        ("expert-down", 50, 1024, 4096, both),
    )
    for name, m, n, k, dtypes in real:
        for dtype in dtypes:
            yield Case(name, {"m": m, "n": n, "k": k, "valid": m}, dtype)
    yield Case("ragged", {"m": 23, "n": 72, "k": 80, "valid": 17}, real=False)
    yield Case("ragged-k", {"m": 70, "n": 40, "k": 144, "valid": 70}, FP8, real=False)


SPEC = KernelSpec("split_linear", tuple(_cases()), _problem, _launches)
