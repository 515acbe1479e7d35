"""Every kernel compiled for every supported GPU, without one, and its PTX looked through.

Launchers run on tensors without memory and a driver without a device: what they would launch is
compiled with the very specialisations of the real shapes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from halfpi.kernels import specs
from halfpi.kernels.spec import FP8, Case, Device, KernelSpec, Launch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED_BYTES = {89: 101_376, 90: 232_448, 110: 232_448, 120: 101_376}
DEVICES = [Device(capability, shared) for capability, shared in SHARED_BYTES.items()]
MATRIX_INSTRUCTION = {
    89: r"mma\.sync\.\S+",
    90: r"wgmma\.mma_async\.\S+",
    110: r"tcgen05\.mma\.\S+",
    120: r"mma\.sync\.\S+",
}
FP8_OPERANDS = re.compile("e4m3|f8f6f4")


class AbsentGpu:
    """As much of a Triton driver as compilation asks for; devices are numbered by capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compiled(function: Callable[[], None], device: Device) -> list[Any]:
    """The kernels that `function` would launch on `device`, compiled."""
    kernels = []
    jit_run = JITFunction.run

    def run(kernel: Any, *args: Any, warmup: bool, **options: Any) -> None:
        kernels.append(jit_run(kernel, *args, warmup=True, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(driver, "_active", AbsentGpu(device.capability))
        function()
    return kernels


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


def check_kernel(kernel: Any, case: Case, device: Device, launch: Launch) -> None:
    """The PTX multiplies on the GPU's own matrix unit, in the precision of the case, and waits."""
    ptx = kernel.asm["ptx"]
    assert kernel.metadata.shared <= device.shared_bytes
    assert ("griddepcontrol.wait" in ptx) == launch.pdl
    if getattr(launch, "ahead", 0) and "tt.dot" in kernel.asm["ttir"]:
        assert ptx.index("prefetch.global.L2") < ptx.index("griddepcontrol.wait")
    if "tt.dot" in kernel.asm["ttir"] and case.dtype != torch.float32:
        instructions = re.findall(MATRIX_INSTRUCTION[device.capability], ptx)
        assert instructions
        if case.dtype == FP8:
            assert all(FP8_OPERANDS.search(one) for one in instructions)


def has_descriptors(launch: Launch) -> bool:
    return getattr(launch, "tma", False)


def shares_tiles(launch: Launch) -> bool:
    return getattr(launch, "programs", 0) > 0


def has_tail(launch: Launch) -> bool:
    return len(getattr(launch, "widths", [])) > 1


def launches(spec: KernelSpec[Launch], case: Case, device: Device) -> Iterator[Launch]:
    """Triton's default, and the first with descriptors, shared tiles and tiles of two parts."""
    candidates = [
        one for one in spec.candidates(case, device) if one.kernel in ("triton", "library")
    ]
    yield candidates[0]
    for kind in (has_descriptors, shares_tiles, has_tail):
        yield from itertools.islice(filter(kind, candidates[1:]), 1)


def compilations() -> list[Any]:
    return [
        pytest.param(
            spec, case, launch, device, id=f"{name}-{case}-{number}-sm_{device.capability}"
        )
        for name, spec in specs().items()
        for case in spec.cases
        if case.real
        for device in DEVICES
        for number, launch in enumerate(launches(spec, case, device))
    ]


@pytest.mark.parametrize(("spec", "case", "launch", "device"), compilations())
def test_compiles(spec: KernelSpec[Launch], case: Case, launch: Launch, device: Device) -> None:
    kernels = compiled(spec.problem(case, launch, torch.device("meta")).run, device)
    for kernel in kernels:
        check_kernel(kernel, case, device, launch)
    multiplies = any("tt.dot" in kernel.asm["ttir"] for kernel in kernels)
    assert multiplies == (type(launch) is not Launch)  # a plain Launch has no tile of a product
