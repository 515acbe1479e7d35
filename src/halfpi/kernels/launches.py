"""Launches of linear operations worth measuring, by shape; the first is the default."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from halfpi.kernels import hopper_linear
from halfpi.kernels.cuda_source import is_available
from halfpi.kernels.spec import Device
from halfpi.kernels.tile import TileLaunch

# One tile of rows holds them all, so a program streams weights and little else.
FEW_ROWS = 64
_LINE_BYTES = 128
# Programs that keep the memory of a large GPU busy; the default comes closest to it.
_PROGRAMS = 256

# block_m, block_n, lines of memory a step along K, num_warps, num_stages.
_MANY_ROWS = (
    (128, 128, 1, 8, 4),
    (128, 128, 1, 4, 3),
    (128, 128, 2, 8, 2),
    (128, 256, 1, 8, 3),
    (128, 256, 1, 8, 4),
    (64, 256, 1, 4, 4),
    (64, 128, 1, 4, 4),
    (64, 128, 2, 4, 2),
    (128, 64, 1, 4, 4),
    (64, 64, 1, 4, 6),
)
# Widths of tiles of _WAVE_ROWS rows that one wave of programs can have, and their num_stages.
_WAVE_ROWS, _WAVE_WIDTHS = 128, (48, 64, 80, 96, 128, 144, 160, 192, 256)
_WAVE_STAGES = (3, 4, 5, 6)
# cuBLAS wants E4M3 operands of these multiples.
_LIBRARY_ALIGN = 16
# Steps along K that a block of `hopper_linear` has ahead of the one that is multiplied.
_HOPPER_STAGES = (3, 4, 6)
# Warps that keep a multiprocessor's matrix units busy.
_WARPS = 8
# Hopper's E4M3 sums of more than this many products err more than twice a bfloat16 output does; of
# a part of K, whose output is smaller, those of more than the second.
FAST_SUM, _FAST_PART = 8192, 2048
# block_n, lines of memory a step along K, num_stages.
_FEW_ROWS = ((64, 1, 4), (64, 1, 6), (64, 2, 3), (32, 1, 6), (32, 2, 4), (16, 2, 5), (128, 1, 4))


def linear_launches(
    m: int, n: int, k: int, itemsize: int, device: Device
) -> tuple[TileLaunch, ...]:
    """Launches of x (m, k) · weight (n, k)ᵀ that fit `device`; operands have `itemsize` bytes."""
    if m <= FEW_ROWS:
        launches = _few_rows(n, k, itemsize, device)
    else:
        launches = _many_rows(m, n, k, itemsize, device)
    return tuple(one for one in launches if one.shared_bytes(itemsize) <= device.shared_bytes)


def split_linear_launches(
    m: int, n: int, k: int, itemsize: int, device: Device
) -> tuple[TileLaunch, ...]:
    """Launches of `split_linear`; with many rows K is split until every multiprocessor has work."""
    launches = linear_launches(m, n, k, itemsize, device)
    if m <= FEW_ROWS:
        return launches
    split = [
        dataclasses.replace(one, split_k=split_k)
        for split_k in (2, 1, 3, 4)
        for one in launches
        if one.programs == 0 and _tiles(one, m, n) * split_k <= 2 * device.multiprocessors
        if split_k == 1 or one.kernel != "library"
    ]
    for split_k in (2, 3, 4):
        split += _one_wave(m, n, itemsize, device, split_k)
    return tuple(
        one
        if one.kernel == "library"
        else dataclasses.replace(one, promote=_promoted(one, k, itemsize))
        for one in split
        if one.shared_bytes(itemsize) <= device.shared_bytes
    )


def hopper_launches(
    m: int,
    n: int,
    k: int,
    itemsizes: tuple[int, int],
    device: Device,
    *,
    splits: Sequence[int] = (1,),
    bias: bool = False,
    gated: bool = False,
) -> tuple[TileLaunch, ...]:
    """Launches of `hopper_linear` that fit `device`, for operands and outputs of `itemsizes`.

    The narrowest tiles of which all run at once, or the widest, one after another if they are
    gated; of each, more and fewer steps ahead.
    """
    itemsize, out_itemsize = itemsizes
    row_bytes = (k * itemsize, (n // 2 if gated else n) * out_itemsize)
    aligned = all(each % hopper_linear.ALIGNED_BYTES == 0 for each in row_bytes)
    if device.capability != 90 or not is_available() or not aligned or m <= FEW_ROWS:
        return ()
    most, line = FAST_SUM if len(splits) == 1 else _FAST_PART, hopper_linear.LINE_BYTES
    tiles = (
        tile
        for split_k in splits
        if itemsize > 1 or k <= split_k * most
        for tile in _hopper_tiles(m, n, device, split_k, gated=gated)
    )
    launches = (
        dataclasses.replace(tile, block_k=line // itemsize, num_stages=stages, pdl=True)
        for tile in tiles
        for stages in _HOPPER_STAGES
    )
    return tuple(
        one
        for one in launches
        if hopper_linear.shared_bytes(one, out_itemsize, bias=bias, gated=gated)
        <= device.shared_bytes
    )


def _hopper_tiles(
    m: int, n: int, device: Device, split_k: int, *, gated: bool
) -> Iterator[TileLaunch]:
    step = hopper_linear.COLUMNS * (2 if gated else 1)
    for groups, widest in hopper_linear.WIDEST.items():
        block_m = groups * hopper_linear.GROUP_ROWS
        rows = math.ceil(m / block_m)
        widths = range(step, widest + 1, step)
        most = device.multiprocessors // split_k
        width = next((width for width in widths if rows * math.ceil(n / width) <= most), widest)
        tiles = rows * math.ceil(n / width)
        waves = math.ceil(tiles / most)
        for peers in (1, 2):
            if rows % peers == 0:
                # No more than so many waves need: programs that wait take power from others.
                programs = math.ceil(tiles / waves / peers) * peers
                yield TileLaunch(
                    block_m=block_m, block_n=width, split_k=split_k, peers=peers, kernel="hopper",
                    programs=programs if waves > 1 and gated else 0,
                )  # fmt: skip


def _promoted(launch: TileLaunch, k: int, itemsize: int) -> int:
    return int(itemsize == 1 and k > launch.split_k * _FAST_PART)


def _many_rows(m: int, n: int, k: int, itemsize: int, device: Device) -> list[TileLaunch]:
    hopper = device.is_hopper_or_newer
    plain = [
        TileLaunch(
            block_m=block_m, block_n=block_n, block_k=lines * _LINE_BYTES // itemsize,
            num_warps=warps, num_stages=stages, pdl=hopper,
            promote=int(itemsize == 1 and k > FAST_SUM),
        )
        for block_m, block_n, lines, warps, stages in _MANY_ROWS
    ]  # fmt: skip
    if not hopper or k * itemsize % 16:
        return plain
    with_tma = [dataclasses.replace(one, tma=True) for one in plain]
    persistent = [
        dataclasses.replace(one, programs=programs)
        for one in with_tma
        if _tiles(one, m, n) > (programs := device.multiprocessors * (_WARPS // one.num_warps))
    ]
    launches = [*with_tma, *persistent, *plain[:2], *_one_wave(m, n, itemsize, device)]
    if itemsize <= 2 and n % _LIBRARY_ALIGN == 0 and k % _LIBRARY_ALIGN == 0:
        launches.append(TileLaunch(pdl=True, kernel="library"))
    return launches


def _one_wave(m: int, n: int, itemsize: int, device: Device, split_k: int = 1) -> list[TileLaunch]:
    """The narrowest tiles of which all run at once: no width of a power of two fills a GPU."""
    rows = math.ceil(m / _WAVE_ROWS)
    width = next(
        (
            width
            for width in _WAVE_WIDTHS
            if rows * math.ceil(n / width) * split_k <= device.multiprocessors
        ),
        None,
    )
    if width is None or not device.is_hopper_or_newer:
        return []
    return [
        TileLaunch(
            block_m=_WAVE_ROWS, block_n=width, block_k=_LINE_BYTES // itemsize, split_k=split_k,
            num_warps=_WARPS, num_stages=stages, pdl=True, tma=True,
        )
        for stages in _WAVE_STAGES
    ]  # fmt: skip


def _tiles(launch: TileLaunch, m: int, n: int) -> int:
    return math.ceil(m / launch.block_m) * math.ceil(n / launch.block_n)


def _few_rows(n: int, k: int, itemsize: int, device: Device) -> list[TileLaunch]:
    launches = []
    for block_n, lines, stages in _FEW_ROWS:
        block_k = lines * _LINE_BYTES // itemsize
        steps = math.ceil(k / block_k)
        for split_k in (1, 2, 4, 8, 16):
            if split_k > steps:
                continue
            launch = TileLaunch(
                block_m=FEW_ROWS, block_n=block_n, block_k=block_k, split_k=split_k,
                num_warps=4, num_stages=stages, pdl=device.is_hopper_or_newer,
                ahead=math.ceil(steps / split_k) if device.is_hopper_or_newer else 0,
            )  # fmt: skip
            launches.append(launch)
    return sorted(launches, key=lambda one: _distance(one, n))


def _distance(launch: TileLaunch, n: int) -> float:
    programs = math.ceil(n / launch.block_n) * launch.split_k
    return abs(math.log2(programs / _PROGRAMS))
