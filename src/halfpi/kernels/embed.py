"""Prompt tokens to rows of the prefix, behind the image tokens that vision wrote there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.spec import (
    FLOATS,
    Case,
    Device,
    KernelSpec,
    Launch,
    Problem,
    check,
    poisoned_output,
    row_launches,
)
from halfpi.kernels.tile import begin, store, valid_count


def embed_reference(tokens: Tensor, table: Tensor, offset: int, rows: int) -> tuple[Tensor]:
    """Rows of `table` (v, d) at `tokens` (l,) times √d (openpi gemma.py) → (rows, d).

    They are in rows `offset`, …; those before and after are NaN.
    """
    embedded = F.embedding(tokens, table).float() * table.shape[1] ** 0.5
    after = rows - offset - tokens.shape[0]
    return (F.pad(embedded, (0, 0, offset, after), value=torch.nan),)


@triton.jit
def _embed_kernel(
    tokens, table, out, offset, count, L, S, V, D, scaling,
    BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    row = index if offset is None else index + tl.load(offset)
    valid = valid_count(count, 0, L)
    begin(PDL)
    token = tl.load(tokens + index).to(tl.int64)
    if (index < valid) & (row < S) & (token >= 0) & (token < V):
        value = tl.load(table + token * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        store(out + row * D + cols, value * scaling, 1.0, cols < D)


def embed(
    tokens: Tensor,
    table: Tensor,
    out: Tensor,
    launch: Launch,
    *,
    offset: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """Write `embed_reference` to rows of `out` (s, d).

    tokens: int32 (l,). table: bfloat16 (v, d). offset: int32 (1,), the row of token 0, 0 without
    it. count: int32 (1,), how many tokens are valid; the rows of others are not written. Nor are
    rows past the end, nor those of a token that is not in the table, which the host checks.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    (tokens_total,), (v, d), s = tokens.shape, table.shape, out.shape[0]
    check("tokens", tokens, (tokens_total,), torch.int32)
    check("table", table, (v, d), *FLOATS)
    check("out", out, (s, d), *FLOATS)
    check("offset", offset, (1,), torch.int32)
    check("count", count, (1,), torch.int32)
    _embed_kernel[(tokens_total,)](
        tokens, table, out, offset, count, tokens_total, s, v, d, d**0.5,
        BLOCK_D=triton.next_power_of_2(d), **launch.options(),
    )  # fmt: skip


def _problem(case: Case, launch: Launch, device: torch.device) -> Problem:
    tokens_total, v, d, s = (case[name] for name in ("l", "v", "d", "s"))
    tokens = torch.randint(v, (tokens_total,), dtype=torch.int32, device=device)
    table = torch.randn(v, d, device=device).to(case.dtype)
    offset, count = (
        torch.full((1,), case[name], dtype=torch.int32, device=device)
        for name in ("offset", "valid")
    )
    rows = torch.arange(s) - case["offset"]
    output = poisoned_output((s, d), case, device, (rows >= 0) & (rows < case["valid"]))
    return Problem(
        run=lambda: embed(tokens, table, output.tensor, launch, offset=offset, count=count),
        reference=embed_reference,
        inputs={"tokens": tokens, "table": table, "offset": case["offset"], "rows": s},
        outputs=(output,),
        flops=tokens_total * d,
        bytes=tokens.nbytes + tokens_total * d * (table.itemsize + output.tensor.itemsize),
    )


def _launches(case: Case, device: Device) -> tuple[Launch, ...]:
    return row_launches(case["d"], device)


def _cases() -> Iterator[Case]:
    prompt = {"l": 200, "v": 257_152, "d": 2048, "s": 968, "offset": 768, "valid": 200}
    yield Case("prompt", prompt)
    ragged = {"l": 70, "v": 90, "d": 72, "s": 90, "offset": 13, "valid": 57}
    yield Case("ragged", ragged, real=False)
    ragged = {"l": 7, "v": 9, "d": 300, "s": 7, "offset": 0, "valid": 7}
    yield Case("ragged-wide", ragged, real=False)


SPEC = KernelSpec("embed", tuple(_cases()), _problem, _launches)
