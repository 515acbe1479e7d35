"""A product with the norm behind it in CUDA: it compiles; what it refuses; the error rule."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.conftest import ADA, CUDA, HOPPER, needs_compiler, needs_hopper, zeros

from halfpi.kernels import linear_norm as file
from halfpi.kernels.cuda_source import ptx, report
from halfpi.kernels.linear_norm import defines, linear_norm, linear_norm_reference, supports
from halfpi.kernels.spec import FP8, Case, Device, Output, Problem, error_ratio, random_operands
from halfpi.kernels.spec import poisoned_output as poisoned

BF16 = torch.bfloat16
DTYPES = [(BF16, BF16), (FP8, FP8), (FP8, BF16), (BF16, FP8)]


@needs_compiler
@pytest.mark.parametrize("n", [128, 1152, 1664])
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
def test_compiles_without_spills(n: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    macros = defines(n, dtype, out_dtype, HOPPER.shared_bytes)
    assert macros["SHARED_BYTES"] <= HOPPER.shared_bytes
    said, code = report("linear_norm", macros), ptx("linear_norm", macros)
    assert re.findall(r"(\d+) bytes spill stores", said) == ["0"], said
    assert "serialized" not in said
    operands = "k32.f32.e4m3.e4m3" if dtype == FP8 else "k16.f32.bf16.bf16"
    assert f"wgmma.mma_async.sync.aligned.m64n{n // 8}{operands}" in code
    for instruction in ("multicast::cluster", "st.async", "griddepcontrol.wait"):
        assert instruction in code
    assert ("e4m3x2" in code) == (out_dtype == FP8)


def is_meant_for(
    m: int, n: int, k: int, dtype: torch.dtype, working: torch.dtype, device: Device
) -> bool:
    return supports(zeros(m, k, dtype=dtype), zeros(m, n, dtype=working), device)


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_hopper_uses_it_for_one_wave(dtype: torch.dtype) -> None:
    for m in (256, 512, 768):
        assert is_meant_for(m, 1152, 1152, dtype, BF16, HOPPER)
        assert not is_meant_for(m, 1152, 1152, dtype, BF16, ADA)


@needs_compiler
def test_a_long_product_with_most_multiprocessors() -> None:
    assert is_meant_for(768, 1152, 4352, FP8, BF16, HOPPER)


@needs_compiler
@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "working"),
    [
        (64, 1152, 1152, BF16, BF16),  # few rows
        (1024, 1152, 1152, BF16, BF16),  # a second wave
        (512, 1088, 1152, BF16, BF16),
        (512, 2048, 1152, BF16, BF16),
        (512, 1152, 1150, BF16, BF16),
        (512, 1152, 1152, BF16, torch.float32),
        (512, 1152, 1152, torch.float32, torch.float32),
        (960, 1152, 16384, FP8, BF16),  # a long sum of E4M3 is not exact enough
        (512, 1152, 4352, FP8, BF16),  # a long product, and half of the multiprocessors
        (768, 1152, 4352, BF16, BF16),
    ],
)
def test_what_it_is_not_meant_for(
    m: int, n: int, k: int, dtype: torch.dtype, working: torch.dtype
) -> None:
    assert not is_meant_for(m, n, k, dtype, working, HOPPER)


def test_two_kernels_serve_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "is_available", lambda: False)
    assert not is_meant_for(512, 1152, 1152, BF16, BF16, HOPPER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": zeros(4, 32, dtype=torch.float16)},
            "x must be contiguous bfloat16 or float8_e4m3fn",
        ),
        ({"x": zeros(4, 32, dtype=FP8)}, "weight must be contiguous float8_e4m3fn"),
        ({"residual": zeros(4, 128, dtype=torch.float32)}, "residual must be contiguous bfloat16"),
        ({"gain": zeros(128)}, r"gain must be contiguous float32 \(128,\)"),
        ({"shift": zeros(64, dtype=torch.float32)}, r"shift must be contiguous float32 \(128,\)"),
        ({"bias": zeros(128)}, r"bias must be contiguous float32 \(128,\)"),
        ({"out": zeros(4, 128, dtype=FP8)}, "out must be contiguous bfloat16"),
        ({"scale": zeros(1, dtype=torch.float32)}, "out must be contiguous float8_e4m3fn"),
        ({"alpha": zeros(2, dtype=torch.float32)}, r"alpha must be contiguous float32 \(1,\)"),
        ({"x": zeros(4, 36), "weight": zeros(128, 36)}, "weight must have rows of whole 16 bytes"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_norm(**{**operands(4, 128, 32), **change})


@pytest.mark.parametrize("n", [192, 1792])
def test_refuses_widths_that_no_block_has(n: int) -> None:
    with pytest.raises(ValueError, match=rf"a multiple of 128 of them, at most 1664, got \({n}, "):
        linear_norm(**operands(4, n, 32))


def operands(m: int, n: int, k: int) -> dict[str, Tensor]:
    """Without memory."""
    rows = dict.fromkeys(("gain", "shift"), zeros(n, dtype=torch.float32))
    return {
        "x": zeros(m, k),
        "weight": zeros(n, k),
        "residual": zeros(m, n),
        "out": zeros(m, n),
    } | rows


BEYOND = 3  # rows behind those that are


def problem(
    m: int, n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype, *, bias: bool
) -> Problem:
    """The residual and the output have rows beyond `m`, which stay as they are."""
    torch.manual_seed(0)
    x, weight, alpha = random_operands(m, n, k, dtype, CUDA)
    inputs: dict[str, Any] = {
        "x": x,
        "weight": weight,
        "residual": (2 + 3 * torch.randn(m, n, device=CUDA)).to(BF16),
        "gain": 1 + 0.3 * torch.randn(n, device=CUDA),
        "shift": torch.randn(n, device=CUDA),
        "alpha": alpha,
        "bias": torch.randn(n, device=CUDA) if bias else None,
    }
    room, out = (
        poisoned((m + BEYOND, n), Case("", {}, out_dtype=each), CUDA) for each in (BF16, out_dtype)
    )
    room.tensor[:m] = inputs["residual"]
    residual = room.tensor[:m]
    given = {**inputs, "residual": residual, "out": out.tensor[:m], "scale": out.scale}

    def run() -> None:
        linear_norm(**given)
        assert room.tensor[m:].isnan().all()
        assert out.tensor[m:].float().isnan().all()

    outputs = (Output(residual), Output(out.tensor[:m], out.scale))
    return Problem(run, linear_norm_reference, inputs, outputs, flops=2 * m * n * k, bytes=0)


SIZES = [(m, 1152, 1152) for m in (1, 63, 64, 65, 512, 768, 1100)]
# Along K one step that is not full, few, more than two rings; the narrowest and widest blocks.
SIZES += [(100, 1152, 16), (100, 1152, 176), (200, 1152, 4352), (200, 128, 272), (200, 1664, 1104)]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_error_rule_and_equal_bits(
    m: int, n: int, k: int, dtype: torch.dtype, out_dtype: torch.dtype, *, bias: bool
) -> None:
    one, other = (problem(m, n, k, dtype, out_dtype, bias=bias) for _ in range(2))
    for each in (one, other):
        each.run()
        assert error_ratio(each) <= 2
    for first, second in zip(one.outputs, other.outputs, strict=True):
        assert torch.equal(first.tensor.view(torch.uint8), second.tensor.view(torch.uint8))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_the_residual_is_exact(dtype: torch.dtype) -> None:
    """Of small whole numbers, whose sums are exact in any order: none is missing or misplaced."""
    torch.manual_seed(0)
    m, n, k = 512, 1152, 1152
    x, weight = (torch.randint(-1, 2, (rows, k), device=CUDA).float() for rows in (m, n))
    before = torch.randint(-100, 101, (m, n), device=CUDA).to(BF16)
    bias = torch.arange(n, device=CUDA) % 31 - 15.0
    residual, out = before.clone(), torch.empty_like(before)
    linear_norm(
        x.to(dtype), weight.to(dtype), residual,
        torch.ones(n, device=CUDA), torch.zeros(n, device=CUDA), out,
        alpha=torch.full((1,), 0.5, device=CUDA), bias=bias,
    )  # fmt: skip
    expected = before.double() + 0.5 * (x.double() @ weight.double().T) + bias
    assert torch.equal(residual, expected.to(BF16))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize("m", [512, 768])
def test_one_after_another(m: int, dtype: torch.dtype) -> None:
    """Each begins while the one before still runs, on whose residual and output it depends."""
    n, layers, replays = 1152, 40, 20
    weights = [random_operands(1, n, n, dtype, CUDA)[1:] for _ in range(layers)]
    gain, shift = torch.ones(n, device=CUDA), torch.zeros(n, device=CUDA)
    start = torch.randn(2, m, n, device=CUDA)
    scale = torch.full((1,), 1 / 64, device=CUDA) if dtype == FP8 else None
    rows = [torch.empty(m, n, device=CUDA, dtype=dtype) for _ in range(2)]
    residual = torch.empty(m, n, device=CUDA, dtype=BF16)

    def run(*, alone: bool) -> None:
        residual.copy_(start[0])
        rows[0].copy_(start[1] if scale is None else start[1] / scale)
        for layer, (weight, alpha) in enumerate(weights):
            linear_norm(
                rows[layer % 2], weight, residual, gain, shift, rows[(layer + 1) % 2],
                alpha=alpha, scale=scale, later=weights[(layer + 1) % layers][0],
            )  # fmt: skip
            if alone:
                torch.cuda.synchronize()

    run(alone=True)
    expected = residual.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(alone=False)
    for _ in range(replays):
        graph.replay()
        assert torch.equal(residual, expected)
