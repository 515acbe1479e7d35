"""Launchers refuse what their kernel would misread, before anything is launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from halfpi.kernels.spec import FP8, Launch

pytest.importorskip("triton", reason="Triton is not installed")

from halfpi.kernels.ada_rms_norm import ada_rms_norm
from halfpi.kernels.attention import attention
from halfpi.kernels.attention_launches import AttentionLaunch
from halfpi.kernels.embed import embed
from halfpi.kernels.geglu import geglu
from halfpi.kernels.layer_norm import layer_norm
from halfpi.kernels.linear import linear
from halfpi.kernels.patchify import patchify
from halfpi.kernels.qkv_rope import qkv_rope
from halfpi.kernels.rms_norm import rms_norm
from halfpi.kernels.tile import TileLaunch


def bfloat16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


LINEAR: dict[str, Any] = {
    "x": bfloat16(4, 32),
    "weight": bfloat16(8, 32),
    "out": bfloat16(4, 8),
    "launch": TileLaunch(),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": bfloat16(32, 4).T}, "x must be contiguous"),
        ({"weight": bfloat16(8, 31)}, r"weight must be contiguous bfloat16 \(8, 32\)"),
        ({"weight": torch.zeros(8, 32)}, "weight must be .* got float32"),
        ({"out": bfloat16(4, 9)}, r"out must be .* \(4, 8\), got bfloat16 \(4, 9\)"),
        ({"out": bfloat16(4, 8).to(FP8)}, "out must be .* got float8_e4m3fn"),
        ({"scale": torch.ones(1)}, "out must be contiguous float8_e4m3fn"),
        ({"bias": torch.zeros(7)}, r"bias must be .* float32 or bfloat16 \(8,\)"),
        ({"gate": torch.zeros(3, 8)}, r"gate must be float32 \(4, 8\) or \(1, 8\)"),
        ({"gate": torch.zeros(8, 4).T}, "gate must have contiguous rows"),
        ({"residual": bfloat16(4, 8).half()}, "residual must be contiguous bfloat16 or float32"),
        ({"count": torch.ones(1)}, "count must be contiguous int32"),
        ({"launch": TileLaunch(split_k=2)}, "partials must be given"),
    ],
)
def test_linear(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**{**LINEAR, **change})


def test_split_workspace() -> None:
    launch, partials = TileLaunch(split_k=2), torch.zeros(3, 4, 8)
    with pytest.raises(ValueError, match=r"partials must be .* \(2, 4, 8\), got float32"):
        geglu(
            LINEAR["x"], LINEAR["weight"], bfloat16(4, 4), launch=launch, partials=partials
        )  # fmt: skip


def test_knobs_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="ahead needs pdl"):
        TileLaunch(ahead=1)
    with pytest.raises(ValueError, match="a library does not split K"):
        TileLaunch(kernel="library", split_k=2)
    with pytest.raises(ValueError, match="block_n must be one or the sum of two powers of two"):
        TileLaunch(block_n=208)
    with pytest.raises(ValueError, match="tiles must be of whole 64 rows and 16 columns"):
        TileLaunch(block_n=200, kernel="hopper")
    with pytest.raises(ValueError, match=r"kernel must be one of .*library.*, got 'cutlass'"):
        TileLaunch(kernel="cutlass")
    with pytest.raises(ValueError, match="tma does not go with splits"):
        AttentionLaunch(tma=True, splits=2)


def test_attention() -> None:
    query, keys = bfloat16(1, 5, 4, 16), bfloat16(1, 9, 2, 16)
    launch = AttentionLaunch()
    with pytest.raises(ValueError, match="values must be"):
        attention(query, keys, keys[:, :8], query, launch)
    with pytest.raises(ValueError, match=r"keys must be .* contiguous heads"):
        attention(query, keys.mT.contiguous().mT, keys, query, launch)
    with pytest.raises(ValueError, match="query must have a multiple of 2 heads, got 3"):
        attention(query[:, :, :3], keys, keys, query, launch)
    with pytest.raises(ValueError, match="key_count must be contiguous int32"):
        attention(query, keys, keys, query, launch, key_count=torch.tensor([3]))
    with pytest.raises(ValueError, match="partials and log_sums must be given"):
        attention(query, keys, keys, query, AttentionLaunch(splits=2))
    heads_first = bfloat16(1, 2, 9, 16).transpose(1, 2)
    with pytest.raises(ValueError, match="keys and values must be rows of heads for tma"):
        attention(query, heads_first, heads_first, query, AttentionLaunch(tma=True))


def test_qkv_rope() -> None:
    table, cache = torch.zeros(9, 8), bfloat16(9, 1, 16)
    with pytest.raises(ValueError, match=r"weight must be .* \(64, 32\)"):
        qkv_rope(
            LINEAR["x"], bfloat16(48, 32), table, table, bfloat16(4, 2, 16), cache, cache,
            TileLaunch(),
        )  # fmt: skip


def test_norms() -> None:
    x = bfloat16(4, 32)
    with pytest.raises(ValueError, match="gain must be contiguous float32"):
        rms_norm(x, x[0], x, Launch())
    with pytest.raises(ValueError, match="modulation must be float32"):
        ada_rms_norm(x, torch.zeros(2, 96), x, Launch())
    with pytest.raises(ValueError, match=r"partials must be .* \(1, 4, 32\)"):
        rms_norm(x, torch.ones(32), x, Launch(), partials=x[None, :3])
    with pytest.raises(ValueError, match="partials_bias must be contiguous float32"):
        layer_norm(x, torch.ones(32), torch.ones(32), x, Launch(), partials_bias=x[0])
    with pytest.raises(ValueError, match="partials and gate must be given together"):
        ada_rms_norm(x, torch.zeros(1, 96), x, Launch(), gate=torch.zeros(1, 32))


def test_patchify() -> None:
    images = torch.zeros(2, 8, 12, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"images must be uint8 or float32 .* multiples of 5"):
        patchify(images, 5, bfloat16(12, 48), Launch())
    with pytest.raises(ValueError, match=r"images must be .* got torch.int16 \(2, 8, 12, 3\)"):
        patchify(images.short(), 4, bfloat16(12, 48), Launch())
    with pytest.raises(ValueError, match=r"out must be .* \(12, 48\), got bfloat16 \(12, 47\)"):
        patchify(images, 4, bfloat16(12, 47), Launch())


def test_embed() -> None:
    tokens, table = torch.zeros(5, dtype=torch.int32), bfloat16(9, 32)
    with pytest.raises(ValueError, match="tokens must be contiguous int32"):
        embed(tokens.long(), table, bfloat16(7, 32), Launch())
    with pytest.raises(ValueError, match=r"out must be .* \(7, 32\), got bfloat16 \(7, 31\)"):
        embed(tokens, table, bfloat16(7, 31), Launch())
