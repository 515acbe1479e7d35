"""The timing protocol: the same for every benchmark, so that its numbers compare.

Variants of one comparison run interleaved in one loop, because clocks and temperatures drift by
more than what is often compared. Each run takes the next of several inputs, because with the same
input again a cache serves what memory would have to. On a GPU, events in the stream time the
device and the host never waits in between; work that is captured in graphs also leaves out what
launching costs. On the host it is the clock on the wall. Work that runs at a rate rests in between,
as a robot's policy does: a GPU that never rests lowers its clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from halfpi.perf.records import Percentiles

# Runs the work to be timed on the input of that number; the callee rotates.
Call = Callable[[int], object]

_WARM_UPS_BEFORE_CAPTURE = 3
# Clocks of a GPU, about 0.1 ms, in which the host gets ahead of a device that has rested.
_HEAD_START = 200_000
# Runs of short work in one graph.
_ROW = 64


def measure(
    calls: Mapping[str, Call],
    clock: Literal["cuda", "host"],
    *,
    repeats: int,
    warm_ups: int = 10,
    runs: int = 1,
    launched: Collection[str] = (),
    rate_hz: float | None = None,
) -> dict[str, Percentiles]:
    """Percentiles of the milliseconds that each of `calls` takes, over `repeats` runs.

    clock: "cuda" times the current stream, "host" the wall; under "host" a call must have finished
    when it returns. runs: how often a call does its work; times are of one, as the mean of a call.
    launched: names of calls whose work the host launches piece by piece. The device is idle when
    they begin, for during a call before, the host would get ahead of it and hide its own time.
    rate_hz: how often a second all of `calls` run, one after another; None is without a rest.
    Raises ValueError unless there is something to run at least once, and at a positive rate.
    """
    if not calls or repeats < 1:
        raise ValueError(f"nothing to measure: {len(calls)} calls, {repeats} repeats")
    if rate_hz is not None and not rate_hz > 0:
        raise ValueError(f"rate_hz must be positive, got {rate_hz}")
    stamp, elapsed_ms = _CLOCKS[clock]
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    start = time.perf_counter()
    for index in range(warm_ups + repeats):
        if rate_hz is not None:
            _rest_until(start + index / rate_hz, clock)
        for name, call in calls.items():
            if name in launched and clock == "cuda":
                torch.cuda.synchronize()
            began = stamp()
            call(index)
            spans[name].append((began, stamp()))
    if clock == "cuda":
        torch.cuda.synchronize()
    return {
        name: percentiles([elapsed_ms(*span) / runs for span in timed[warm_ups:]])
        for name, timed in spans.items()
    }


def _rest_until(tick: float, clock: Literal["cuda", "host"]) -> None:
    if clock == "cuda":
        torch.cuda.synchronize()
    time.sleep(max(0.0, tick - time.perf_counter()))
    if clock == "cuda":
        torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]


def measure_short(
    calls: Mapping[str, Call], device: torch.device, *, repeats: int
) -> dict[str, Percentiles]:
    """As `measure`, for work of microseconds that an engine runs among other work in a graph.

    One graph runs a call many times in a row, on its inputs in turn, so what a replay costs by
    itself is shared by all of them. On a CPU the calls run as they are.
    """
    if device.type != "cuda":
        return measure(calls, "host", repeats=repeats)
    graphs = {name: _row(call) for name, call in calls.items()}
    return measure(graphs, "cuda", repeats=repeats, runs=_ROW)


def rotation(device: torch.device, input_bytes: int) -> int:
    """How many inputs of that size take turns so that the L2 has lost each when it is due again.

    No more than a graph of `measure_short` has runs.
    """
    if device.type != "cuda":
        return 2
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_ROW, 1 + math.ceil(2 * l2_bytes / input_bytes))


def percentiles(samples_ms: list[float]) -> Percentiles:
    """p50, p90 and p99, interpolated linearly."""
    p50, p90, p99 = np.percentile(samples_ms, (50, 90, 99)).tolist()
    return Percentiles(p50, p90, p99)


def captured(call: Call, inputs: int) -> Call:
    """`call` as CUDA graphs, one for each of its `inputs`: what is left is the device's time."""
    return _Graphs(call, [_capture(partial(call, index)) for index in range(inputs)])


@dataclass(frozen=True)
class _Graphs:
    """Graphs of `call`, which keeps alive the memory that they read."""

    call: Call
    graphs: Sequence[torch.cuda.CUDAGraph]

    def __call__(self, index: int) -> None:
        self.graphs[index % len(self.graphs)].replay()


def _row(call: Call) -> Call:
    def work() -> None:
        for index in range(_ROW):
            call(index)

    return _Graphs(call, [_capture(work)])


def _capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS_BEFORE_CAPTURE):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


# Clock → how to take a stamp, and the milliseconds between two.
_CLOCKS: Mapping[str, tuple[Callable[[], Any], Callable[[Any, Any], float]]] = {
    "cuda": (_event, lambda began, ended: float(began.elapsed_time(ended))),
    "host": (time.perf_counter, lambda began, ended: (ended - began) * 1000),
}
