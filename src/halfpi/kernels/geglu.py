"""The wide half of a gated MLP as one product: gelu(gate) · up, quantised for the down projection.

Gate and up rows of the weight alternate, so a tile holds both halves of each output and nothing
but the gated result is written. `interleaved` packs weights that way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.hopper_linear import hopper_linear
from halfpi.kernels.launches import hopper_launches, linear_launches
from halfpi.kernels.spec import (
    FP8,
    Case,
    Device,
    KernelSpec,
    Problem,
    check,
    check_output,
    moved_bytes,
    poisoned_output,
    random_operands,
)
from halfpi.kernels.split_linear import launch_linear
from halfpi.kernels.tile import (
    TileLaunch,
    begin_product,
    gelu_tanh,
    linear_tile,
    pair_cols,
    part_count,
    scalar,
    split_pairs,
    store,
    tile_count,
    tile_origin,
    valid_count,
)


def geglu_reference(x: Tensor, weight: Tensor, alpha: Tensor | None = None) -> tuple[Tensor]:
    """gelu_tanh(alpha · x · gateᵀ) · (alpha · x · upᵀ) → (m, n).

    x: (m, k). weight: (2n, k), rows alternating between gate and up. alpha: (1,).
    """
    product = F.linear(x, weight)
    product = product if alpha is None else product * alpha
    return (F.gelu(product[:, ::2], approximate="tanh") * product[:, 1::2],)


@triton.jit
def _geglu_kernel(
    x, weight, tail, out, alpha, scale, count, M, N, K, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PROMOTE: tl.constexpr, PERSISTENT: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    col = tile_origin(first, M, BLOCK_M, BLOCK_N)[1]
    valid, alpha, scale = valid_count(count, 0, M), scalar(alpha, 1.0), scalar(scale, 1.0)
    begin_product(weight, col, 0, N, K, BLOCK_N, BLOCK_K, AHEAD, PDL)
    tiles = tile_count(valid, N, BLOCK_M, BLOCK_N)
    for tile in tl.range(first, tiles, tl.num_programs(0), flatten=PERSISTENT):
        row, col = tile_origin(tile, valid, BLOCK_M, BLOCK_N)
        product = linear_tile(
            x, (weight, tail), alpha, row, col, M, N, K, SPLIT_K,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA, PROMOTE,
        )  # fmt: skip
        rows = row + tl.arange(0, BLOCK_M)[:, None]
        for part in tl.static_range(part_count(BLOCK_N)):
            gate, up = split_pairs(product[part])
            cols = pair_cols(col, BLOCK_N, part)[None, :]
            inside = (rows < valid) & (cols < N // 2)
            store(out + rows * (N // 2) + cols, gelu_tanh(gate) * up, scale, inside)


def geglu(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    launch: TileLaunch,
    *,
    alpha: Tensor | None = None,
    scale: Tensor | None = None,
    count: Tensor | None = None,
    partials: Tensor | None = None,
) -> None:
    """Write `geglu_reference` to `out` (m, n).

    x: (m, k), weight: (2n, k), both bfloat16 or both E4M3. alpha: fp32 (1,), the product of the
    scales of both. scale: fp32 (1,), quantises an E4M3 `out`. count: int32 (1,), the rows that are
    valid; others are neither computed nor written. partials: see `launch_linear`.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    check_output(out, (x.shape[0], weight.shape[0] // 2), scale)
    check("alpha", alpha, (1,), torch.float32)
    check("count", count, (1,), torch.int32)
    if launch.kernel == "hopper":
        hopper_linear(x, weight, out, launch, alpha=alpha, gated=True, scale=scale, count=count)
        return
    launch_linear(_geglu_kernel, x, weight, partials, launch, out, alpha, scale, count)


def interleaved(first: Tensor, second: Tensor) -> Tensor:
    """Rows of `first` and `second` (n, k) in turn → (2n, k): `gate` and `up` of `geglu`."""
    return torch.stack([first, second], 1).flatten(0, 1)


def _problem(case: Case, launch: TileLaunch, device: torch.device) -> Problem:
    m, n, k = case["m"], case["n"], case["k"]
    x, weight, alpha = random_operands(m, 2 * n, k, case.dtype, device)
    inputs: dict[str, Any] = {"x": x, "weight": weight, "alpha": alpha}
    output = poisoned_output((m, n), case, device, torch.arange(m) < case["valid"])
    count = torch.full((1,), case["valid"], dtype=torch.int32, device=device)
    partials = None
    if launch.needs_partials:
        partials = torch.empty(launch.split_k, m, 2 * n, dtype=case.workspace_dtype, device=device)
    return Problem(
        run=lambda: geglu(
            **inputs,
            out=output.tensor,
            launch=launch,
            scale=output.scale,
            count=count,
            partials=partials,
        ),
        reference=geglu_reference,
        inputs=inputs,
        outputs=(output,),
        flops=4 * m * n * k,
        bytes=moved_bytes(inputs, output.tensor),
    )


def _launches(case: Case, device: Device) -> tuple[TileLaunch, ...]:
    m, n, k = case["m"], 2 * case["n"], case["k"]
    itemsizes = (case.dtype.itemsize, case.out_dtype.itemsize)
    launches = linear_launches(m, n, k, itemsizes[0], device)
    return launches + hopper_launches(m, n, k, itemsizes, device, gated=True)


def _cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, FP8):
        yield Case("prefill", {"m": 968, "n": 16384, "k": 2048, "valid": 968}, dtype, dtype)
        yield Case("expert", {"m": 50, "n": 4096, "k": 1024, "valid": 50}, dtype, dtype)
    yield Case("ragged", {"m": 50, "n": 36, "k": 80, "valid": 37}, real=False)
    yield Case("ragged-many", {"m": 150, "n": 40, "k": 144, "valid": 149}, FP8, FP8, real=False)


SPEC = KernelSpec("geglu", tuple(_cases()), _problem, _launches)
