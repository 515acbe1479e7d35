"""How many kernels a call runs, and how many of them only move or convert what others computed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# What a kernel only does → names of such kernels in torch, cuBLAS, cuDNN and Inductor; the first
# pattern that a name matches decides. halfpi's own kernels match none.
_PATTERNS = {
    "casts": r"copy_kernel.*LoadWithCast|(float|half)\w*_copy_kernel|fused__to_copy",
    "layouts": r"CatArray|[Tt]ranspose|nchwToNhwc|nhwcToNchw|permute|im2col|roll_cuda",
    "copies": r"copy_kernel|[Mm]emcpy",
}


def count_kernels(names: Iterable[str]) -> dict[str, int]:
    """How many `names` there are ("kernels"), and how many are "casts", "layouts" or "copies"."""
    kinds = Counter(_kind(name) for name in names)
    return {"kernels": kinds.total(), **{kind: kinds[kind] for kind in _PATTERNS}}


def kernel_names(work: Callable[[], object]) -> list[str]:
    """The names of all kernels and copies that `work` runs on the GPU, those of graphs as well.

    Without a GPU there are none.
    """
    if not torch.cuda.is_available():
        return []
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return [
        event.name
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Memset")
    ]


def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in _PATTERNS.items() if re.search(pattern, name)), None)
