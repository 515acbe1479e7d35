"""The error rule on a GPU, at π0.5's exact shapes and at ragged ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from halfpi.kernels import specs, tuned
from halfpi.kernels.spec import Case, Device, KernelSpec, Launch, Problem, error_ratio

pytest.importorskip("triton", reason="Triton is not installed")

from halfpi.kernels.ada_rms_norm import ada_rms_norm
from halfpi.kernels.geglu import geglu
from halfpi.kernels.launches import linear_launches
from halfpi.kernels.spec import row_launches
from halfpi.kernels.split_linear import split_linear

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def problems() -> list[Any]:
    return [
        pytest.param(spec, case, id=f"{name}-{case}")
        for name, spec in specs().items()
        for case in spec.cases
    ]


def finished(spec: KernelSpec[Launch], case: Case, launch: Launch) -> Problem:
    torch.manual_seed(0)
    problem = spec.problem(case, launch, CUDA)
    problem.run()
    return problem


def launches(spec: KernelSpec[Launch], case: Case) -> list[Launch]:
    """The one in use, the default, and the first of every other kind."""
    device = Device.of(CUDA)
    candidates = spec.candidates(case, device)
    least = {"tma": 1, "programs": 1, "promote": 1, "split_k": 2, "splits": 2, "peers": 2}
    firsts = {
        kind: one
        for kind, value in least.items()
        for one in reversed(candidates)
        if getattr(one, kind, 0) >= value
    }
    kernels = {one.kernel: one for one in reversed(candidates)}
    used = tuned.best(spec.name, case.sizes, case.dtype, case.out_dtype, device)
    return list(dict.fromkeys([used, candidates[0], *kernels.values(), *firsts.values()]))


@pytest.mark.parametrize(("spec", "case"), problems())
def test_error_rule(spec: KernelSpec[Launch], case: Case) -> None:
    for launch in launches(spec, case):
        problem = finished(spec, case, launch)
        assert error_ratio(problem) <= 2, launch
        for output in problem.outputs:
            if output.valid is not None:
                untouched = output.tensor[~output.valid.to(CUDA)]
                assert untouched.float().isnan().all(), launch


@pytest.mark.parametrize(("spec", "case"), problems())
def test_same_bits_every_time(spec: KernelSpec[Launch], case: Case) -> None:
    launch = launches(spec, case)[0]
    first, second = (finished(spec, case, launch).outputs for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.tensor.view(torch.uint8), other.tensor.view(torch.uint8))


class MlpChain:
    """Gated MLPs of the expert one after another, on one residual stream."""

    def __init__(self, device: Device) -> None:
        torch.manual_seed(0)
        m, d, hidden = 50, 1024, 4096
        self.launches = (
            row_launches(d, device)[0],
            linear_launches(m, 2 * hidden, d, 2, device)[0],
            linear_launches(m, d, hidden, 2, device)[0],
        )
        _, wide, down = self.launches
        self.weights = [
            (bfloat16(2 * hidden, d) * d**-0.5, bfloat16(d, hidden) * hidden**-0.5)
            for _ in range(8)
        ]
        self.residual, self.normed, self.hidden = (
            bfloat16(m, d),
            bfloat16(m, d),
            bfloat16(m, hidden),
        )
        self.modulation = torch.randn(1, 3 * d, device=CUDA)
        self.wide_partials = torch.zeros(wide.split_k, m, 2 * hidden, device=CUDA)
        self.down_partials = torch.zeros(down.split_k, m, d, device=CUDA)

    def run(self) -> None:
        row, wide, down = self.launches
        for up_weight, down_weight in self.weights:
            gate = self.modulation[:, 2 * self.normed.shape[1] :]
            ada_rms_norm(
                self.residual, self.modulation, self.normed, row,
                partials=self.down_partials, gate=gate,
            )  # fmt: skip
            geglu(self.normed, up_weight, self.hidden, wide, partials=self.wide_partials)
            split_linear(self.hidden, down_weight, self.down_partials, down)


def bfloat16(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA, dtype=torch.bfloat16)


def test_dependent_launch_changes_nothing() -> None:
    device = Device.of(CUDA)
    if not device.is_hopper_or_newer:
        pytest.skip("programmatic dependent launch needs sm_90")
    plain, dependent = MlpChain(dataclasses.replace(device, capability=89)), MlpChain(device)
    dependent.run()  # compiles, which a capture cannot
    fresh = MlpChain(device)
    for buffer in ("residual", "down_partials"):
        getattr(dependent, buffer).copy_(getattr(fresh, buffer))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dependent.run()
    for _ in range(50):
        plain.run()
        graph.replay()
    assert torch.equal(plain.residual, dependent.residual)
