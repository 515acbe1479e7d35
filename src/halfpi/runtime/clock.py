"""Clocks: what time it is, how to wait, and how a call runs beside the loop."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from types import TracebackType
from typing import Protocol, Self, TypeVar

T = TypeVar("T")

# How long a busy Python thread may keep the interpreter from the loop's; Python's own 5 ms would be
# half a tick at 100 Hz.
_SWITCH_S = 0.0005
# How much nicer the calls' thread is than the loop's; and the most that Linux knows.
_NICER, _NICEST = 5, 19
# Times of a virtual clock that differ by less are the same: sums of fractions of a second round.
_SAME_S = 1e-6


class Clock(Protocol):
    """Time in seconds from an arbitrary start, and calls that take some of it.

    As a context, it is ready for calls; leaving it ends them.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def now(self) -> float:
        """The time."""

    def sleep_until(self, time_s: float) -> None:
        """Return at `time_s`, at once if that is past."""

    def start(self, call: Callable[[], T]) -> Future[tuple[T, float]]:
        """Begin `call`, one at a time; the future holds its result and when that was there."""


class RealClock:
    """The monotonic clock; calls run one after another on a thread of their own.

    On Linux the calls' thread, and those that it starts, are nicer than the loop's.

    priority: of the loop's thread among those of Linux's real-time class SCHED_FIFO, 1 to 99; the
    calls' thread stays outside it. None leaves the loop an ordinary thread, which on a machine that
    others keep busy wakes up some milliseconds late.

    Entering it raises PermissionError if the system does not allow that priority.
    """

    def __init__(self, priority: int | None = None) -> None:
        self.priority = priority

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, "halfpi-inference")
        self._thread.submit(_give_way).result()  # starts it, before the loop has a priority
        if self.priority is not None:
            try:
                _set_priority(os.SCHED_FIFO, self.priority)
            except PermissionError:
                self._thread.shutdown()
                raise
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(min(self._switch_s, _SWITCH_S))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for the call that is running."""
        self._thread.shutdown()
        sys.setswitchinterval(self._switch_s)
        if self.priority is not None:
            _set_priority(os.SCHED_OTHER, 0)

    def now(self) -> float:
        """Seconds of `time.monotonic`."""
        return time.monotonic()

    def sleep_until(self, time_s: float) -> None:
        """Sleep, for some microseconds too long."""
        time.sleep(max(0.0, time_s - time.monotonic()))

    def start(self, call: Callable[[], T]) -> Future[tuple[T, float]]:
        """Begin `call` on the other thread."""
        return self._thread.submit(lambda: (call(), time.monotonic()))


def _give_way() -> None:
    """Make this thread, and those that it will start, nicer than the loop's, if the system can.

    Where calls keep every core busy, the loop would wait its turn among equals.
    """
    if sys.platform == "linux":  # elsewhere niceness belongs to a process
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _NICER
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness, _NICEST))


class VirtualClock:
    """Time that passes only by sleeping: simulations run as fast as they can and repeat exactly.

    latencies_s: how long each call takes, one after another. A call is executed when it begins, and
    its outcome, an exception too, is held back until its latency has passed.
    """

    def __init__(self, latencies_s: Iterable[float] = repeat(0.0)) -> None:
        self._latencies_s = iter(latencies_s)
        self._now = 0.0
        self._running: list[tuple[float, Callable[[], None]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._running = []

    def now(self) -> float:
        """Seconds slept since the clock was made."""
        return self._now

    def sleep_until(self, time_s: float) -> None:
        """Let the time pass, and calls end that take until then."""
        self._now = max(self._now, time_s)
        self._hand_over()

    def start(self, call: Callable[[], T]) -> Future[tuple[T, float]]:
        """Execute `call` now, for the next of the latencies; raises ValueError if there is none."""
        latency_s = next(self._latencies_s, None)
        if latency_s is None:
            raise ValueError("latencies_s has no latency for another call")
        future: Future[tuple[T, float]] = Future()
        ready_s = self._now + latency_s
        try:
            outcome = (call(), ready_s)
        except Exception as error:  # noqa: BLE001 (whoever asks the future gets it)
            failure = error
            self._running.append((ready_s, lambda: future.set_exception(failure)))
        else:
            self._running.append((ready_s, lambda: future.set_result(outcome)))
        self._hand_over()
        return future

    def _hand_over(self) -> None:
        for running in list(self._running):
            ready_s, finish = running
            if ready_s <= self._now + _SAME_S:
                self._running.remove(running)
                finish()


def _set_priority(scheduling: int, priority: int) -> None:
    try:
        os.sched_setscheduler(0, scheduling, os.sched_param(priority))  # 0 is this thread
    except OSError as error:
        raise PermissionError(
            f"real-time priority {priority} was refused ({error.strerror}): it must be in "
            "[1, 99] and needs the capability CAP_SYS_NICE, or a limit (ulimit -r) as high"
        ) from error
