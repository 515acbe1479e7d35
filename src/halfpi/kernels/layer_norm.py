"""LayerNorm of SigLIP, quantised in the same kernel when an FP8 product reads it.

When the block before left partial products (`split_linear`), the same kernel first adds them and
that layer's bias to the residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.hopper_norm import hopper_norm, norm_launches
from halfpi.kernels.rms_norm import NORM_EPS, norm_problem
from halfpi.kernels.spec import (
    FLOATS,
    FP8,
    Case,
    KernelSpec,
    Launch,
    Problem,
    check,
    check_output,
)
from halfpi.kernels.tile import begin, partial_row, scalar, store, valid_count


def layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    partials: Tensor | None = None,
    alpha: Tensor | None = None,
    partials_bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """What is left of `x` (m, d), if there are partials, and its norm in fp32, both (m, d).

    x' = x + alpha · Σ partials + partials_bias and out = (x' − mean(x')) / std(x') · weight + bias.
    weight, bias, partials_bias: (d,). partials: (splits, m, d). alpha: (1,).
    """
    if partials is not None:
        update = partials.sum(0)
        update = update if alpha is None else update * alpha
        update = update if partials_bias is None else update + partials_bias
        x = x + update.to(x.dtype)
    out = F.layer_norm(x.float(), weight.shape, weight, bias, NORM_EPS)
    return (out,) if partials is None else (x, out)


@triton.jit
def _layer_norm_kernel(
    x, weight, bias, partials, alpha, partials_bias, out, scale, count, M, D,
    SPLITS: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    factor = tl.load(weight + cols, mask=inside, other=0.0)
    summand = tl.load(bias + cols, mask=inside, other=0.0)
    if partials_bias is not None:
        update_bias = tl.load(partials_bias + cols, mask=inside, other=0.0)
    valid, alpha, scale = valid_count(count, 0, M), scalar(alpha, 1.0), scalar(scale, 1.0)
    begin(PDL)
    if row < valid:
        places = row * D + cols
        value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        if SPLITS > 0:
            update = partial_row(partials, places, inside, M * D, SPLITS)
            value += update * alpha
            if partials_bias is not None:
                value += update_bias
            tl.store(x + places, value.to(x.dtype.element_ty), mask=inside)
        value = tl.where(inside, value - tl.sum(value) / D, 0.0)
        value *= tl.rsqrt(tl.sum(value * value) / D + EPS)
        store(out + places, value * factor + summand, scale, inside)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    launch: Launch,
    *,
    partials: Tensor | None = None,
    alpha: Tensor | None = None,
    partials_bias: Tensor | None = None,
    scale: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """Write `layer_norm_reference` to `out` and, with partials, to `x` in place, both (m, d).

    x: bfloat16 (m, d). weight, bias, partials_bias: fp32 (d,). partials: (splits, m, d) from
    `split_linear`. alpha: fp32 (1,), the product of the scales of what `split_linear` read. scale:
    fp32 (1,), quantises an E4M3 `out`. count: int32 (1,), the rows that are valid; others are
    neither read nor written.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    m, d = x.shape
    splits = 0 if partials is None else partials.shape[0]
    check("x", x, (m, d), *FLOATS)
    for name, row in (("weight", weight), ("bias", bias), ("partials_bias", partials_bias)):
        check(name, row, (d,), torch.float32)
    check("partials", partials, (splits, m, d), *FLOATS)
    check("alpha", alpha, (1,), torch.float32)
    check_output(out, (m, d), scale)
    check("count", count, (1,), torch.int32)
    if launch.kernel == "hopper":
        hopper_norm(
            x, weight, out, NORM_EPS, bias=bias, partials=partials, alpha=alpha,
            partials_bias=partials_bias, kept=None if partials is None else x,
            scale=scale, count=count,
        )  # fmt: skip
        return
    _layer_norm_kernel[(m,)](
        x, weight, bias, partials, alpha, partials_bias, out, scale, count, m, d,
        SPLITS=splits, EPS=NORM_EPS, BLOCK_D=triton.next_power_of_2(d), **launch.options(),
    )  # fmt: skip


def _problem(case: Case, launch: Launch, device: torch.device) -> Problem:
    m, d, splits = case["m"], case["d"], case["splits"]
    inputs = {
        "x": (2 + 3 * torch.randn(m, d, device=device)).to(case.dtype),
        "weight": 1 + 0.3 * torch.randn(d, device=device),
        "bias": torch.randn(d, device=device),
    }
    if splits:
        inputs["partials"] = torch.randn(splits, m, d, device=device).to(case.workspace_dtype)
        inputs["alpha"] = torch.full((1,), 0.5, device=device)
        inputs["partials_bias"] = torch.randn(d, device=device)
    return norm_problem(layer_norm, layer_norm_reference, inputs, case, launch, flops=7)


def _cases() -> Iterator[Case]:
    vision = {"m": 768, "d": 1152, "valid": 768, "splits": 0}
    for out_dtype in (torch.bfloat16, FP8):
        yield Case("vision", vision, out_dtype=out_dtype)
        yield Case("vision-sum", {**vision, "splits": 2}, out_dtype=out_dtype)
    yield Case("ragged", {"m": 9, "d": 72, "valid": 7, "splits": 0}, real=False)
    ragged = {"m": 3, "d": 300, "valid": 3, "splits": 3}
    yield Case("ragged-wide", ragged, out_dtype=FP8, real=False)


SPEC = KernelSpec("layer_norm", tuple(_cases()), _problem, norm_launches)
