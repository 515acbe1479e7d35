"""Attention in CUDA: that it compiles without a GPU, when it is offered, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.conftest import ADA, CUDA, HOPPER, checked_twice, needs_compiler

from halfpi.kernels import attention_launches, mqa, siglip_attention, tuned
from halfpi.kernels.attention import attention
from halfpi.kernels.cuda_source import ptx, report
from halfpi.kernels.spec import FP8, Case, Device

SIGLIP = {"b": 3, "t": 256, "q": 16, "k": 72, "s": 256, "kv": 16}
FEW = {"b": 1, "t": 50, "q": 8, "k": 256, "s": 1018, "kv": 1}
MANY = {"b": 1, "t": 968, "q": 8, "k": 256, "s": 968, "kv": 1}
# Kernel → what it is compiled for, beside the output.
MACROS: list[tuple[str, dict[str, int]]] = [
    *(("siglip_attention", siglip_attention.defines(rows)) for rows in (64, 128)),
    *(
        (name, {"SHARED_BYTES": kernel.shared_bytes, "PEERS": peers})
        for name, kernel in mqa.KERNELS.items()
        for peers in kernel.peers
    ),
]


@needs_compiler
@pytest.mark.parametrize("quantises", [False, True])
@pytest.mark.parametrize(("name", "macros"), MACROS)
def test_compiles_without_spills(name: str, macros: dict[str, int], *, quantises: bool) -> None:
    assert macros["SHARED_BYTES"] <= HOPPER.shared_bytes
    defines = {**macros, "FP8": int(quantises)}
    said = report(name, defines)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    assert int(spilled) <= 8, said
    assert "serialized" not in said
    code = ptx(name, defines)
    for instruction in ("wgmma.mma_async", "cp.async.bulk.tensor", "griddepcontrol.wait"):
        assert instruction in code
    assert ("e4m3x2" in code) == quantises


def kernel(
    sizes: dict[str, int],
    device: Device = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    out_dtype: torch.dtype = torch.bfloat16,
) -> str:
    """Of the launch in use."""
    launch = tuned.best("attention", sizes, dtype, out_dtype, device)
    assert isinstance(launch, attention_launches.AttentionLaunch)
    return launch.kernel


@needs_compiler
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, FP8])
def test_hopper_uses_it_for_its_sizes(out_dtype: torch.dtype) -> None:
    for sizes, name in ((SIGLIP, "siglip"), (FEW, "mqa_decode"), (MANY, "mqa_prefill")):
        assert kernel(sizes, out_dtype=out_dtype) == name
        assert kernel(sizes, ADA, out_dtype=out_dtype) == "triton"
        assert kernel(sizes, dtype=torch.float32, out_dtype=torch.float32) == "triton"
    for other in ({**SIGLIP, "s": 64, "t": 64}, {**FEW, "k": 128}, {**MANY, "kv": 2}):
        assert kernel(other, out_dtype=out_dtype) == "triton"
    assert kernel({**SIGLIP, "b": 1}, out_dtype=out_dtype) == "siglip"
    assert kernel({**MANY, "t": 256, "s": 256}, out_dtype=out_dtype) == "mqa_prefill"


def test_triton_serves_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_launches, "is_available", lambda: False)
    assert {kernel(sizes) for sizes in (SIGLIP, FEW, MANY)} == {"triton"}


def test_three_blocks_share_keys_if_all_run_at_once() -> None:
    peers = {tiles: mqa.KERNELS["mqa_prefill"].peers_for(tiles) for tiles in (1, 35, 40, 41, 61)}
    assert peers == {1: 3, 35: 3, 40: 3, 41: 2, 61: 2}
    assert {mqa.KERNELS["mqa_decode"].peers_for(tiles) for tiles in (1, 15, 16)} == {8}


# Sequences, tokens, keys, and how many are missing in the last: one row, fewer keys than blocks,
# tiles that end anywhere, more keys than a block has at a time, counts of more than there are.
# First eight blocks share the keys, then three, then two.
RAGGED = [(2, 1, 5, 0), (2, 3, 8, 2), (2, 17, 129, 0), (2, 120, 4000, 77), (2, 100, 70, -60)]
RAGGED += [(2, 121, 3, 1), (2, 200, 70, 60), (2, 300, 2000, 11), (2, 121, 70, -60)]
RAGGED += [(2, 330, 3, 1), (2, 330, 70, 60), (2, 330, 2000, 11), (2, 968, 968, 300)]
RAGGED += [(2, 330, 70, -60)]
# Three again: without a key, with the same number and not, with a tile more than the others.
RAGGED += [(1, 560, keys, 0) for keys in (1, 2, 65, 130, 193, 196, 559, 560)]
RAGGED += [(2, 280, 560, 279), (2, 300, 200, 199)]


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize(("sequences", "tokens", "keys", "missing"), RAGGED)
def test_error_rule_and_equal_bits(
    sequences: int, tokens: int, keys: int, missing: int, out_dtype: torch.dtype
) -> None:
    sizes = {"b": sequences, "t": tokens, "q": 8, "k": 256, "s": keys, "kv": 1, "bias": 0}
    case = Case("", {**sizes, "missing": missing}, out_dtype=out_dtype)
    launch = attention_launches.attention_launches(case, Device.of(CUDA))[0]
    if launch.kernel not in mqa.KERNELS:
        pytest.skip("no Hopper GPU with cuda-core")
    (output,) = checked_twice("attention", case, launch)
    assert output.valid is not None


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("images", [1, 2, 3, 5])
def test_siglip_error_rule_and_equal_bits(images: int, out_dtype: torch.dtype) -> None:
    """With blocks of 64 and of 128 queries."""
    case = Case("", {**SIGLIP, "b": images, "bias": 1, "missing": 0}, out_dtype=out_dtype)
    launch = attention_launches.attention_launches(case, Device.of(CUDA))[0]
    if launch.kernel != "siglip":
        pytest.skip("no Hopper GPU with cuda-core")
    checked_twice("attention", case, launch)


def bfloat16(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


COUNT = torch.ones(1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("kernel", "change", "message"),
    [
        ("siglip", {"key_count": COUNT}, "key_count must be None with .*siglip"),
        ("siglip", {"query_count": COUNT}, "query_count must be None with .*siglip"),
        ("mqa_prefill", {"bias": torch.zeros(2, 72)}, "bias must be None with .*mqa_prefill"),
        (
            "mqa_decode",
            {name: bfloat16(1, 4, 2, 72).half() for name in ("query", "keys", "values")},
            "query must be bfloat16 with .*mqa_decode",
        ),
    ],
)
def test_attention_refuses(kernel: str, change: dict[str, Any], message: str) -> None:
    operands = {name: bfloat16(1, 4, 2, 72) for name in ("query", "keys", "values", "out")}
    launch = attention_launches.AttentionLaunch(kernel=kernel)
    with pytest.raises(ValueError, match=message):
        attention(**{**operands, "launch": launch, **change})


def test_there_are_four_kernels() -> None:
    with pytest.raises(ValueError, match=r"kernel must be one of .* got 'flash'"):
        attention_launches.AttentionLaunch(kernel="flash")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": bfloat16(1, 64, 2, 72)}, r"keys must be \(1, 256, 2, 72\)"),
        ({"query": bfloat16(1, 256, 2, 80)[..., :72]}, "query must be .* heads side by side"),
        ({"values": bfloat16(2, 256, 2, 72)[:1].expand(1, 256, 2, 72)[:, ::2]}, "values must be"),
        ({"values": bfloat16(1, 256, 148)[..., 4:].view(1, 256, 2, 72)}, "values must be"),
        ({"values": bfloat16(1, 256, 152)[..., 4:-4].view(1, 256, 2, 72)}, "values must be"),
    ],
)
def test_siglip_refuses(change: dict[str, Any], message: str) -> None:
    operands = {name: bfloat16(1, 256, 2, 72) for name in ("query", "keys", "values", "out")}
    with pytest.raises(ValueError, match=message):
        siglip_attention.siglip_attention(**{**operands, **change})


@pytest.mark.parametrize("name", mqa.KERNELS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": bfloat16(1, 9, 2, 256)}, r"keys must be contiguous \(1, 9, 1, 256\)"),
        ({"values": bfloat16(1, 18, 1, 256)[:, ::2]}, "values must be contiguous"),
        ({"query": bfloat16(1, 5, 8, 128)}, r"query must be contiguous \(1, 5, 8, 256\)"),
    ],
)
def test_mqa_refuses(name: str, change: dict[str, Any], message: str) -> None:
    operands = {
        "query": bfloat16(1, 5, 8, 256),
        "keys": bfloat16(1, 9, 1, 256),
        "values": bfloat16(1, 9, 1, 256),
        "out": bfloat16(1, 5, 8, 256),
    }
    with pytest.raises(ValueError, match=message):
        mqa.mqa(name, **{**operands, **change})
