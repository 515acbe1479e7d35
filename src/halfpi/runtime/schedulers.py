"""Chunk schedulers: when to infer again, and how a new chunk takes over from the plan.

A chunk is inferred from an observation while the plan before it is executed. When it arrives, its
first actions are in the past; `Plan.since` skips as many as were really executed meanwhile. The
two real-time chunking schedulers are in `rtc`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from halfpi.model import Guidance
from halfpi.runtime.plan import Plan


@dataclass(frozen=True)
class Request:
    """What a call is told of the plan: `given` and `guidance` of `Policy.infer`."""

    given: NDArray[np.float32] | None = None
    guidance: Guidance | None = None


class Scheduler(ABC):
    """One way to turn chunks into a stream of actions; it serves one control loop at a time."""

    horizon: int

    def start(self, horizon: int) -> None:
        """Begin a run with chunks of `horizon` actions, remembering nothing of the run before.

        Raises ValueError if the scheduler's settings do not fit that horizon.
        """
        self.horizon = horizon

    @abstractmethod
    def due(self, plan: Plan) -> bool:
        """Whether to begin a call; asked at every tick at which none is running."""

    def request(self, plan: Plan, delay: int | None) -> Request:  # noqa: ARG002 (for subclasses)
        """What to tell the call that begins with `plan` in execution.

        It runs beside the loop and changes nothing. delay: how many actions of the plan will
        probably be executed before the call returns; None if that is not known yet.
        """
        return Request()

    def merge(self, plan: Plan, chunk: Plan) -> Plan:
        """The plan after `chunk` has arrived; both are normalised for the same observation.

        `chunk` begins at the step of its observation, which is at or before the plan's.
        """
        return chunk.since(plan.step)


class SynchronousChunk(Scheduler):
    """Execute a chunk to its end, then hold still until the next one is there."""

    def due(self, plan: Plan) -> bool:
        """At the end of the plan."""
        return not len(plan)


class RecedingHorizon(SynchronousChunk):
    """Execute the first actions of each chunk, then hold still until the next one is there.

    execute: how many; the rest is dropped (openpi-client's ActionChunkBroker).
    """

    def __init__(self, execute: int) -> None:
        self.execute = execute

    def start(self, horizon: int) -> None:
        """Also checks that a chunk has as many actions as are to be executed."""
        require_in("execute", self.execute, 1, horizon)
        super().start(horizon)

    def merge(self, plan: Plan, chunk: Plan) -> Plan:
        """The first actions of `chunk`."""
        return super().merge(plan, chunk).first(self.execute)


class Asynchronous(Scheduler):
    """Infer while the plan is executed, and switch to a new chunk as soon as it is there.

    threshold: a call begins when at most that many actions are left. Nothing joins the two plans:
    where they disagree, the robot jumps.
    """

    def __init__(self, threshold: int) -> None:
        self.threshold = threshold

    def start(self, horizon: int) -> None:
        """Also checks that the threshold is below the horizon."""
        require_in("threshold", self.threshold, 0, horizon - 1)
        super().start(horizon)

    def due(self, plan: Plan) -> bool:
        """At the threshold."""
        return len(plan) <= self.threshold


class TemporalEnsemble(Scheduler):
    """Infer all the time, and execute the mean of what all chunks say about a step.

    decay: chunk i, counted from the oldest, has weight exp(−decay·i), as in ACT (Zhao et al. 2023,
    "Learning Fine-Grained Bimanual Manipulation"): above 0 the oldest counts most.
    """

    def __init__(self, decay: float = 0.01) -> None:
        if not math.isfinite(decay):
            raise ValueError(f"decay must be finite, got {decay}")
        self.decay = decay

    def start(self, horizon: int) -> None:
        """Forget the chunks of the run before."""
        super().start(horizon)
        self._chunks: list[Plan] = []

    def due(self, plan: Plan) -> bool:  # noqa: ARG002
        """Always."""
        return True

    def merge(self, plan: Plan, chunk: Plan) -> Plan:
        """The weighted mean of `chunk` and those before it, as far as each of them reaches."""
        known = [old.since(plan.step) for old in (*self._chunks, chunk)]
        self._chunks = [old for old in known if len(old)]
        newest = known[-1]
        total = np.zeros_like(newest.actions)
        weights = np.zeros((len(newest), 1), np.float32)
        for index, old in enumerate(self._chunks):
            weight = math.exp(-self.decay * index)
            total[: len(old)] += weight * old.actions
            weights[: len(old)] += weight
        return replace(newest, actions=total / weights)


class AdaptiveHorizon(Asynchronous):
    """Asynchronous, but replans early where a chunk moves fast or disagrees with the plan.

    shortest: actions executed of every chunk before the next call.
    travel: the path that may be executed before the next call: the sum of the Euclidean lengths
    from action to action, in normalised units.
    disagreement: mean distance between a chunk and the plan it replaces, per action in normalised
    units, beyond which the next call follows after `shortest` actions.
    """

    def __init__(
        self, threshold: int, shortest: int = 1, travel: float = 1.0, disagreement: float = 0.5
    ) -> None:
        super().__init__(threshold)
        for name, value in (("travel", travel), ("disagreement", disagreement)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        self.shortest = shortest
        self.travel = travel
        self.disagreement = disagreement

    def start(self, horizon: int) -> None:
        """Also checks that a chunk has as many actions as are to be executed at least."""
        require_in("shortest", self.shortest, 1, horizon)
        super().start(horizon)
        self._replan_at = 0

    def due(self, plan: Plan) -> bool:
        """At the threshold, or before it where the plan is not to be trusted any longer."""
        return super().due(plan) or plan.step >= self._replan_at

    def merge(self, plan: Plan, chunk: Plan) -> Plan:
        """Switch to `chunk`, and decide how long to trust it."""
        merged = super().merge(plan, chunk)
        execute = self.shortest
        if self._distance(plan, merged) <= self.disagreement:
            steps = np.diff(_acting(merged), axis=0)
            path = np.linalg.norm(steps, axis=1).cumsum()
            execute = max(execute, 1 + int(np.searchsorted(path, self.travel, side="right")))
        self._replan_at = plan.step + execute
        return merged

    def _distance(self, plan: Plan, merged: Plan) -> float:
        both = min(len(plan), len(merged))
        if not both:
            return 0.0
        gaps = _acting(merged)[:both] - _acting(plan)[:both]
        return float(np.linalg.norm(gaps, axis=1).mean())


def _acting(plan: Plan) -> NDArray[np.float32]:
    """The normalised actions without the dimensions that the robot does not have."""
    return plan.normalized[:, : plan.actions.shape[1]]


def require_in(name: str, value: int, low: int, high: int) -> None:
    """Raise ValueError unless `value` is in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
