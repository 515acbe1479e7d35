"""RMSNorm of the prefix, quantised in the same kernel when an FP8 product reads it.

When the block before left partial products (`split_linear`), the same kernel first adds them to the
residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.hopper_norm import hopper_norm, norm_launches
from halfpi.kernels.spec import (
    FLOATS,
    FP8,
    Case,
    KernelSpec,
    Launch,
    Output,
    Problem,
    check,
    check_output,
    moved_bytes,
    poisoned_output,
)
from halfpi.kernels.tile import begin, partial_row, scalar, store, valid_count

# Of every norm in π0.5 (openpi gemma.py, siglip.py).
NORM_EPS = 1e-6


def rms_norm_reference(
    x: Tensor,
    gain: Tensor,
    partials: Tensor | None = None,
    alpha: Tensor | None = None,
    *,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """What is left of `x` (m, d), with partials or to `keep`, and its norm in fp32, both (m, d).

    x' = x + alpha · Σ partials and out = x' / rms(x') · gain. gain: (d,), Gemma's 1 + weight.
    partials: (splits, m, d). alpha: (1,).
    """
    if partials is not None:
        update = partials.sum(0)
        x = x + (update if alpha is None else update * alpha).to(x.dtype)
    out = F.rms_norm(x.float(), gain.shape, gain, NORM_EPS)
    return (x, out) if keep or partials is not None else (out,)


@triton.jit
def rms_normalised(value, D, EPS: tl.constexpr):
    """The row `value`, zero past its D elements, divided by its root mean square."""
    return value * tl.rsqrt(tl.sum(value * value) / D + EPS)


@triton.jit
def _rms_norm_kernel(
    x, kept, gain, partials, alpha, out, scale, count, M, D,
    SPLITS: tl.constexpr, EPS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    factor = tl.load(gain + cols, mask=inside, other=0.0)
    valid, alpha, scale = valid_count(count, 0, M), scalar(alpha, 1.0), scalar(scale, 1.0)
    begin(PDL)
    if row < valid:
        places = row * D + cols
        value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        if SPLITS > 0:
            update = partial_row(partials, places, inside, M * D, SPLITS)
            value += update * alpha
        if kept is not None:
            tl.store(kept + places, value.to(x.dtype.element_ty), mask=inside)
        store(out + places, rms_normalised(value, D, EPS) * factor, scale, inside)


def rms_norm(
    x: Tensor,
    gain: Tensor,
    out: Tensor,
    launch: Launch,
    *,
    partials: Tensor | None = None,
    alpha: Tensor | None = None,
    kept: Tensor | None = None,
    scale: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """Write `rms_norm_reference` to `out` and `kept`, which with partials is `x` without another.

    x, kept: bfloat16 (m, d). gain: fp32 (d,). partials: (splits, m, d) from `split_linear`. alpha:
    fp32 (1,), the product of the scales of what `split_linear` read. scale: fp32 (1,), quantises an
    E4M3 `out`. count: int32 (1,), the rows that are valid; others are neither read nor written.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    m, d = x.shape
    splits = 0 if partials is None else partials.shape[0]
    check("x", x, (m, d), *FLOATS)
    check("gain", gain, (d,), torch.float32)
    check("partials", partials, (splits, m, d), *FLOATS)
    check("alpha", alpha, (1,), torch.float32)
    check("kept", kept, (m, d), x.dtype)
    check_output(out, (m, d), scale)
    check("count", count, (1,), torch.int32)
    if partials is not None and kept is None:
        kept = x
    if launch.kernel == "hopper":
        hopper_norm(
            x, gain, out, NORM_EPS,
            partials=partials, alpha=alpha, kept=kept, scale=scale, count=count,
        )  # fmt: skip
        return
    _rms_norm_kernel[(m,)](
        x, kept, gain, partials, alpha, out, scale, count, m, d,
        SPLITS=splits, EPS=NORM_EPS, BLOCK_D=triton.next_power_of_2(d), **launch.options(),
    )  # fmt: skip


def _problem(case: Case, launch: Launch, device: torch.device) -> Problem:
    m, d, splits = case["m"], case["d"], case["splits"]
    inputs = {
        "x": (3 * torch.randn(m, d, device=device)).to(case.dtype),
        "gain": 1 + 0.3 * torch.randn(d, device=device),
    }
    if splits:
        inputs["partials"] = torch.randn(splits, m, d, device=device).to(case.workspace_dtype)
        inputs["alpha"] = torch.full((1,), 0.5, device=device)
    keep = bool(case.sizes.get("keep"))
    reference = partial(rms_norm_reference, keep=keep)
    return norm_problem(rms_norm, reference, inputs, case, launch, flops=4, keep=keep)


def norm_problem(
    norm: Callable[..., None],
    reference: Callable[..., tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    case: Case,
    launch: Launch,
    flops: int,
    *,
    keep: bool = False,
) -> Problem:
    """A `norm` of `inputs`, among them x (m, d) and maybe partials, of which some rows are valid.

    flops: of each value, without its share of the partials. keep: beside x, instead of in place.
    """
    (m, d), splits, device = inputs["x"].shape, case["splits"], inputs["x"].device
    valid = torch.arange(m) < case["valid"]
    x = inputs["x"] if keep else inputs["x"].clone()
    kept = Output(torch.full_like(x, torch.nan) if keep else x, valid=valid)
    output = poisoned_output((m, d), case, device, valid)
    count = torch.full((1,), case["valid"], dtype=torch.int32, device=device)
    return Problem(
        run=lambda: norm(
            **{**inputs, "x": x, **({"kept": kept.tensor} if keep else {})},
            out=output.tensor,
            launch=launch,
            scale=output.scale,
            count=count,
        ),
        reference=reference,
        inputs=inputs,
        outputs=(kept, output) if keep or splits else (output,),
        flops=(flops + splits) * m * d,
        bytes=moved_bytes(inputs, output.tensor, *([kept.tensor] if keep or splits else [])),
    )


def _cases() -> Iterator[Case]:
    prefill = {"m": 968, "d": 2048, "valid": 968, "splits": 0}
    for out_dtype in (torch.bfloat16, FP8):
        yield Case("prefill", prefill, out_dtype=out_dtype)
        yield Case("prefill-first", {**prefill, "keep": 1}, out_dtype=out_dtype)
        yield Case("prefill-sum", {**prefill, "splits": 2}, out_dtype=out_dtype)
    yield Case("ragged", {"m": 9, "d": 72, "valid": 7, "splits": 0}, real=False)
    ragged = {"m": 3, "d": 300, "valid": 3, "splits": 3}
    yield Case("ragged-wide", ragged, out_dtype=FP8, real=False)
    yield Case("ragged-kept", {**ragged, "valid": 2, "keep": 1}, out_dtype=FP8, real=False)


SPEC = KernelSpec("rms_norm", tuple(_cases()), _problem, norm_launches)
