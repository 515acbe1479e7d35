"""Softmax attention with nothing in between written to memory.

Products are 16-bit with fp32 accumulation, the softmax is fp32 (FlashAttention-2's online form:
Dao 2023). The query heads that share a key head are packed as rows of one product, so the 8 heads
of the prefix read its keys once. How many keys and queries are valid is read from device memory.

With few query rows the keys are split among programs instead (Flash-Decoding: Dao et al. 2023).
Each leaves its own softmax average and its logarithm of the sum, and a second kernel merges them in
a fixed order. A split takes an equal share of the keys that are valid, whatever their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from halfpi.kernels.attention_launches import (
    AttentionLaunch,
    attention_launches,
    head_block,
)
from halfpi.kernels.mqa import mqa
from halfpi.kernels.siglip_attention import siglip_attention
from halfpi.kernels.spec import (
    FLOATS,
    FP8,
    Case,
    KernelSpec,
    Launch,
    Problem,
    check,
    check_output,
    moved_bytes,
    poisoned_output,
)
from halfpi.kernels.tile import begin, fetch_rows, scalar, store, valid_count

_LOG2_E = math.log2(math.e)
# Strides of this multiple or more are as good as each other: a load has at most 16 bytes.
_ALIGNED = 16


def attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_count: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor]:
    """softmax((query + bias) · keysᵀ / √k) · values over valid keys → (b, t, q, k).

    query: (b, t, q, k). keys, values: (b, s, kv, k), q a multiple of kv. key_count: (b,), valid
    keys of each sequence, the first ones. bias: (q, k).
    """
    query = query if bias is None else (query + bias).to(query.dtype)
    group = query.shape[2] // keys.shape[2]
    q, key, value = (
        part.transpose(1, 2)
        for part in (query, keys.repeat_interleave(group, 2), values.repeat_interleave(group, 2))
    )
    logits = (q @ key.mT).float() * query.shape[-1] ** -0.5
    if key_count is not None:
        valid = torch.arange(keys.shape[1], device=keys.device) < key_count[:, None, None, None]
        logits = logits.masked_fill(~valid, -torch.inf)
        value = value.masked_fill(~valid.mT, 0)
    return ((torch.softmax(logits, -1).to(query.dtype) @ value).transpose(1, 2),)


@triton.jit
def _load_heads(pointer, rows, inside, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Heads at `rows`, zero outside and past their HEAD dimensions → (rows, WIDTH)."""
    dims = tl.arange(0, WIDTH)
    mask = inside[:, None]
    if WIDTH > HEAD:
        mask = mask & (dims < HEAD)[None, :]
    return tl.load(pointer + rows[:, None] + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _step_tile(
    operand, batch, head, start, rows, valid, stride_b, stride_s, stride_h,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """(rows, WIDTH) of keys or values of a head: by descriptor from `start` on, or at `rows`."""
    if TMA:
        tile = operand.load([batch * (stride_b // stride_s) + start, head * stride_h * UNIT])
    else:
        tile = _load_heads(operand, rows * stride_s * UNIT, valid, HEAD, WIDTH)
    return tile


@triton.jit
def _store_heads(pointer, rows, inside, value, scale, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    dims = tl.arange(0, WIDTH)
    mask = inside[:, None] & (dims < HEAD)[None, :]
    store(pointer + rows[:, None] + dims[None, :], value, scale, mask)


@triton.jit
def _attention_kernel(
    query, keys, values, bias, out, log_sums, scale, key_count, query_count,
    batch_size, tokens, capacity, kv_heads, scaling,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    GROUP: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Strides come divided by UNIT, so that the compiler knows what they are multiples of.

    With TMA keys and values are descriptors of rows with all heads. What a tile has of the next
    head meets zeros of the query, or is not stored.
    """
    split = tl.program_id(1)
    batch = tl.program_id(2) // kv_heads
    head = tl.program_id(2) % kv_heads
    key_total = valid_count(key_count, batch, capacity)
    query_total, scale = valid_count(query_count, batch, tokens), scalar(scale, 1.0)

    if not TMA:
        keys += (batch * stride_kb + head * stride_kh) * UNIT
        values += (batch * stride_vb + head * stride_vh) * UNIT
    share = tl.cdiv(tl.cdiv(key_total, BLOCK_N), SPLITS) * BLOCK_N
    first = split * share
    last = tl.minimum(first + share, key_total)
    if PDL and SPLITS > 1:  # few queries: the keys are what takes time
        for start in range(first, last, BLOCK_N):
            columns = tl.minimum(start + tl.arange(0, BLOCK_N), last - 1)
            fetch_rows(keys + columns * stride_ks * UNIT, 0, HEAD, HEAD)
            fetch_rows(values + columns * stride_vs * UNIT, 0, HEAD, HEAD)
    # A row is one query head of one token.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    token, q_head = rows // GROUP, head * GROUP + rows % GROUP
    inside = token < query_total
    if bias is not None:
        summand = _load_heads(bias, q_head * HEAD, inside, HEAD, WIDTH)
    begin(PDL)

    if tl.program_id(0) * BLOCK_M < query_total * GROUP:
        q_rows = (batch * stride_qb + token * stride_qt + q_head * stride_qh) * UNIT
        q = _load_heads(query, q_rows, inside, HEAD, WIDTH)
        if bias is not None:
            q = (q.to(tl.float32) + summand).to(q.dtype)
        acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)

        for start in range(first, last, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            valid = columns < key_total
            key = _step_tile(
                keys, batch, head, start, columns, valid, stride_kb, stride_ks, stride_kh,
                HEAD, WIDTH, UNIT, TMA,
            )  # fmt: skip
            logits = tl.dot(q, key.T)
            logits = tl.where(valid[None, :], logits * scaling, -float("inf"))
            new_highest = tl.maximum(highest, tl.max(logits, 1))
            weights = tl.exp2(logits - new_highest[:, None])
            shrink = tl.exp2(highest - new_highest)
            total = total * shrink + tl.sum(weights, 1)
            highest = new_highest
            value = _step_tile(
                values, batch, head, start, columns, valid, stride_vb, stride_vs, stride_vh,
                HEAD, WIDTH, UNIT, TMA,
            )  # fmt: skip
            acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None])

        # A split without keys has total 0: an average of zeros, with a weight of 2^-inf.
        inverse = 1.0 / tl.where(total > 0, total, 1.0)
        out_rows = ((split * batch_size + batch) * tokens + token) * kv_heads * GROUP + q_head
        _store_heads(out, out_rows * HEAD, inside, acc * inverse[:, None], scale, HEAD, WIDTH)
        if SPLITS > 1:
            tl.store(log_sums + out_rows, highest + tl.log2(total), mask=inside)


@triton.jit
def _merge_kernel(
    partials, log_sums, out, scale, query_count, rows_total, tokens, q_heads,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Average the `partials` (SPLITS, rows, k) of each row, weighted by 2^`log_sums`."""
    scale = scalar(scale, 1.0)
    begin(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < rows_total
    if query_count is not None:
        batch = rows // (tokens * q_heads)
        valid = tl.load(query_count + batch, mask=inside, other=0)
        inside = inside & (rows // q_heads % tokens < valid)

    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        log_sum = tl.load(log_sums + split * rows_total + rows, mask=inside, other=0.0)
        highest = tl.maximum(highest, log_sum)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for split in tl.static_range(SPLITS):
        split_rows = split * rows_total + rows
        weight = tl.exp2(tl.load(log_sums + split_rows, mask=inside, other=0.0) - highest)
        part = _load_heads(partials, split_rows * HEAD, inside, HEAD, WIDTH)
        acc += part.to(tl.float32) * weight[:, None]
        total += weight
    _store_heads(out, rows * HEAD, inside, acc / total[:, None], scale, HEAD, WIDTH)


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    launch: AttentionLaunch,
    *,
    bias: Tensor | None = None,
    key_count: Tensor | None = None,
    query_count: Tensor | None = None,
    scale: Tensor | None = None,
    partials: Tensor | None = None,
    log_sums: Tensor | None = None,
) -> None:
    """Write `attention_reference` to `out` (b, t, q, k).

    query: (b, t, q, k). keys, values: (b, s, kv, k). All three are bfloat16, with any strides but
    contiguous heads. bias: fp32 (q, k), what a query projection without one left out; a key's bias
    changes nothing, and a value's is constant in `out`. key_count, query_count: int32 (b,), how
    many of the s keys and t tokens are valid: others are neither read nor written, except that with
    `launch.tma` and CUDA kernels invalid keys and values must be finite; a sequence with a valid
    query needs a valid key. The CUDA kernel "siglip" takes no counts, others no bias.
    scale: fp32 (1,), quantises an E4M3 `out`. partials: (splits, b, t, q, k) and log_sums: fp32
    (splits, b, t, q), workspace when keys are split; bfloat16 partials halve its traffic.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    b, t, q, k = query.shape
    s, kv = keys.shape[1:3]
    _check(query, keys, values, launch, key_count, query_count, partials, log_sums)
    check("bias", bias, (q, k), torch.float32)
    check_output(out, (b, t, q, k), scale)
    if launch.kernel != "triton":
        _in_cuda(query, keys, values, out, launch, bias, key_count, query_count, scale)
        return
    split = launch.splits > 1
    width = head_block(k)
    strides = [stride for one in (query, keys, values) for stride in one.stride()[:3]]
    unit = math.gcd(*strides, _ALIGNED)
    grid = (triton.cdiv(t * q // kv, launch.block_m), launch.splits, b * kv)
    operands = (keys, values)
    if launch.tma:
        operands = tuple(_tiles(one, [launch.block_n, width]) for one in operands)
    _attention_kernel[grid](
        query, *operands, bias, partials if split else out, log_sums if split else None,
        None if split else scale, key_count, query_count, b, t, s, kv, k**-0.5 * _LOG2_E,
        *(stride // unit for stride in strides),
        GROUP=q // kv, HEAD=k, WIDTH=width, UNIT=unit, SPLITS=launch.splits,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, TMA=launch.tma, **launch.options(),
    )  # fmt: skip
    if split:
        rows, block = b * t * q, 4
        _merge_kernel[(triton.cdiv(rows, block),)](
            partials, log_sums, out, scale, query_count, rows, t, q,
            HEAD=k, WIDTH=width, SPLITS=launch.splits, BLOCK_M=block,
            **Launch(pdl=launch.pdl).options(),
        )  # fmt: skip


def _in_cuda(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    launch: AttentionLaunch,
    bias: Tensor | None,
    key_count: Tensor | None,
    query_count: Tensor | None,
    scale: Tensor | None,
) -> None:
    """The same by the CUDA kernel that `launch` names."""
    if query.dtype != torch.bfloat16:
        raise ValueError(f"query must be bfloat16 with {launch}, got {query.dtype}")
    counts = {"key_count": key_count, "query_count": query_count}
    absent = counts if launch.kernel == "siglip" else {"bias": bias}
    for name, tensor in absent.items():
        if tensor is not None:
            raise ValueError(f"{name} must be None with {launch}")
    if launch.kernel == "siglip":
        siglip_attention(query, keys, values, out, bias=bias, scale=scale)
    else:
        mqa(launch.kernel, query, keys, values, out, scale=scale, **counts)


def _tiles(heads: Tensor, block: list[int]) -> Any:
    """A descriptor of all heads (b, s, kv, k) as rows of tokens, which are equally far apart."""
    (b, s, kv, k), (stride_b, stride_s, stride_h, _) = heads.shape, heads.stride()
    rows, width = s, (kv - 1) * stride_h + k
    if b > 1:
        rows += (b - 1) * (stride_b // stride_s)
    if width > stride_s or (b > 1 and stride_b % stride_s):
        raise ValueError(f"keys and values must be rows of heads for tma, got {heads.stride()}")
    return TensorDescriptor.from_tensor(heads.as_strided((rows, width), (stride_s, 1)), block)


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    launch: AttentionLaunch,
    key_count: Tensor | None,
    query_count: Tensor | None,
    partials: Tensor | None,
    log_sums: Tensor | None,
) -> None:
    b, t, q, k = query.shape
    shape = (b, *keys.shape[1:3], k)
    for name, tensor, expected in (
        ("query", query, query.shape),
        ("keys", keys, shape),
        ("values", values, shape),
    ):
        good = tensor.shape == expected and tensor.dtype == query.dtype and tensor.stride(-1) == 1
        if not good or tensor.dtype not in FLOATS:
            raise ValueError(
                f"{name} must be {query.dtype} {tuple(expected)} with contiguous heads, "
                f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
    if q % keys.shape[2]:
        raise ValueError(f"query must have a multiple of {keys.shape[2]} heads, got {q}")
    check("key_count", key_count, (b,), torch.int32)
    check("query_count", query_count, (b,), torch.int32)
    if launch.splits > 1:
        if partials is None or log_sums is None:
            raise ValueError(f"partials and log_sums must be given with {launch}")
        check("partials", partials, (launch.splits, b, t, q, k), *FLOATS)
        check("log_sums", log_sums, (launch.splits, b, t, q), torch.float32)


def _problem(case: Case, launch: AttentionLaunch, device: torch.device) -> Problem:
    b, t, q, k, s, kv = (case[name] for name in ("b", "t", "q", "k", "s", "kv"))
    # Each sequence has its own number of valid keys and queries, down to case["valid"] less.
    missing = torch.arange(b) * case["missing"] // max(b - 1, 1)
    key_count, query_count = ((size - missing).to(device, torch.int32) for size in (s, t))
    query, keys, values = (
        torch.randn(b, tokens, heads, k, device=device).to(case.dtype)
        for tokens, heads in ((t, q), (s, kv), (s, kv))
    )
    invalid = torch.arange(s, device=device) >= key_count[:, None]
    poison = torch.nan if launch.kernel == "triton" and not launch.tma else 1e4
    counted = launch.kernel != "siglip"
    inputs: dict[str, Any] = {
        "query": query,
        "keys": keys.masked_fill(invalid[..., None, None], poison),
        "values": values.masked_fill(invalid[..., None, None], poison),
        "key_count": key_count if counted else None,
        "bias": torch.randn(q, k, device=device) if case["bias"] else None,
    }
    valid = torch.arange(t, device=device) < query_count[:, None]
    output = poisoned_output((b, t, q, k), case, device, valid)
    workspace: dict[str, Tensor] = {}
    if launch.splits > 1:
        log_sums = torch.empty(launch.splits, b, t, q, device=device)
        partials = torch.empty(launch.splits, b, t, q, k, device=device, dtype=case.workspace_dtype)
        workspace = {"partials": partials, "log_sums": log_sums}
    return Problem(
        run=lambda: attention(
            **inputs,
            out=output.tensor,
            launch=launch,
            query_count=query_count if counted else None,
            scale=output.scale,
            **workspace,
        ),
        reference=attention_reference,
        inputs=inputs,
        outputs=(output,),
        flops=4 * b * t * q * s * k,
        bytes=moved_bytes(inputs, output.tensor),
    )


def _cases() -> Iterator[Case]:
    vision = {"b": 3, "t": 256, "q": 16, "k": 72, "s": 256, "kv": 16, "missing": 0, "bias": 1}
    prefix = {"b": 1, "t": 968, "q": 8, "k": 256, "s": 968, "kv": 1, "missing": 0, "bias": 0}
    for out_dtype in (torch.bfloat16, FP8):
        yield Case("vision", vision, out_dtype=out_dtype)
        yield Case("prefill", prefix, out_dtype=out_dtype)
        yield Case("expert", {**prefix, "t": 50, "s": 1018}, out_dtype=out_dtype)
    ragged = {"b": 2, "t": 7, "q": 4, "k": 24, "s": 45, "kv": 2, "missing": 5, "bias": 0}
    yield Case("ragged", ragged, real=False)
    ragged = {"b": 3, "t": 19, "q": 3, "k": 72, "s": 70, "kv": 1, "missing": 11, "bias": 1}
    yield Case("ragged-head", ragged, out_dtype=FP8, real=False)


SPEC = KernelSpec("attention", tuple(_cases()), _problem, attention_launches)
