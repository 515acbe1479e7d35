"""Work that is enqueued once and replayed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Replay = Callable[[], None]


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
        with _garbage_kept(), torch.cuda.graph(self._graph):
            work()

    def __call__(self) -> None:
        """Replay on the current stream."""
        self._graph.replay()


@contextmanager
def _garbage_kept() -> Iterator[None]:
    """A graph in a cycle that is collected while another one is captured ends the process."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
