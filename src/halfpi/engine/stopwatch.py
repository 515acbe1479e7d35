"""Times of stages that run one after another on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from halfpi.types import StageTimes

T = TypeVar("T")


class Stopwatch:
    """Laps on the device's clock: events in the stream, which nothing waits for until the end.

    On a CPU, where work is done when a call returns, it is the host's clock. To be started anew for
    each call: events are made once.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._laps: list[tuple[str, object]] = []

    def start(self) -> None:
        """Begin the first stage."""
        self._laps = []
        self.lap("")

    def lap(self, name: str) -> None:
        """End the stage `name`, a field of `StageTimes`."""
        self._laps.append((name, self._stamp()))

    def finished(self, result: Callable[[], T]) -> T:
        """Wait for all that was enqueued, then return `result()`."""
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()
        return result()

    def times(self) -> StageTimes:
        """The laps, once the work is finished."""
        pairs = zip(self._laps, self._laps[1:], strict=False)
        return StageTimes(**{name: _elapsed_ms(start, end) for (_, start), (name, end) in pairs})

    def _stamp(self) -> object:
        if not self._on_gpu:
            return time.perf_counter()
        if len(self._events) == len(self._laps):
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        event = self._events[len(self._laps)]
        event.record()
        return event


def _elapsed_ms(start: object, end: object) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end))
    return (float(end) - float(start)) * 1000  # type: ignore[arg-type]
