"""A linear layer with everything that follows it: bias, GELU, gate, residual, quantisation.

SigLIP's q·k·v, fc1 (GELU, quantised) and fc2 and out (residual), the prefix's out and down
(residual), the projections of actions.
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
    row_stride,
)
from halfpi.kernels.split_linear import launch_linear, multiply
from halfpi.kernels.tile import (
    TileLaunch,
    begin_product,
    gelu_tanh,
    linear_tile,
    part_cols,
    part_count,
    scalar,
    store,
    tile_count,
    tile_origin,
    valid_count,
)


def linear_reference(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor | None = None,
    bias: Tensor | None = None,
    gelu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor]:
    """residual + gate · act(alpha · x · weightᵀ + bias) → (m, n); only x and weight must be there.

    x: (m, k), weight: (n, k), alpha: (1,), bias: (n,), gate: (m or 1, n), residual: (m, n). The
    activation is the tanh form of GELU, or none.
    """
    out = F.linear(x, weight)
    out = out if alpha is None else out * alpha
    out = out if bias is None else out + bias
    out = F.gelu(out, approximate="tanh") if gelu else out
    out = out if gate is None else out * gate
    return (out if residual is None else residual + out,)


@triton.jit
def _linear_kernel(
    x, weight, tail, out, alpha, bias, gate, residual, scale, count, stride_gate, M, N, K,
    GELU: tl.constexpr, SPLIT_K: tl.constexpr,
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
        tile_parts = linear_tile(
            x, (weight, tail), alpha, row, col, M, N, K, SPLIT_K,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA, PROMOTE,
        )  # fmt: skip
        rows = row + tl.arange(0, BLOCK_M)[:, None]
        for part in tl.static_range(part_count(BLOCK_N)):
            value = tile_parts[part]
            cols = part_cols(col, BLOCK_N, part)[None, :]
            inside = (rows < valid) & (cols < N)
            if bias is not None:
                value += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)
            if GELU:
                value = gelu_tanh(value)
            if gate is not None:
                value *= tl.load(gate + rows * stride_gate + cols, mask=inside, other=0.0)
            if residual is not None:
                value += tl.load(residual + rows * N + cols, mask=inside, other=0.0).to(tl.float32)
            store(out + rows * N + cols, value, scale, inside)


def linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    launch: TileLaunch,
    *,
    alpha: Tensor | None = None,
    bias: Tensor | None = None,
    gelu: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    count: Tensor | None = None,
    partials: Tensor | None = None,
    later: Tensor | None = None,
) -> None:
    """Write `linear_reference` to `out` (m, n), which may be `residual` itself.

    x: (m, k), weight: (n, k), both bfloat16, E4M3 or fp32. alpha: fp32 (1,), the product of the
    scales of E4M3 operands. bias: fp32 (n,), or bfloat16 as the operands, which a library needs to
    do bias and GELU itself. gate: fp32 (m or 1, n), of any row stride. residual: (m, n), as `out`
    or fp32. scale: fp32 (1,), quantises an E4M3 `out`. count: int32 (1,), the rows that are valid;
    others are neither computed nor written, except by a library alone. partials: see
    `launch_linear`. later: weights that the next product reads; kernel "hopper" brings them to the
    L2.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    m, n = x.shape[0], weight.shape[0]
    check_output(out, (m, n), scale)
    check("residual", residual, (m, n), out.dtype, torch.float32)
    check("bias", bias, (n,), torch.float32, x.dtype)
    check("alpha", alpha, (1,), torch.float32)
    check("count", count, (1,), torch.int32)
    if launch.kernel == "hopper":
        if gate is not None or residual is not None:
            raise ValueError('kernel "hopper" has neither gate nor residual')
        hopper_linear(
            x, weight, out, launch,
            alpha=alpha, bias=bias, gelu=gelu, scale=scale, count=count, later=later,
        )  # fmt: skip
        return
    if launch.kernel == "library" and gate is residual is scale is None:
        if bias is None and not gelu:
            multiply(x, weight, out, alpha)
            return
        if bias is not None and bias.dtype == x.dtype and gelu:
            torch._addmm_activation(bias, x, weight.T, use_gelu=True, out=out)
            return
    launch_linear(
        _linear_kernel, x, weight, partials, launch,
        out, alpha, bias, gate, residual, scale, count,
        0 if gate is None else row_stride("gate", gate, m, n),
        GELU=gelu,
    )  # fmt: skip


def _problem(case: Case, launch: TileLaunch, device: torch.device) -> Problem:
    m, n, k = case["m"], case["n"], case["k"]
    x, weight, alpha = random_operands(m, n, k, case.dtype, device)
    inputs: dict[str, Any] = {
        "x": x,
        "weight": weight,
        "alpha": alpha,
        "bias": _random_bias(case, device) if case["bias"] else None,
        "gelu": bool(case["gelu"]),
        "gate": torch.randn(m, 3 * n, device=device)[:, :n] if case["gate"] else None,
        "residual": torch.randn(m, n, device=device).to(case.out_dtype)
        if case["residual"]
        else None,
    }
    output = poisoned_output((m, n), case, device, torch.arange(m) < case["valid"])
    count = torch.full((1,), case["valid"], dtype=torch.int32, device=device)
    partials = None
    if launch.needs_partials:
        partials = torch.empty(launch.split_k, m, n, dtype=case.workspace_dtype, device=device)
    return Problem(
        run=lambda: linear(
            **inputs,
            out=output.tensor,
            launch=launch,
            scale=output.scale,
            count=count,
            partials=partials,
        ),
        reference=linear_reference,
        inputs=inputs,
        outputs=(output,),
        flops=2 * m * n * k,
        bytes=moved_bytes(inputs, output.tensor),
    )


def _random_bias(case: Case, device: torch.device) -> Tensor:
    """In the dtype in which the engine packs it."""
    bias = torch.randn(case["n"], device=device)
    return bias.to(case.dtype) if case["gelu"] and case.dtype != FP8 else bias


def _launches(case: Case, device: Device) -> tuple[TileLaunch, ...]:
    m, n, k, itemsize = case["m"], case["n"], case["k"], case.dtype.itemsize
    launches = linear_launches(m, n, k, itemsize, device)
    if itemsize > 2 or case.sizes.get("gate") or case.sizes.get("residual"):
        return launches
    itemsizes, bias = (itemsize, case.out_dtype.itemsize), bool(case.sizes.get("bias", True))
    return launches + hopper_launches(m, n, k, itemsizes, device, bias=bias)


def _cases() -> Iterator[Case]:
    for dtype in (torch.bfloat16, FP8):
        yield Case("vision-qkv", _sizes(768, 3456, 1152), dtype)
        yield Case("vision-fc1", _sizes(768, 4352, 1152, bias=1, gelu=1), dtype, dtype)
    yield Case("vision-patch", _sizes(768, 1152, 640, bias=1, residual=1))
    yield Case("vision-projector", _sizes(768, 2048, 1152, bias=1))
    # What the model keeps in fp32; an Euler step is the residual, with −1/steps in the weight.
    fp32 = torch.float32
    yield Case("action-in", _sizes(50, 1024, 32, bias=1), fp32)
    yield Case("action-out", _sizes(50, 32, 1024, bias=1, residual=1), fp32, fp32)
    everything = {"bias": 1, "gelu": 1, "gate": 1, "residual": 1}
    yield Case("ragged", _sizes(50, 72, 80, valid=37, **everything), real=False)
    yield Case("ragged-many", _sizes(150, 72, 144, valid=149, bias=1), FP8, FP8, real=False)


def _sizes(m: int, n: int, k: int, **others: int) -> dict[str, int]:
    flags = dict.fromkeys(("bias", "gelu", "gate", "residual"), 0)
    return {"m": m, "n": n, "k": k, "valid": m, **flags, **others}


SPEC = KernelSpec("linear", tuple(_cases()), _problem, _launches)
