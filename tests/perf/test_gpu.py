"""Benchmarks on a GPU, small: they run through, and what they time is right."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from halfpi.config import PRESETS
from halfpi.kernels import specs
from halfpi.kernels.attention import SPEC
from halfpi.kernels.spec import Device
from halfpi.perf.ablation import bench_ablation
from halfpi.perf.bench_attention import bench_attention
from halfpi.perf.bench_kernels import bench_kernel
from halfpi.perf.bench_mlp import bench_mlp
from halfpi.perf.cases import ABLATION, Case
from halfpi.perf.synthetic import random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # what does not run here, and torch's why
]
CUDA = torch.device("cuda")


def test_the_whole_waterfall() -> None:
    case = Case("nano", cameras=2, prompt_tokens=20, horizon=16, steps=2, precision="bf16")
    records = bench_ablation(
        random_model(PRESETS["nano"], device="cuda", dtype="bfloat16"), case, repeats=3
    )
    assert [record.engine for record in records] == list(ABLATION)
    for record in records:
        assert record.error is not None
        assert record.error < (0.05 if record.case["precision"] == "bf16" else 0.3)
        assert record.numbers["kernels"] > 0
    by_name = {record.engine: record.numbers for record in records}
    assert by_name["eager"]["casts"] > by_name["fused fp8"]["casts"]
    for kind in ("casts", "layouts"):
        assert by_name["restructured expert"][kind] == 0


def test_the_mlps_variants() -> None:
    bf16, separate, hybrid = bench_mlp(CUDA, width=256, hidden=512, repeats=3)
    errors = [record.error for record in (bf16, separate, hybrid)]
    assert all(error is not None for error in errors)
    assert errors[0] is not None
    assert errors[0] < 0.01
    assert all(error is not None and error < 0.1 for error in errors[1:])


def test_attention_by_everybody_who_runs() -> None:
    records = bench_attention(CUDA, Device.of(CUDA), repeats=3)
    by_name = {record.engine: record for record in records}
    assert {"halfpi", "math", "flash", "math, packed"} <= set(by_name)
    assert list(by_name["halfpi"].ms) == [
        case.name for case in SPEC.cases if case.real and case.out_dtype == torch.bfloat16
    ]
    assert all(record.error is not None and record.error < 0.02 for record in records)


def test_a_kernel_at_its_real_shapes() -> None:
    spec = specs()["layer_norm"]
    for record in bench_kernel(spec, CUDA, Device.of(CUDA), repeats=3):
        assert all(0 < ratio <= 2 for ratio in record.numbers.values())
        assert list(record.ms) == [name.split(" ")[1] for name in record.numbers]
