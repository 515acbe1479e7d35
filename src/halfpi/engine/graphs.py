"""Work that is enqueued once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Replay = Callable[[], None]


def side_by_side(works: Sequence[Callable[[], None]], streams: Sequence[torch.cuda.Stream]) -> None:
    """Enqueue `works`, which do not depend on each other, and let what follows wait for them all.

    The first is on the current stream and each other on one of `streams`; without any, on a CPU,
    they run one after another.
    """
    beside = list(zip(works[1:], streams, strict=False))
    for work, stream in beside:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
    for work in (works[0], *works[1 + len(beside) :]):
        work()
    for _, stream in beside:
        torch.cuda.current_stream().wait_stream(stream)


def captured(work: Callable[[], None], device: torch.device) -> Replay:
    """`work` as a CUDA graph on `device`; on a CPU, which has none, `work` itself."""
    return Graph(work, device) if device.type == "cuda" else work


class Graph:
    """The kernels that `work` enqueues, captured.

    It runs once before it is captured: that compiles its kernels and allocates what they need. A
    graph knows addresses only, so `work`, which owns the tensors at them, is kept as well.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work = work
        work()
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            work()

    def __call__(self) -> None:
        """Replay on the current stream."""
        self._graph.replay()
