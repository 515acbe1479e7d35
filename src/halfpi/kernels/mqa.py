"""Attention whose heads share one head of keys (multi-query attention), as CUDA kernels for Hopper.

All heads of a token are rows of one product. The blocks of a cluster have the same rows and share
out the keys; they merge their averages from shared memory to shared memory, where the Triton kernel
needs a second one. With few rows eight blocks bring the keys sooner. With many rows two blocks
halve what each multiprocessor reads of them, which is what limits it, and three blocks use
multiprocessors that two would leave idle. The CUDA source lies in `cuda/` and is compiled at run
time (extra `hopper`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from halfpi.kernels.cuda_launch import load_once, tensor_map
from halfpi.kernels.spec import CLUSTERS, FP8, Case

HEAD_DIM = 256
_LINE = 64  # dimensions of a copy


@dataclass(frozen=True)
class _Kernel:
    """rows: of a cluster. tile: keys of a copy. peers: blocks of a cluster, of `threads`.

    The first of several numbers of peers is meant for clusters that all run at a time.
    """

    rows: int
    tile: int
    peers: tuple[int, ...]
    threads: int
    shared_bytes: int

    def peers_for(self, clusters: int) -> int:
        """How many blocks each of so many clusters has."""
        return self.peers[0] if clusters <= CLUSTERS[self.peers[0]] else self.peers[-1]


KERNELS = {
    "mqa_decode": _Kernel(rows=64, tile=128, peers=(8,), threads=256, shared_bytes=187_392),
    "mqa_prefill": _Kernel(rows=128, tile=64, peers=(3, 2), threads=384, shared_bytes=230_528),
}


def kernel_for(case: Case) -> str | None:
    """The kernel that is meant for the sizes of a `case` of attention, if one can do them."""
    if (case["k"], case["kv"]) != (HEAD_DIM, 1):
        return None
    few = case["t"] * case["q"] <= CLUSTERS[8] * KERNELS["mqa_decode"].rows
    return "mqa_decode" if few else "mqa_prefill"


def mqa(
    name: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    *,
    key_count: Tensor | None = None,
    query_count: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """As `attention`, of (b, t, q, 256) and (b, s, 1, 256) by kernel `name`.

    Invalid keys and values must be finite. The caller has checked what `attention` checks. Raises
    ValueError naming the tensor with other sizes, or that is not contiguous.
    """
    b, t, q, _ = query.shape
    for operand, tensor, heads in (("query", query, q), ("keys", keys, 1), ("values", values, 1)):
        expected = (b, tensor.shape[1], heads, HEAD_DIM)
        if tensor.shape != expected or not tensor.is_contiguous():
            raise ValueError(
                f"{operand} must be contiguous {expected}, "
                f"got {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    sizes = KERNELS[name]
    maps = (
        tensor_map(tensor.view(-1, HEAD_DIM), (rows, _LINE))
        for tensor, rows in ((query, sizes.rows), (keys, sizes.tile), (values, sizes.tile))
    )
    tiles = math.ceil(t * q / sizes.rows)
    peers = sizes.peers_for(tiles * b)
    kernel = load_once(
        name, query.device, sizes.threads,
        PEERS=peers, FP8=int(out.dtype == FP8), SHARED_BYTES=sizes.shared_bytes,
    )  # fmt: skip
    kernel(
        (peers, tiles, b), *maps, out, scale, key_count, query_count, keys.shape[1], t * q, q,
    )  # fmt: skip
