"""Gemma's q·k·v projection with rotary positions, written straight into the key/value cache.

A token's position is the row of the cache that it is written to: the prefix fills the cache from
row 0 and actions follow it, so attention later reads one run of keys, wherever the prefix ends.

A rotation turns dimension i of a head together with i + k/2. `paired` packs the weight's rows so
that the two are neighbours and any tile holds whole pairs. As q and k are in the same order, their
products do not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.hopper_linear import Rotated, hopper_linear
from halfpi.kernels.launches import hopper_launches, linear_launches
from halfpi.kernels.spec import (
    FLOATS,
    FP8,
    Case,
    Device,
    KernelSpec,
    Problem,
    check,
    moved_bytes,
    poisoned_output,
    random_operands,
)
from halfpi.kernels.split_linear import launch_linear
from halfpi.kernels.tile import (
    TileLaunch,
    begin_product,
    linear_tile,
    pair_cols,
    part_cols,
    part_count,
    scalar,
    split_pairs,
    tile_count,
    tile_origin,
    valid_count,
)


def qkv_rope_reference(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_heads: int,
    kv_heads: int,
    offset: int,
    alpha: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Queries (m, q, k) of x (m, d), keys and values (s, kv, k) in rows `offset`, … of a cache.

    Without heads there are no queries. weight: ((q + 2·kv)·k, d), rows of q, k, v, with q and k
    `paired`. cos, sin: (s, k/2), of every position. alpha: (1,). Rows of the cache before and after
    are NaN.
    """
    product = F.linear(x, weight)
    product = product if alpha is None else product * alpha
    heads = product.unflatten(1, (q_heads + 2 * kv_heads, -1))
    turned, value = heads.split([q_heads + kv_heads, kv_heads], 1)
    even, odd = turned.float().unflatten(2, (-1, 2)).unbind(-1)
    c, s = (table[offset : offset + x.shape[0], None] for table in (cos, sin))
    turned = torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(2).to(product.dtype)
    query, key = turned.split([q_heads, kv_heads], 1)
    around = (0, 0, 0, 0, offset, cos.shape[0] - offset - x.shape[0])
    cached = [F.pad(one, around, value=torch.nan) for one in (key, value)]
    return (query, *cached) if q_heads else tuple(cached)


@triton.jit
def _qkv_rope_kernel(
    x, weight, tail, query, keys, values, cos, sin, alpha, offset, count,
    Q_WIDTH: tl.constexpr, KV_WIDTH: tl.constexpr, HEAD: tl.constexpr, capacity,
    M, N, K, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, TMA: tl.constexpr, PROMOTE: tl.constexpr, PERSISTENT: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0)
    col = tile_origin(first, M, BLOCK_M, BLOCK_N)[1]
    valid, alpha, offset = valid_count(count, 0, M), scalar(alpha, 1.0), scalar(offset, 0)
    begin_product(weight, col, 0, N, K, BLOCK_N, BLOCK_K, AHEAD, PDL)
    tiles = tile_count(valid, N, BLOCK_M, BLOCK_N)
    for tile in tl.range(first, tiles, tl.num_programs(0), flatten=PERSISTENT):
        row, col = tile_origin(tile, valid, BLOCK_M, BLOCK_N)
        product = linear_tile(
            x, (weight, tail), alpha, row, col, M, N, K, SPLIT_K,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, TMA, PROMOTE,
        )  # fmt: skip
        rows = row + tl.arange(0, BLOCK_M)[:, None]
        places = rows if offset is None else rows + offset
        inside = (rows < valid) & (places < capacity)

        for part in tl.static_range(part_count(BLOCK_N)):
            # Values do not turn: their angle is zero.
            pairs = pair_cols(col, BLOCK_N, part)[None, :]
            angles = places * (HEAD // 2) + pairs % (HEAD // 2)
            turns = inside & (pairs < (Q_WIDTH + KV_WIDTH) // 2)
            c = tl.load(cos + angles, mask=turns, other=1.0)
            s = tl.load(sin + angles, mask=turns, other=0.0)
            even, odd = split_pairs(product[part])
            turned = tl.join(even * c - odd * s, odd * c + even * s)
            out = tl.reshape(turned, product[part].shape).to(keys.dtype.element_ty)

            cols = part_cols(col, BLOCK_N, part)[None, :]
            if Q_WIDTH > 0:
                tl.store(query + rows * Q_WIDTH + cols, out, mask=inside & (cols < Q_WIDTH))
            cols -= Q_WIDTH
            is_key = (cols >= 0) & (cols < KV_WIDTH)
            tl.store(keys + places * KV_WIDTH + cols, out, mask=inside & is_key)
            cols -= KV_WIDTH
            is_value = (cols >= 0) & (cols < KV_WIDTH)
            tl.store(values + places * KV_WIDTH + cols, out, mask=inside & is_value)


def qkv_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    query: Tensor | None,
    keys: Tensor,
    values: Tensor,
    launch: TileLaunch,
    *,
    alpha: Tensor | None = None,
    offset: Tensor | None = None,
    count: Tensor | None = None,
    partials: Tensor | None = None,
) -> None:
    """Write `qkv_rope_reference` to `query` (m, q, k), `keys` and `values` (s, kv, k).

    x: (m, d), weight: ((q + 2·kv)·k, d), both bfloat16 or both E4M3. cos, sin: fp32 (s, k/2).
    query, keys, values: bfloat16; no query for a layer of which only keys and values are read, and
    then none in the weight. alpha: fp32 (1,), the product of the scales of both operands. offset:
    int32 (1,), where in the cache row 0 of x goes, 0 without it. count: int32 (1,), the rows that
    are valid; others are neither computed nor written. partials: see `launch_linear`.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    s, kv, k = keys.shape
    q = 0 if query is None else query.shape[1]
    check("query", query, (x.shape[0], q, k), keys.dtype)
    check("keys", keys, (s, kv, k), *FLOATS)
    check("values", values, (s, kv, k), keys.dtype)
    check("weight", weight, ((q + 2 * kv) * k, x.shape[1]), x.dtype)
    check("cos", cos, (s, k // 2), torch.float32)
    check("sin", sin, (s, k // 2), torch.float32)
    check("offset", offset, (1,), torch.int32)
    check("alpha", alpha, (1,), torch.float32)
    check("count", count, (1,), torch.int32)
    if launch.kernel == "hopper":
        hopper_linear(
            x, weight, query, launch,
            alpha=alpha, rotated=Rotated(keys, values, cos, sin, offset), count=count,
        )  # fmt: skip
        return
    launch_linear(
        _qkv_rope_kernel, x, weight, partials, launch,
        query, keys, values, cos, sin, alpha, offset, count, q * k, kv * k, k, s,
    )  # fmt: skip


def paired(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a q or k projection (heads·k, d) with i and i + k/2 of each head made neighbours."""
    heads = weight.unflatten(0, (-1, 2, head_dim // 2))
    return torch.flatten(heads.transpose(1, 2), 0, 2)


def _problem(case: Case, launch: TileLaunch, device: torch.device) -> Problem:
    m, d, q, kv, k, s = (case[name] for name in ("m", "d", "q", "kv", "k", "s"))
    n = (q + 2 * kv) * k
    x, weight, alpha = random_operands(m, n, d, case.dtype, device)
    angles = torch.outer(
        torch.arange(s, device=device), 10_000.0 ** -(torch.arange(k // 2, device=device) * 2 / k)
    )
    tensors: dict[str, Any] = {
        "x": x,
        "weight": weight,
        "cos": angles.cos(),
        "sin": angles.sin(),
        "alpha": alpha,
    }
    valid = torch.arange(m) < case["valid"]
    rows = torch.arange(s) - case["offset"]
    written = (rows >= 0) & (rows < case["valid"])
    query = poisoned_output((m, q, k), case, device, valid)
    keys, values = (poisoned_output((s, kv, k), case, device, written) for _ in range(2))
    offset, count = (
        torch.full((1,), case[name], dtype=torch.int32, device=device)
        for name in ("offset", "valid")
    )
    partials = None
    if launch.needs_partials:
        partials = torch.empty(launch.split_k, m, n, dtype=case.workspace_dtype, device=device)
    return Problem(
        run=lambda: qkv_rope(
            **tensors,
            query=query.tensor if q else None,
            keys=keys.tensor,
            values=values.tensor,
            launch=launch,
            offset=offset,
            count=count,
            partials=partials,
        ),
        reference=qkv_rope_reference,
        inputs={**tensors, "q_heads": q, "kv_heads": kv, "offset": case["offset"]},
        outputs=(query, keys, values) if q else (keys, values),
        flops=2 * m * n * d,
        bytes=moved_bytes({"x": x, "weight": weight}) + m * n * case.out_dtype.itemsize,
    )


def _launches(case: Case, device: Device) -> tuple[TileLaunch, ...]:
    m, n, d = case["m"], (case["q"] + 2 * case["kv"]) * case["k"], case["d"]
    itemsizes = (case.dtype.itemsize, case.out_dtype.itemsize)
    launches = linear_launches(m, n, d, itemsizes[0], device)
    whole_chunks = case["k"] % 8 == 0 and itemsizes[1] == 2
    return launches + (hopper_launches(m, n, d, itemsizes, device) if whole_chunks else ())


def _cases() -> Iterator[Case]:
    heads = {"q": 8, "kv": 1, "k": 256, "s": 1018}
    prefix = {**heads, "m": 968, "d": 2048, "offset": 0, "valid": 968}
    yield Case("prefill", prefix)
    yield Case("prefill-last", {**prefix, "q": 0})
    for dtype in (torch.bfloat16, FP8):
        yield Case("expert", {**heads, "m": 50, "d": 1024, "offset": 968, "valid": 50}, dtype)
    ragged = {"q": 4, "kv": 2, "k": 10, "s": 70, "m": 50, "d": 80, "offset": 13, "valid": 37}
    yield Case("ragged", ragged, real=False)
    many = {"q": 3, "kv": 1, "k": 24, "s": 150, "m": 150, "d": 144, "offset": 0, "valid": 149}
    yield Case("ragged-many", many, FP8, real=False)


SPEC = KernelSpec("qkv_rope", tuple(_cases()), _problem, _launches)
