"""Matrices of the action expert as the streams of bytes that the blocks of `expert_steps` read.

A block consumes units of 8192 bytes: 16 bytes of K of every row of a tile, then the next 16 bytes.
That is the layout in which wgmma reads shared memory, so a unit needs nothing but a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = 128
UNIT_BYTES = 8192
WIDTH, MLP, Q_HEADS, HEAD_DIM = 1024, 4096, 8, 256
QKV_ROWS = (Q_HEADS + 2) * HEAD_DIM
_QKV_TILE = 32
_K_SPLITS = 8
_CHUNK_BYTES = 16


@dataclass(frozen=True)
class ExpertLayer:
    """Matrices of one layer, all bfloat16 or all E4M3, as the other kernels read them.

    qkv: ((q + 2)·k, d), rows of q, k, v, with q and k `paired` (qkv_rope.py). out: (d, q·k).
    gate_up: (2·mlp, d), `interleaved` (geglu.py). down: (d, mlp).
    """

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


def layer_units(itemsize: int) -> tuple[int, int, int, int]:
    """Units of a block in one layer, of qkv, out, gate_up and down."""
    rows, depths = (_QKV_TILE, 64, 64, 64), (WIDTH, Q_HEADS * HEAD_DIM // 8, WIDTH, MLP // 8)
    qkv, out, wide, down = (
        row * depth * itemsize // UNIT_BYTES for row, depth in zip(rows, depths, strict=True)
    )
    return qkv, out, wide, down


def pack(layers: Sequence[ExpertLayer], device: torch.device) -> Tensor:
    """The streams of `layers`: uint8 (blocks, depth, units, 8192) on `device`.

    Only the first blocks have a part of qkv; the others skip its units, which stay zero.
    """
    units = layer_units(layers[0].qkv.itemsize)
    shape = (BLOCKS, len(layers), sum(units), UNIT_BYTES)
    stream = torch.zeros(shape, dtype=torch.uint8, device=device)
    for index, layer in enumerate(layers):
        qkv, out, wide, down = stream[:, index].split(units, 1)
        for place, tiles in (
            (qkv[: QKV_ROWS // _QKV_TILE], _row_tiles(layer.qkv, _QKV_TILE)),
            (out, _split_tiles(layer.out)),
            (wide, _row_tiles(_gated_order(layer.gate_up), 64)),
            (down, _split_tiles(layer.down)),
        ):
            place.copy_(tiles.reshape(place.shape))
    return stream


def _chunks(weight: Tensor) -> Tensor:
    """`weight` (n, k) as bytes (n, chunks, 16)."""
    return weight.contiguous().view(torch.uint8).unflatten(1, (-1, _CHUNK_BYTES))


def _row_tiles(weight: Tensor, rows: int) -> Tensor:
    """Tiles of `rows` rows with all of K: (tiles, chunks, rows, 16)."""
    return _chunks(weight).unflatten(0, (-1, rows)).transpose(1, 2)


def _split_tiles(weight: Tensor) -> Tensor:
    """Tiles of 64 rows and an eighth of K: (tiles, splits, chunks, 64, 16)."""
    tiles = _chunks(weight).unflatten(0, (-1, 64)).unflatten(2, (_K_SPLITS, -1))
    return tiles.permute(0, 2, 3, 1, 4)


def _gated_order(gate_up: Tensor) -> Tensor:
    """Rows in the order in which one thread of wgmma gets gate and up of four neighbours.

    A thread has columns 2 i and 2 i + 1 of each group of 8: they are gate and up, and four groups
    make four neighbouring outputs, which are stored as one word.
    """
    rows = gate_up.unflatten(0, (-1, 4, 4, 2))  # (half tile, thread, group, gate or up)
    return rows.transpose(1, 2).flatten(0, 3)
