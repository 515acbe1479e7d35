"""The expert's step from one block to the next: finish the residual, then normalise by the time.

A block's output arrives as the partial products of `split_linear`. One kernel adds them in order,
gates them onto the residual stream, normalises with the next block's scale and shift, and
quantises. A whole row is in one program, so nothing of it is read twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.rms_norm import NORM_EPS, rms_normalised
from halfpi.kernels.spec import (
    FLOATS,
    FP8,
    Case,
    Device,
    KernelSpec,
    Launch,
    Output,
    Problem,
    check,
    check_output,
    moved_bytes,
    poisoned_output,
    row_launches,
    row_stride,
)
from halfpi.kernels.tile import begin, partial_row, scalar, store


def ada_rms_norm_reference(
    residual: Tensor,
    modulation: Tensor,
    partials: Tensor | None = None,
    gate: Tensor | None = None,
    alpha: Tensor | None = None,
    decided: int | None = None,
) -> tuple[Tensor, ...]:
    """What is left of `residual` (m, d) and its modulated norm, both (m, d).

    residual' = residual + gate · alpha · Σ partials, if there are any, and
    out = residual' / rms(residual') · (1 + scale) + shift, in fp32 (openpi gemma.py).

    modulation: (m or 1, 3d), scale, shift and the gate of the block that reads `out`. partials:
    (splits, m, d). gate: (m or 1, d), of the block that wrote them. alpha: (1,). With `decided`,
    modulation and gate have two rows: of the rows from `decided` on, and of those before, whose
    time is another one.
    """
    if decided is not None:
        row = (torch.arange(residual.shape[0], device=residual.device) < decided).long()
        modulation, gate = modulation[row], None if gate is None else gate[row]
    if partials is not None and gate is not None:
        update = partials.sum(0) * gate
        residual = residual + (update if alpha is None else update * alpha).to(residual.dtype)
    scale, shift, _ = modulation.chunk(3, -1)
    out = F.rms_norm(residual.float(), residual.shape[1:], eps=NORM_EPS) * (1 + scale) + shift
    return (out,) if partials is None else (residual, out)


@triton.jit
def _ada_rms_norm_kernel(
    residual, modulation, partials, gate, alpha, out, scale, decided,
    stride_modulation, stride_gate, M, D,
    SPLITS: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    time = row if decided is None else (row < tl.load(decided)).to(tl.int32)
    modulation += time * stride_modulation + cols
    factor = 1.0 + tl.load(modulation, mask=inside, other=0.0)
    shift = tl.load(modulation + D, mask=inside, other=0.0)
    if SPLITS > 0:
        gate_row = tl.load(gate + time * stride_gate + cols, mask=inside, other=0.0)
        if alpha is not None:
            gate_row *= tl.load(alpha)
    scale = scalar(scale, 1.0)
    begin(PDL)

    places = row * D + cols
    value = tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    if SPLITS > 0:
        value += partial_row(partials, places, inside, M * D, SPLITS) * gate_row
        tl.store(residual + places, value.to(residual.dtype.element_ty), mask=inside)
    store(out + places, rms_normalised(value, D, EPS) * factor + shift, scale, inside)


def ada_rms_norm(
    residual: Tensor,
    modulation: Tensor,
    out: Tensor,
    launch: Launch,
    *,
    partials: Tensor | None = None,
    gate: Tensor | None = None,
    alpha: Tensor | None = None,
    scale: Tensor | None = None,
    decided: Tensor | None = None,
) -> None:
    """Write `ada_rms_norm_reference` to `residual`, in place, and `out`, both (m, d).

    residual: bfloat16 or fp32 (m, d), untouched without partials. modulation: fp32 (m or 1, 3d) and
    gate: fp32 (m or 1, d), of any row stride. partials: (splits, m, d) from `split_linear`, with a
    gate. alpha: fp32 (1,), the product of the scales of what `split_linear` read. scale: fp32 (1,),
    quantises an E4M3 `out`. decided: int32 (1,); then modulation and gate are (2, …), and with pdl
    it is read before waiting: no kernel that may still run writes it.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    m, d = residual.shape
    check("residual", residual, (m, d), *FLOATS)
    check_output(out, (m, d), scale)
    splits = 0 if partials is None else partials.shape[0]
    check("partials", partials, (splits, m, d), *FLOATS)
    check("alpha", alpha, (1,), torch.float32)
    if (partials is None) != (gate is None):
        raise ValueError("partials and gate must be given together, got only one of them")
    check("decided", decided, (1,), torch.int32)
    times = m if decided is None else 2
    _ada_rms_norm_kernel[(m,)](
        residual, modulation, partials, gate, alpha, out, scale, decided,
        row_stride("modulation", modulation, times, 3 * d),
        0 if gate is None else row_stride("gate", gate, times, d), m, d,
        SPLITS=splits, EPS=NORM_EPS, BLOCK_D=triton.next_power_of_2(d), **launch.options(),
    )  # fmt: skip


def _problem(case: Case, launch: Launch, device: torch.device) -> Problem:
    m, d, splits, rows = case["m"], case["d"], case["splits"], case["modulations"]
    inputs: dict[str, Any] = {
        "residual": torch.randn(m, d, device=device).to(case.dtype),
        "modulation": torch.randn(rows, 3 * d, device=device),
    }
    if splits:
        inputs["partials"] = torch.randn(splits, m, d, device=device).to(case.workspace_dtype)
        inputs["gate"] = torch.randn(rows, 3 * d, device=device)[:, 2 * d :]
        inputs["alpha"] = torch.full((1,), 0.5, device=device)
    decided = None
    if "decided" in case.sizes:
        inputs["decided"] = case["decided"]
        decided = torch.full((1,), case["decided"], dtype=torch.int32, device=device)
    residual = Output(inputs["residual"].clone())
    output = poisoned_output((m, d), case, device)
    return Problem(
        run=lambda: ada_rms_norm(
            **{**inputs, "residual": residual.tensor, "decided": decided},
            out=output.tensor,
            launch=launch,
            scale=output.scale,
        ),
        reference=ada_rms_norm_reference,
        inputs=inputs,
        outputs=(residual, output) if splits else (output,),
        flops=(8 + splits) * m * d,
        bytes=moved_bytes(inputs, output.tensor, *([residual.tensor] if splits else [])),
    )


def _launches(case: Case, device: Device) -> tuple[Launch, ...]:
    return row_launches(case["d"], device)


def _cases() -> Iterator[Case]:
    expert = {"m": 50, "d": 1024, "splits": 8, "modulations": 1}
    for out_dtype in (torch.bfloat16, FP8):
        yield Case("expert", expert, out_dtype=out_dtype)
        yield Case("expert-first", {**expert, "splits": 0}, out_dtype=out_dtype)
        given = {**expert, "modulations": 2, "decided": 4}
        yield Case("expert-given", given, torch.float32, out_dtype)
    yield Case("ragged", {"m": 7, "d": 72, "splits": 3, "modulations": 7}, real=False)
    ragged = {"m": 3, "d": 300, "splits": 1, "modulations": 1}
    yield Case("ragged-wide", ragged, out_dtype=FP8, real=False)
    ragged = {"m": 7, "d": 72, "splits": 2, "modulations": 2, "decided": 3}
    yield Case("ragged-given", ragged, torch.float32, real=False)


SPEC = KernelSpec("ada_rms_norm", tuple(_cases()), _problem, _launches)
