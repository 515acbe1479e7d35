"""What every launch of a kernel is held to on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from halfpi.kernels import specs
from halfpi.kernels.spec import Case, Launch, Output, error_ratio

CUDA = torch.device("cuda")


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
