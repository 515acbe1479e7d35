"""Camera images to rows of patches, so that SigLIP's patch embedding is one linear layer.

A convolution whose stride is its kernel is a product with the pixels of each patch. Those are in
the order of an image in memory, row, column, channel: runs of 42 bytes are read at a time.
`patch_weight` packs a convolution's weight the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.spec import (
    FP8,
    Case,
    Device,
    KernelSpec,
    Launch,
    Problem,
    check_output,
    moved_bytes,
    poisoned_output,
    row_launches,
)
from halfpi.kernels.tile import begin, scalar, store


def patchify_reference(images: Tensor, patch: int, width: int) -> tuple[Tensor]:
    """Pixels of each patch, row-major patches of all images → fp32 (n·t, width), zero-padded.

    images: (n, h, w, c), uint8, which is mapped to [-1, 1], or floating point, which is not. t is
    h/patch · w/patch; the pixels of a patch are in the order (row, column, channel).
    """
    pixels = images.float() if images.is_floating_point() else images.float() / 127.5 - 1
    rows = pixels.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3)
    patches = rows.flatten(3).flatten(0, 2)
    return (F.pad(patches, (0, width - patches.shape[1])),)


@triton.jit
def _patchify_kernel(
    images, out, scale, patches_y, patches_x, width, stride_n, stride_y, stride_x, stride_c,
    PATCH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    image, place = row // (patches_y * patches_x), row % (patches_y * patches_x)
    cols = tl.arange(0, BLOCK)
    pixel, channel = cols // CHANNELS, cols % CHANNELS
    y = place // patches_x * PATCH + pixel // PATCH
    x = place % patches_x * PATCH + pixel % PATCH
    scale = scalar(scale, 1.0)
    begin(PDL)
    pointers = images + image * stride_n + y * stride_y + x * stride_x + channel * stride_c
    raw = tl.load(pointers, mask=cols < PATCH * PATCH * CHANNELS, other=0)
    value = raw.to(tl.float32)
    if raw.dtype == tl.uint8:
        value = tl.where(cols < PATCH * PATCH * CHANNELS, value / 127.5 - 1.0, 0.0)
    store(out + row * width + cols, value, scale, cols < width)


def patchify(
    images: Tensor, patch: int, out: Tensor, launch: Launch, *, scale: Tensor | None = None
) -> None:
    """Write `patchify_reference` to `out` (n·t, width).

    images: (n, h, w, c) of any strides, uint8, or fp32 that is in [-1, 1] already. h and w are
    multiples of `patch`. width: at least patch²·c; more is zero, for products that want it aligned.
    scale: fp32 (1,), quantises an E4M3 `out`.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    n, h, w, channels = images.shape
    if images.dtype not in (torch.uint8, torch.float32) or h % patch or w % patch:
        raise ValueError(
            f"images must be uint8 or float32 (n, h, w, c) with h and w multiples of {patch}, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    width = max(out.shape[-1], patch * patch * channels)
    patches_y, patches_x = h // patch, w // patch
    check_output(out, (n * patches_y * patches_x, width), scale)
    _patchify_kernel[(out.shape[0],)](
        images, out, scale, patches_y, patches_x, width, *images.stride(),
        PATCH=patch, CHANNELS=channels, BLOCK=triton.next_power_of_2(width), **launch.options(),
    )  # fmt: skip


def patch_weight(weight: Tensor, width: int) -> Tensor:
    """A patch convolution's weight (d, c, patch, patch) for rows of `patchify` → (d, width)."""
    rows = weight.permute(0, 2, 3, 1).flatten(1)
    return F.pad(rows, (0, width - rows.shape[1]))


def _problem(case: Case, launch: Launch, device: torch.device) -> Problem:
    n, side, patch, width = (case[name] for name in ("n", "side", "patch", "width"))
    shape = (n, side, 2 * side if case["wide"] else side, 3)
    if case.dtype == torch.uint8:
        images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    else:  # a model's own layout: channels first
        images = torch.rand(n, 3, *shape[1:3], device=device).movedim(1, -1) * 2 - 1
    inputs = {"images": images, "patch": patch}
    output = poisoned_output((n * shape[1] * shape[2] // patch**2, width), case, device)
    return Problem(
        run=lambda: patchify(images, patch, output.tensor, launch, scale=output.scale),
        reference=patchify_reference,
        inputs={**inputs, "width": width},
        outputs=(output,),
        flops=2 * images.numel(),
        bytes=moved_bytes(inputs, output.tensor),
    )


def _launches(case: Case, device: Device) -> tuple[Launch, ...]:
    return row_launches(case["width"], device)


def _cases() -> Iterator[Case]:
    vision = {"n": 3, "side": 224, "patch": 14, "width": 592, "wide": 0}
    for dtype in (torch.uint8, torch.float32):
        yield Case("vision", vision, dtype)
    ragged = {"n": 2, "side": 12, "patch": 4, "width": 49, "wide": 1}
    yield Case("ragged", ragged, torch.uint8, real=False)
    yield Case("ragged-wide", {**ragged, "width": 300}, torch.float32, FP8, real=False)


SPEC = KernelSpec("patchify", tuple(_cases()), _problem, _launches)
