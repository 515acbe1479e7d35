"""What a control loop has to say about a run."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from halfpi.types import ActionChunk, Keep, Observation, StageTimes

Cause = Literal["late", "failed"]
LATE_MS = 2.0


@dataclass(frozen=True)
class Call:
    """One call of the policy.

    tick: at which it began. latency_ms: until its result was there, up to a tick more if it failed.
    warm_up: the first of its loop, which compiles and allocates. expected: how many actions were
    thought to be executed meanwhile, None if unknown. consumed: how many were. error: of a failed
    call. times: of the stages, None if it failed. kept: what it took over from earlier calls:
    "camera NAME" or "prefix".
    """

    tick: int
    latency_ms: float
    warm_up: bool
    expected: int | None
    consumed: int
    error: str | None = None
    times: StageTimes | None = None
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stall:
    """Ticks in a row at which no action was due and the last one was held.

    cause: "late" while a call is running, "failed" after one has failed.
    """

    tick: int
    ticks: int
    cause: Cause


class Watcher(Protocol):
    """Is shown what a loop does while it does it, on the loop's thread: it must return at once."""

    def inferred(
        self, began_s: float, ended_s: float, observation: Observation, outcome: ActionChunk | str
    ) -> None:
        """A call on `observation` gave a chunk, or failed with an error."""

    def ticked(
        self, now_s: float, queued: int, action: NDArray[np.float32] | None, held: Cause | None
    ) -> None:
        """`action` was sent, None if there was none yet; `held` says why if it is the last again.

        queued: actions that are decided and not yet sent.
        """


def kept_names(keep: Keep) -> tuple[str, ...]:
    """What a call took over, by the names of `ReusingPolicy.reports`."""
    cameras = (f"camera {name}" for name in sorted(keep.cameras))
    return ("prefix", *cameras) if keep.prefix else tuple(cameras)


@dataclass
class LoopReport:
    """A run of a control loop; it grows while the loop runs.

    tick_errors_ms: how late each tick began. missed_ticks: never begun, because the one before took
    longer than a period. waiting_ticks: before there was a first action. ages_ms: for each executed
    action, how long ago the observation behind it was made.
    """

    rate_hz: float
    tick_errors_ms: array[float] = field(default_factory=lambda: array("d"), repr=False)
    ages_ms: array[float] = field(default_factory=lambda: array("d"), repr=False)
    missed_ticks: int = 0
    waiting_ticks: int = 0
    stalls: list[Stall] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def ticks(self) -> int:
        """Ticks begun."""
        return len(self.tick_errors_ms)

    @property
    def late_ticks(self) -> int:
        """Ticks begun more than `LATE_MS` late."""
        return sum(error > LATE_MS for error in self.tick_errors_ms)

    @property
    def held_ticks(self) -> int:
        """Ticks at which the last action was held."""
        return sum(stall.ticks for stall in self.stalls)

    @property
    def failed_calls(self) -> int:
        """Calls that raised an exception or gave a chunk that cannot be executed."""
        return sum(call.error is not None for call in self.calls)

    @property
    def latencies_ms(self) -> list[float]:
        """Of the calls that succeeded, without the warm-up."""
        return [call.latency_ms for call in self.calls if call.error is None and not call.warm_up]

    def hold(self, tick: int, cause: Cause) -> None:
        """Record that the last action is held at `tick`."""
        if self.stalls:
            last = self.stalls[-1]
            if last.cause == cause and last.tick + last.ticks == tick:
                self.stalls[-1] = Stall(last.tick, last.ticks + 1, cause)
                return
        self.stalls.append(Stall(tick, 1, cause))

    def summary(self) -> dict[str, float | int | None]:
        """The numbers of the run, for a record; a percentile of nothing is None."""
        return {
            "rate_hz": self.rate_hz,
            "ticks": self.ticks,
            "missed_ticks": self.missed_ticks,
            "late_ticks": self.late_ticks,
            "waiting_ticks": self.waiting_ticks,
            "held_ticks": self.held_ticks,
            "stalls": len(self.stalls),
            "calls": len(self.calls),
            "failed_calls": self.failed_calls,
            **_percentiles("tick_error", self.tick_errors_ms),
            **_percentiles("latency", self.latencies_ms),
            **_percentiles("action_age", self.ages_ms),
        }


class DelayEstimate:
    """How many actions will be executed while a call runs: the 90th percentile of recent calls.

    It counts actions, not time, so it is right whatever held the loop or the call up, and a
    percentile forgives a slow call where LeRobot's maximum remembers it for ever. Calls that began
    with nothing to execute, as the first does, say nothing and are left out.
    """

    PERCENTILE = 90
    RECENT = 50

    def __init__(self) -> None:
        self._recent: deque[int] = deque(maxlen=self.RECENT)

    def add(self, consumed: int) -> None:
        """Count a call."""
        self._recent.append(consumed)

    @property
    def actions(self) -> int | None:
        """The estimate; None before the first call that counts."""
        if not self._recent:
            return None
        return int(np.percentile(self._recent, self.PERCENTILE, method="higher"))


def _percentiles(name: str, values: array[float] | list[float]) -> dict[str, float | None]:
    names = [f"{name}_{rank}_ms" for rank in ("p50", "p99", "max")]
    if not len(values):
        return dict.fromkeys(names)
    found = np.percentile(values, [50, 99, 100])
    return {key: round(float(value), 3) for key, value in zip(names, found, strict=True)}
