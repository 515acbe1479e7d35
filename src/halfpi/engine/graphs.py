"""Work that is enqueued once and replayed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

Replay = Callable[[], None]


def captured(work: Callable[[], None], device: torch.device) -> Replay:
    """`work` as a CUDA graph on `device`; on a CPU, which has none, `work` itself."""
    return Graph(work, device) if device.type == "cuda" else work


class Timed:
    """`work`, to be replayed as by `captured`, with the milliseconds that a replay takes.

    Its graph begins and ends with an event: an event by itself is another launch, which costs the
    host most as the first of a call. On a CPU, where work is done when a call returns, it is the
    host's clock.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._host_ms = 0.0
        self._events = (_event(), _event()) if device.type == "cuda" else None
        self._replay = captured(
            work if self._events is None else _between(self._events, work), device
        )

    def __call__(self) -> None:
        """Replay on the current stream."""
        began = time.perf_counter()
        self._replay()
        self._host_ms = (time.perf_counter() - began) * 1000

    def elapsed_ms(self) -> float:
        """Of the last replay, for which it waits."""
        if self._events is None:
            return self._host_ms
        began, ended = self._events
        ended.synchronize()
        return float(began.elapsed_time(ended))


def _between(events: tuple[torch.cuda.Event, torch.cuda.Event], work: Callable[[], None]) -> Replay:
    def stamped() -> None:
        began, ended = events
        began.record()
        work()
        ended.record()

    return stamped


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]


def stream_of(device: torch.device) -> torch.cuda.Stream:
    """One beside the current stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The same for all graphs of a GPU: on each stream, cuBLAS has a workspace of its own."""
    return stream_of(device)


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
        capture = torch.cuda.graph(
            self._graph,
            stream=_capture_stream(device),
            capture_error_mode="thread_local",  # in another thread an engine may serve
        )
        with _garbage_kept(), capture:
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
