"""Devices, what their tests need, and what every launch of a kernel is held to on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from halfpi.kernels import specs
from halfpi.kernels.cuda_source import is_available
from halfpi.kernels.spec import Case, Device, Launch, Output, error_ratio

CUDA = torch.device("cuda")
HOPPER, ADA = Device(90, 232_448), Device(89, 101_376)
needs_compiler = pytest.mark.skipif(not is_available(), reason="the extra `hopper` is missing")
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no Hopper GPU",
)


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Without memory, for checks of shapes and dtypes."""
    return torch.zeros(shape, device="meta").to(dtype)


def checked_twice(kernel: str, case: Case, launch: Launch) -> Sequence[Output]:
    """The outputs of one of two runs, which keep the error rule and have the same bits.

    Nothing that is not valid was written.
    """
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        problem = specs()[kernel].problem(case, launch, CUDA)
        problem.run()
        assert error_ratio(problem) <= 2
        outputs.append(problem.outputs)
    for one, other in zip(*outputs, strict=True):
        bits, same = (output.written(output.tensor.view(torch.uint8)) for output in (one, other))
        assert torch.equal(bits, same)
        if one.valid is not None:
            assert one.tensor[~one.valid.to(CUDA)].float().isnan().all()
    return outputs[0]
