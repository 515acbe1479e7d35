"""Times of stages that run one after another on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from halfpi.engine.graphs import Replay, captured
from halfpi.types import StageTimes

T = TypeVar("T")
# Of one stage after another: a beginning and three ends.
_STAMPS = 4


class Stopwatch:
    """Laps on the device's clock: events in the stream, which nothing waits for until the end.

    On a CPU, where work is done when a call returns, it is the host's clock. To be started anew for
    each call, of up to three laps: events are made once. A graph records each: as the first thing
    on a stream that has nothing to do, that costs the host a third of recording it directly.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        count = _STAMPS if self._on_gpu else 0
        self._events = [_event() for _ in range(count)]
        self._records: list[Replay] = [captured(event.record, device) for event in self._events]
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
        index = len(self._laps)
        self._records[index]()
        return self._events[index]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]


def _elapsed_ms(start: object, end: object) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end))
    return (float(end) - float(start)) * 1000  # type: ignore[arg-type]
