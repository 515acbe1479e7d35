"""RMSNorm of the prefix, quantised in the same kernel when an FP8 product reads it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.spec import (
    FLOATS,
    FP8,
    Case,
    Device,
    KernelSpec,
    Launch,
    Problem,
    check,
    check_output,
    moved_bytes,
    poisoned_output,
    row_launches,
)
from halfpi.kernels.tile import begin, store, valid_count

# Of every norm in π0.5 (openpi gemma.py, siglip.py).
NORM_EPS = 1e-6


def rms_norm_reference(x: Tensor, gain: Tensor) -> tuple[Tensor]:
    """x / rms(x) · gain → (m, d), in fp32. x: (m, d), gain: (d,), Gemma's 1 + weight."""
    return (F.rms_norm(x.float(), gain.shape, gain, NORM_EPS),)


@triton.jit
def rms_normalised(value, D, EPS: tl.constexpr):
    """The row `value`, zero past its D elements, divided by its root mean square."""
    return value * tl.rsqrt(tl.sum(value * value) / D + EPS)


@triton.jit
def _rms_norm_kernel(
    x, gain, out, scale, count, M, D,
    EPS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    factor = tl.load(gain + cols, mask=inside, other=0.0)
    begin(PDL)
    if row < valid_count(count, 0, M):
        value = tl.load(x + row * D + cols, mask=inside, other=0.0).to(tl.float32)
        value = rms_normalised(value, D, EPS) * factor
        store(out + row * D + cols, value, scale, inside)


def rms_norm(
    x: Tensor,
    gain: Tensor,
    out: Tensor,
    launch: Launch,
    *,
    scale: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """Write `rms_norm_reference` to `out` (m, d).

    x: bfloat16 (m, d). gain: fp32 (d,). scale: fp32 (1,), quantises an E4M3 `out`. count: int32
    (1,), the rows that are valid; others are neither read nor written.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    m, d = x.shape
    check("x", x, (m, d), *FLOATS)
    check("gain", gain, (d,), torch.float32)
    check_output(out, (m, d), scale)
    check("count", count, (1,), torch.int32)
    _rms_norm_kernel[(m,)](
        x, gain, out, scale, count, m, d,
        EPS=NORM_EPS, BLOCK_D=triton.next_power_of_2(d), **launch.options(),
    )  # fmt: skip


def _problem(case: Case, launch: Launch, device: torch.device) -> Problem:
    m, d = case["m"], case["d"]
    inputs = {
        "x": (3 * torch.randn(m, d, device=device)).to(case.dtype),
        "gain": 1 + 0.3 * torch.randn(d, device=device),
    }
    output = poisoned_output((m, d), case, device, torch.arange(m) < case["valid"])
    count = torch.full((1,), case["valid"], dtype=torch.int32, device=device)
    return Problem(
        run=lambda: rms_norm(
            **inputs, out=output.tensor, launch=launch, scale=output.scale, count=count
        ),
        reference=rms_norm_reference,
        inputs=inputs,
        outputs=(output,),
        flops=4 * m * d,
        bytes=moved_bytes(inputs, output.tensor),
    )


def _launches(case: Case, device: Device) -> tuple[Launch, ...]:
    return row_launches(case["d"], device)


def _cases() -> Iterator[Case]:
    for out_dtype in (torch.bfloat16, FP8):
        yield Case("prefill", {"m": 968, "d": 2048, "valid": 968}, out_dtype=out_dtype)
    yield Case("ragged", {"m": 9, "d": 72, "valid": 7}, real=False)
    yield Case("ragged-wide", {"m": 3, "d": 300, "valid": 3}, out_dtype=FP8, real=False)


SPEC = KernelSpec("rms_norm", tuple(_cases()), _problem, _launches)
