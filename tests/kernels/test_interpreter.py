"""The logic of every kernel, on a CPU: small ragged cases under Triton's interpreter.

The interpreter must be chosen before Triton is imported, so this file runs itself in a second
process. It computes in fp32 what a GPU computes in fp32; it has no bfloat16 products, and rounds to
narrow types carelessly: what is exact is checked in fp32, and narrow types only roughly.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from halfpi.kernels import specs
from halfpi.kernels.spec import FP8, Case, Device, KernelSpec, Launch, Problem

pytest.importorskip("triton", reason="Triton is not installed")

CPU = torch.device("cpu")


def small_launches(spec: KernelSpec[Launch], case: Case) -> list[Launch]:
    """Launches that cut even a small case into several tiles, steps and splits."""
    launch = spec.candidates(case, Device(80, 1 << 18))[0]
    fields = {field.name for field in dataclasses.fields(launch)}
    splits = fields & {"splits", "split_k"}
    small = {"block_m": 16, "block_n": 32, "block_k": 32, **dict.fromkeys(splits, 1)}
    variants: list[dict[str, Any]] = [{}, *({name: 3} for name in splits)]
    if "tma" in fields:
        variants.append({"tma": True})
    if "block_k" in fields:  # two parts
        variants += [{"block_n": 48}, {"block_n": 48, "tma": True}]
    return [
        dataclasses.replace(
            launch, **{name: value for name, value in (small | more).items() if name in fields}
        )
        for more in variants
    ]


def runs() -> list[object]:
    return [
        pytest.param(spec, case, launch, id=f"{name}-{case.name}-{number}")
        for name, spec in specs().items()
        for case in spec.cases
        if not case.real
        for number, launch in enumerate(small_launches(spec, case))
    ]


def finished(spec: KernelSpec[Launch], case: Case, launch: Launch) -> Problem:
    torch.manual_seed(0)
    problem = spec.problem(case, launch, CPU)
    problem.run()
    return problem


def widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


if os.environ.get("TRITON_INTERPRET") == "1":
    from halfpi.kernels.attention import attention, attention_reference
    from halfpi.kernels.attention_launches import AttentionLaunch

    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy on 0/0 and 2^-inf

    @pytest.mark.parametrize(("spec", "case", "launch"), runs())
    def test_wide(spec: KernelSpec[Launch], case: Case, launch: Launch) -> None:
        wide = dataclasses.replace(
            case, dtype=widened(case.dtype), out_dtype=widened(case.out_dtype)
        )
        problem = finished(spec, wide, launch)
        for output, truth in zip(problem.outputs, problem.truth(), strict=True):
            torch.testing.assert_close(
                output.written(output.tensor), output.written(truth), rtol=1e-4, atol=1e-4
            )
            if output.valid is not None:
                assert output.tensor[~output.valid].isnan().all()

    def test_attention_on_heads_that_share_rows() -> None:
        torch.manual_seed(0)
        rows = torch.randn(2, 40, 3, 5, 24)  # q, k and v of five heads side by side
        query, keys, values = rows.unbind(2)
        launch = AttentionLaunch(block_m=16, block_n=16, tma=True)
        out = torch.full(query.shape, torch.nan)
        attention(query, keys, values, out, launch)
        (truth,) = attention_reference(query, keys, values)
        torch.testing.assert_close(out, truth, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(("spec", "case", "launch"), runs())
    def test_narrow(spec: KernelSpec[Launch], case: Case, launch: Launch) -> None:
        half = {torch.bfloat16: torch.float16}
        narrow = dataclasses.replace(
            case,
            dtype=half.get(case.dtype, case.dtype),
            out_dtype=half.get(case.out_dtype, case.out_dtype),
        )
        problem = finished(spec, narrow, launch)
        for output, truth in zip(problem.outputs, problem.truth(), strict=True):
            stored = output.tensor.float() * (1 if output.scale is None else output.scale)
            error = output.written(stored - truth).abs()
            bound = 2**-3 if case.out_dtype == FP8 else 2**-8
            far = error > bound * (output.written(truth).abs() + 0.1)
            assert far.float().mean() < 0.1

else:

    def test_under_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
