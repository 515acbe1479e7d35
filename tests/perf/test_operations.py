"""Benchmarks of single operations, with small shapes and stand-ins for kernels."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from halfpi.kernels.attention import SPEC
from halfpi.kernels.spec import FP8, Case, Device, KernelSpec, Launch, Output, Problem
from halfpi.perf import bench_kernels, bench_mlp
from halfpi.perf.bench_attention import bench_attention
from halfpi.perf.bench_kernels import bench_kernel
from halfpi.perf.bench_mlp import VARIANTS, MlpVariants
from halfpi.perf.devices import find_device
from halfpi.perf.kernel_count import count_kernels

CPU = torch.device("cpu")
HOPPER = Device(capability=90, shared_bytes=232_448, multiprocessors=132)


def doubling(case: Case, launch: Launch, device: torch.device) -> Problem:
    x = torch.randn(case["m"], device=device)
    out = torch.full_like(x, torch.nan).to(case.out_dtype)

    def run() -> None:
        assert launch.num_warps == 8
        out.copy_(2 * x)

    return Problem(run, lambda x: (2 * x,), {"x": x}, (Output(out),), flops=10**9, bytes=10**6)


def spec_of(*cases: Case) -> KernelSpec[Launch]:
    return KernelSpec("double", cases, doubling, lambda *_: (Launch(8), Launch(1)))


def test_kernels_have_a_record_for_each_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "known_device", lambda _: find_device("H200"))
    spec = spec_of(
        Case("one", {"m": 9}),
        Case("two", {"m": 9}, dtype=FP8),
        Case("three", {"m": 5}),
        Case("ragged", {"m": 3}, real=False),
    )
    monkeypatch.setattr(bench_kernels, "best", lambda *_: Launch(8))
    bf16, fp8 = bench_kernel(spec, CPU, HOPPER, repeats=2)
    assert (bf16.case["precision"], fp8.case["precision"]) == ("bf16", "fp8")
    assert list(bf16.ms) == ["double/one", "double/three"]
    assert list(fp8.ms) == ["double/two"]
    assert bf16.numbers == {"error_ratio double/one": 1.0, "error_ratio double/three": 1.0}
    assert bf16.floor_ms is not None
    assert fp8.floor_ms is not None
    assert bf16.floor_ms["double/one"] == pytest.approx(1e9 / 677e12 * 1e3)
    assert fp8.floor_ms["double/two"] == pytest.approx(1e9 / 1300e12 * 1e3)


def test_cases_of_one_name_are_told_apart_by_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "best", lambda *_: Launch(8))
    spec = spec_of(Case("one", {"m": 9}), Case("one", {"m": 9}, torch.float32, torch.float32))
    (record,) = bench_kernel(spec, CPU, HOPPER, repeats=1)
    assert list(record.ms) == ["double/one-bfloat16-bfloat16", "double/one-float32-float32"]


def test_all_variants_of_the_mlp_compute_the_same() -> None:
    torch.manual_seed(0)
    mlp = MlpVariants(20, 64, 128, CPU)
    errors = {name: mlp.error(name) for name in VARIANTS}
    assert 0 < errors["bf16"] < 0.01
    assert 0.01 < errors["fp8, separate"] < 0.08
    assert 0.01 < errors["fp8, hybrid"] < 0.08


def test_the_mlps_floors_are_of_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_mlp, "known_device", lambda _: find_device("H200"))
    records = bench_mlp.bench_mlp(CPU, width=64, hidden=96, repeats=1)
    assert [record.engine for record in records] == list(VARIANTS)
    floors: list[Any] = [record.floor_ms for record in records]
    assert floors[1] == floors[2]
    assert floors[0]["total"] > floors[1]["total"]
    assert all(record.case["prompt_tokens"] == 202 for record in records)


def test_attention_is_compared_with_what_runs_here() -> None:
    shapes = {"b": 1, "t": 6, "q": 4, "k": 16, "s": 12, "kv": 1, "missing": 0}
    cases = (
        Case("prefill", shapes),
        Case("vision", {**shapes, "q": 2, "kv": 2, "t": 12}),
        Case("quantised", shapes, out_dtype=FP8),
        Case("ragged", shapes, real=False),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = {
            record.engine: record for record in bench_attention(CPU, HOPPER, cases, repeats=2)
        }
    assert any(str(one.message).startswith("halfpi does not run prefill: ") for one in caught)
    assert "halfpi" not in records
    assert list(records["math"].ms) == ["prefill", "vision"]
    assert list(records["math, packed"].ms) == ["prefill"]
    for record in records.values():
        assert record.error is not None
        assert record.error < 0.02


def test_attentions_real_shapes_are_the_three() -> None:
    names = [case.name for case in SPEC.cases if case.real and case.out_dtype != FP8]
    assert names == ["vision", "prefill", "expert"]


def test_kernels_that_only_move_data_are_counted() -> None:
    copy = "at::native::{}<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>"
    names = [
        "_attention_kernel",
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT",
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
        copy.format("unrolled_elementwise_kernel") + "LoadWithCast<1>",
        "at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)",
        "triton_poi_fused__to_copy_clamp_mul_reciprocal_0",
        copy.format("elementwise_kernel"),
        "Memcpy DtoD (Device -> Device)",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<bfloat16>",
    ]
    assert count_kernels(names) == {"kernels": 9, "casts": 3, "layouts": 1, "copies": 2}
    assert count_kernels([]) == {"kernels": 0, "casts": 0, "layouts": 0, "copies": 0}
