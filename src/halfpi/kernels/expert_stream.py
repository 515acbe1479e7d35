"""Matrices of the action expert as the streams of bytes that the blocks of `expert_steps` read.

A block reads tiles: 16 bytes of K of every row of the tile, then the next 16 bytes. That is the
layout in which wgmma reads shared memory, so any part of a tile needs nothing but a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PEERS = 8
WIDTH, MLP, Q_HEADS, HEAD_DIM = 1024, 4096, 8, 256
BLOCKS = Q_HEADS * PEERS
QKV_ROWS = (Q_HEADS + 2) * HEAD_DIM
_CHUNK_BYTES = 16
_UNIT_BYTES = 16384  # of the ring, in cuda/block.cuh


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


def layer_bytes(itemsize: int) -> tuple[int, int, int, int]:
    """Bytes of a block's tiles in one layer, of qkv, out, gate_up and down."""
    matrices = (QKV_ROWS * WIDTH, WIDTH * Q_HEADS * HEAD_DIM, 2 * MLP * WIDTH, WIDTH * MLP)
    qkv, out, wide, down = (elements * itemsize // BLOCKS for elements in matrices)
    return qkv, out, wide, down


def pack(layers: Sequence[ExpertLayer], turns: int, device: torch.device) -> Tensor:
    """The streams of `layers`: uint8 (blocks, depth, bytes) on `device`.

    turns: in which gate/up is multiplied.

    Block 8 · head + rank has 32 rows of its head's q and 8 of k and v; of out and down 128 rows
    and its head's eighth of K; of gate_up 128 rows, those of each turn apart. Below is in which
    order.
    """
    sizes = layer_bytes(layers[0].qkv.itemsize)
    stream = torch.empty(BLOCKS, len(layers), sum(sizes), dtype=torch.uint8, device=device)
    for index, layer in enumerate(layers):
        tiles = (
            _qkv_tiles(layer.qkv),
            _own_first(_neighbours(_split_tiles(layer.out))),
            *_neighbours(layer.gate_up.unflatten(0, (BLOCKS, -1))).chunk(turns, 1),
            *map(_own_first, _by_turn(_neighbours(_split_tiles(layer.down)), turns)),
        )
        torch.cat([_chunks_first(tile) for tile in tiles], 1, out=stream[:, index])
    return stream


def _qkv_tiles(qkv: Tensor) -> Tensor:
    """(blocks, 40, k)."""
    query, key_value = qkv.split([Q_HEADS * HEAD_DIM, 2 * HEAD_DIM])
    return torch.cat([part.unflatten(0, (BLOCKS, -1)) for part in (query, key_value)], 1)


def _split_tiles(weight: Tensor) -> Tensor:
    """`weight` (1024, k) as (blocks, 128, k/8)."""
    tiles: Tensor = weight.unflatten(0, (PEERS, -1)).unflatten(2, (Q_HEADS, -1))
    return tiles.permute(2, 0, 1, 3).flatten(0, 1)


def _neighbours(tiles: Tensor) -> Tensor:
    """Rows of `tiles` (blocks, 128, k) in another order.

    Of 16 rows of a product a thread has 2c, 2c + 1, 2c + 8 and 2c + 9, where c is its place among
    four. Those become neighbours of the matrix, the rows from 4c on.
    """
    neighbours: Tensor = tiles.unflatten(1, (-1, 4, 2, 2))
    return neighbours.transpose(2, 3).flatten(1, 4)


def _by_turn(tiles: Tensor, turns: int) -> tuple[Tensor, ...]:
    """Of `tiles` (blocks, 128, k) the columns that meet the hidden activations of each turn."""
    return tuple(part.flatten(2) for part in tiles.unflatten(2, (PEERS, turns, -1)).unbind(3))


def _own_first(tiles: Tensor) -> Tensor:
    """Columns of `tiles` (blocks, 128, k) in the order in which a block multiplies them.

    They are cut into units. A block begins with the unit that its own activations meet.
    """
    _, rows, width = tiles.shape
    unit = _UNIT_BYTES // rows // tiles.itemsize
    shares = []
    for rank, share in enumerate(tiles.unflatten(0, (-1, PEERS)).unbind(1)):
        first = rank * width // PEERS // unit * unit
        shares.append(torch.cat([share[..., first:], share[..., :first]], 2))
    return torch.stack(shares, 1).flatten(0, 1)


def _chunks_first(tiles: Tensor) -> Tensor:
    """Bytes (blocks, …) of `tiles` (blocks, rows, k), ordered (chunk of k, row, 16 bytes)."""
    data: Tensor = tiles.contiguous().view(torch.uint8).unflatten(2, (-1, _CHUNK_BYTES))
    return data.transpose(1, 2).flatten(1)
