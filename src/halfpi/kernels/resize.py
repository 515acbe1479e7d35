"""Camera images to the model's squares, with exactly the pixels of Pillow's bilinear filter.

Pillow (src/libImaging/Resample.c) resizes 8-bit images in whole numbers: weights of 22 binary
digits, all columns first, rounded to 8 bits, then all rows. Here a program has one row of the
result and resizes the columns of each row that it is made of by itself, which costs less than a
second pass. Pillow 13 begins with the rows when it shrinks an image that is more than twice as tall
as wide; this kernel does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.spec import (
    Case,
    Device,
    KernelSpec,
    Launch,
    Problem,
    check,
    moved_bytes,
    poisoned_output,
    row_launches,
)
from halfpi.kernels.tile import begin

_BITS = 22
_HALF = tl.constexpr(1 << (_BITS - 1))
_SHIFT = tl.constexpr(_BITS)
_CHANNELS = 3


@dataclass(frozen=True)
class Taps:
    """How an axis is resized to `out` pixels, of up to k pixels of the image each.

    first: int32 (out,), the first of them. weights: int32 (k, out), in units of 2⁻²².
    """

    first: Tensor
    weights: Tensor


def taps(size: int, out: int, device: torch.device) -> Taps:
    """Of an axis of `size` pixels: precompute_coeffs and normalize_coeffs_8bpc of Resample.c."""
    scale = size / out
    support = max(scale, 1.0)
    center = (torch.arange(out, dtype=torch.float64) + 0.5) * scale
    first = (center - support + 0.5).long().clamp(min=0)
    count = (center + support + 0.5).long().clamp(max=size) - first
    index = torch.arange(2 * math.ceil(support) + 1)[:, None]
    distance = ((index + first - center + 0.5) * (1.0 / support)).abs()
    weights = (1 - distance).where((distance < 1) & (index < count), 0.0)
    total = torch.zeros(out, dtype=torch.float64)
    for each in weights:  # in Pillow's order
        total += each
    fixed = (0.5 + weights / total * (1 << _BITS)).int()
    return Taps(first.int().to(device), fixed.to(device))


def resize_reference(images: Tensor, rows: Taps, columns: Taps, size: int) -> tuple[Tensor]:
    """Images (n, h, w, 3) uint8, resized, in the middle of black squares → (n, s, s, 3)."""
    pixels = _resized(_resized(images.long(), columns, 2), rows, 1)
    height, width = pixels.shape[1:3]
    top, left = (size - height) // 2, (size - width) // 2
    around = (0, 0, left, size - width - left, top, size - height - top)
    return (F.pad(pixels, around).byte(),)


def _resized(pixels: Tensor, axis: Taps, dim: int) -> Tensor:
    k, out = axis.weights.shape
    index = axis.first + torch.arange(k, device=axis.first.device)[:, None]
    index = index.clamp(max=pixels.shape[dim] - 1).flatten()
    chosen = pixels.index_select(dim, index).unflatten(dim, (k, out)).movedim(dim, 0)
    weights = axis.weights.view(k, *(out if each == dim else 1 for each in range(4)))
    total: Tensor = (chosen * weights).sum(0) + _HALF.value
    return (total >> _BITS).clamp(0, 255)


@triton.jit
def _rounded(total):
    return tl.minimum(tl.maximum(total >> _SHIFT, 0), 255)


@triton.jit(do_not_specialize=["height", "width", "row_taps", "column_taps", "box_h", "box_w"])
def _resize_kernel(
    images, out, row_first, row_weights, column_first, column_weights,
    height, width, row_taps, column_taps, box_h, box_w, size,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    y, image = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, BLOCK)
    row, column, channel = y - (size - box_h) // 2, cols // 3 - (size - box_w) // 2, cols % 3
    in_rows = (row >= 0) & (row < box_h)
    inside = in_rows & (column >= 0) & (column < box_w)
    first_row = tl.load(row_first + row, mask=in_rows, other=0)
    first_column = tl.load(column_first + column, mask=inside, other=0)
    begin(PDL)
    total = tl.full((BLOCK,), _HALF, tl.int32)
    for v in range(row_taps):
        row_weight = tl.load(row_weights + v * box_h + row, mask=in_rows, other=0)
        # Taps past the end weigh nothing, but must be read somewhere.
        source = image * height + tl.minimum(first_row + v, height - 1)
        line = tl.full((BLOCK,), _HALF, tl.int32)
        for h in range(column_taps):
            weight = tl.load(column_weights + h * box_w + column, mask=inside, other=0)
            place = source * width + tl.minimum(first_column + h, width - 1)
            pixel = tl.load(images + place * 3 + channel, mask=inside, other=0)
            line += pixel.to(tl.int32) * weight
        total += _rounded(line) * row_weight
    value = tl.where(inside, _rounded(total), 0)
    pointers = out + (image * size + y) * size * 3 + cols
    tl.store(pointers, value.to(out.dtype.element_ty), mask=cols < size * 3)


def resize(images: Tensor, out: Tensor, rows: Taps, columns: Taps, launch: Launch) -> None:
    """Write `resize_reference` to `out` (n, s, s, 3), uint8.

    images: uint8 (n, h, w, 3). rows, columns: `taps` from h and w to at most s pixels.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    n, size = out.shape[:2]
    height, width = images.shape[1:3]
    check("images", images, (n, height, width, _CHANNELS), torch.uint8)
    check("out", out, (n, size, size, _CHANNELS), torch.uint8)
    box = []
    for name, axis in (("rows", rows), ("columns", columns)):
        (k, pixels) = axis.weights.shape
        if pixels > size:
            raise ValueError(f"{name} must make at most {size} pixels, got {pixels}")
        check(f"{name}.first", axis.first, (pixels,), torch.int32)
        check(f"{name}.weights", axis.weights, (k, pixels), torch.int32)
        box.append(pixels)
    _resize_kernel[(size, n)](
        images, out, rows.first, rows.weights, columns.first, columns.weights,
        height, width, rows.weights.shape[0], columns.weights.shape[0], *box, size,
        BLOCK=triton.next_power_of_2(size * _CHANNELS), **launch.options(),
    )  # fmt: skip


def _problem(case: Case, launch: Launch, device: torch.device) -> Problem:
    n, height, width, size = (case[name] for name in ("n", "height", "width", "size"))
    images = torch.randint(256, (n, height, width, _CHANNELS), dtype=torch.uint8, device=device)
    fitted = (case["box_h"], case["box_w"])
    rows, columns = (taps(*pair, device) for pair in zip((height, width), fitted, strict=True))
    output = poisoned_output((n, size, size, _CHANNELS), case, device)
    multiplied = n * fitted[1] * _CHANNELS
    by_row, by_column = rows.weights.shape[0], columns.weights.shape[0]
    return Problem(
        run=lambda: resize(images, output.tensor, rows, columns, launch),
        reference=resize_reference,
        inputs={"images": images, "rows": rows, "columns": columns, "size": size},
        outputs=(output,),
        flops=2 * multiplied * (height * by_column + fitted[0] * by_row),
        bytes=moved_bytes({"images": images}, output.tensor),
    )


def _launches(case: Case, device: Device) -> tuple[Launch, ...]:
    return row_launches(_CHANNELS * case["size"], device)


def _cases() -> Iterator[Case]:
    def case(name: str, real: bool, **sizes: int) -> Case:
        return Case(name, sizes, torch.uint8, torch.uint8, real)

    yield case("camera", True, n=3, height=480, width=640, size=224, box_h=168, box_w=224)
    yield case("ragged", False, n=2, height=37, width=23, size=14, box_h=14, box_w=8)
    yield case("ragged-larger", False, n=1, height=5, width=9, size=20, box_h=11, box_w=20)


SPEC = KernelSpec("resize", tuple(_cases()), _problem, _launches)
