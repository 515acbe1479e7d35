"""Work that is enqueued once and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

Replay = Callable[[], None]


def captured(work: Callable[[], None], device: torch.device) -> Replay:
    """`work` as a CUDA graph on `device`; on a CPU, which has none, `work` itself.

    `work` runs once before it is captured: that compiles its kernels and allocates what they need.
    """
    if device.type != "cuda":
        return work
    work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
