"""The control loop: an action every tick, whatever inference is doing.

The loop never waits for a call. It sleeps until the next tick, whose time is counted from the
beginning of the run so that errors do not add up; takes the chunk of a call that has ended; begins
a call if the scheduler says so; and sends the next action of its plan. If there is none, because a
call is late or has failed, it holds the last action and reports it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from halfpi.model import Guidance
from halfpi.runtime.clock import Clock, RealClock
from halfpi.runtime.plan import NO_PLAN, Plan
from halfpi.runtime.report import Call, Cause, DelayEstimate, LoopReport, Watcher, kept_names
from halfpi.runtime.schedulers import Scheduler
from halfpi.types import ActionChunk, Observation

logger = logging.getLogger(__name__)

Action = NDArray[np.float32]


class Robot(Protocol):
    """What a loop needs of a robot; all of it is called on the loop's thread."""

    def reset(self) -> None:
        """Get ready for a run."""

    def observe(self) -> Observation:
        """The newest images and state, without waiting for the next: the loop waits meanwhile."""

    def act(self, action: Action) -> bool | None:
        """Begin to execute `action` float32 (robot_action_dim,) and return; True ends the run."""


class ChunkPolicy(Protocol):
    """What a loop needs of a policy: `halfpi.Policy` has it, and so has a `ReusingPolicy`."""

    @property
    def horizon(self) -> int:
        """Actions in a chunk."""

    def reset(self) -> None:
        """Forget the calls so far."""

    def infer(
        self,
        observation: Observation,
        *,
        given: NDArray[np.float32] | None = None,
        guidance: Guidance | None = None,
    ) -> ActionChunk:
        """A chunk for `observation`."""

    def rebase(
        self, normalized: NDArray[np.float32], was: Observation, now: Observation
    ) -> NDArray[np.float32]:
        """Actions planned at `was` as they are normalised at `now`."""


def repeat_last(action: Action) -> Action:
    """Hold by sending the last action again: right where actions are targets."""
    return action


class ControlLoop:
    """Runs `policy` on `robot` at `rate_hz`, as `scheduler` says.

    clock: real by default. hold: what to send, made from the last action, when no action is due; a
    robot whose actions are displacements or velocities needs one that stops it. watcher: is shown
    every call and every tick.

    Inference runs on one other thread. What the loop has learnt of its delay stays from run to run.
    Raises ValueError if `rate_hz` is not positive.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        robot: Robot,
        rate_hz: float,
        scheduler: Scheduler,
        *,
        clock: Clock | None = None,
        hold: Callable[[Action], Action] = repeat_last,
        watcher: Watcher | None = None,
    ) -> None:
        if not rate_hz > 0:
            raise ValueError(f"rate_hz must be positive, got {rate_hz}")
        self.policy = policy
        self.robot = robot
        self.rate_hz = rate_hz
        self.scheduler = scheduler
        self.clock: Clock = RealClock() if clock is None else clock
        self.hold = hold
        self.watcher = watcher
        self.report = LoopReport(rate_hz)
        self._delay = DelayEstimate()
        self._warm = False

    def run(self, max_ticks: int | None = None) -> LoopReport:
        """Run until the robot ends it, at most for `max_ticks` ticks; then wait for a running call.

        A policy that fails does not end the run. Exceptions of the robot or the scheduler do.
        """
        self.policy.reset()
        self.robot.reset()
        self.scheduler.start(self.policy.horizon)
        self.report = LoopReport(self.rate_hz)
        self._plan = NO_PLAN
        self._flight: _Flight | None = None
        self._origin: _Flight | None = None
        self._last_action: Action | None = None
        with self.clock:
            for tick in self._ticks(max_ticks):
                self._collect()
                if self._flight is None and self.scheduler.due(self._plan):
                    self._begin(tick)
                    self._collect()  # a virtual call may take no time
                if self._act(tick):
                    break
        return self.report

    def _ticks(self, max_ticks: int | None) -> Iterator[int]:
        """Numbers of ticks, each at its time; one whose time passes during another is left out."""
        start = self.clock.now()
        tick = 0
        while max_ticks is None or tick < max_ticks:
            due_s = start + tick / self.rate_hz
            self.clock.sleep_until(due_s)
            self.report.tick_errors_ms.append((self.clock.now() - due_s) * 1000)
            yield tick
            # 1e-6 of a tick is rounding.
            newest = int((self.clock.now() - start) * self.rate_hz + 1e-6)
            following = max(tick + 1, newest)
            self.report.missed_ticks += following - tick - 1
            tick = following

    def _begin(self, tick: int) -> None:
        observation, now = self.robot.observe(), self.clock.now()
        plan, delay = self._plan, self._delay.actions
        future = self.clock.start(lambda: self._infer(observation, plan, delay))
        self._flight = _Flight(tick, now, observation, plan, delay, future)

    def _infer(self, observation: Observation, plan: Plan, delay: int | None) -> ActionChunk:
        """The call; it runs beside the loop."""
        request = self.scheduler.request(self._rebased(plan, observation), delay)
        chunk = self.policy.infer(observation, given=request.given, guidance=request.guidance)
        _require_executable(chunk)
        return chunk

    def _collect(self) -> None:
        """Take the outcome of the call, if it has ended."""
        flight = self._flight
        if flight is None or not flight.future.done():
            return
        self._flight = None
        failure = flight.future.exception()
        if failure is not None:
            message = f"{type(failure).__name__}: {failure}"
            self._record(flight, self.clock.now(), message)
            return
        chunk, ready_s = flight.future.result()
        self._record(flight, ready_s, chunk)
        if self._origin is None or chunk.age == 0:
            self._origin = flight
        origin = self._origin  # an earlier call, if the policy has kept its prefix
        arrived = Plan(
            origin.plan.step, chunk.actions, chunk.normalized, origin.observation, origin.began_s
        )
        self._plan = self.scheduler.merge(self._rebased(self._plan, origin.observation), arrived)

    def _record(self, flight: _Flight, ended_s: float, outcome: ActionChunk | str) -> None:
        consumed = self._plan.step - flight.plan.step
        latency_ms = (ended_s - flight.began_s) * 1000
        call = Call(flight.tick, latency_ms, not self._warm, flight.delay, consumed)
        if isinstance(outcome, str):
            call = replace(call, error=outcome)
        else:
            call = replace(call, times=outcome.times, kept=kept_names(outcome.kept))
        if self.watcher is not None:
            self.watcher.inferred(flight.began_s, ended_s, flight.observation, outcome)
        error = call.error
        if error is not None and not (self.report.calls and self.report.calls[-1].error):
            logger.warning("a call failed, and the plan is executed to its end: %s", error)
        self.report.calls.append(call)
        self._warm = True
        if error is None and len(flight.plan):
            self._delay.add(consumed)

    def _act(self, tick: int) -> bool:
        held: Cause | None = None
        action: Action | None = None
        if len(self._plan):
            action = self._last_action = self._plan.actions[0]
            self.report.ages_ms.append((self.clock.now() - self._plan.observed_s) * 1000)
            self._plan = self._plan.since(self._plan.step + 1)
        elif self._last_action is not None:
            action = self.hold(self._last_action)
            held = "failed" if self._flight is None else "late"
            self.report.hold(tick, held)
        else:
            self.report.waiting_ticks += 1
        ends = action is not None and bool(self.robot.act(action))
        if self.watcher is not None:
            self.watcher.ticked(self.clock.now(), len(self._plan), action, held)
        return ends

    def _rebased(self, plan: Plan, observation: Observation) -> Plan:
        if plan.observation is None:
            return plan
        normalized = self.policy.rebase(plan.normalized, plan.observation, observation)
        return replace(plan, normalized=normalized, observation=observation)


@dataclass(frozen=True)
class _Flight:
    """A running call: from which tick, observation and plan, and the delay it was told of."""

    tick: int
    began_s: float
    observation: Observation
    plan: Plan
    delay: int | None
    future: Future[tuple[ActionChunk, float]]


def _require_executable(chunk: ActionChunk) -> None:
    actions, normalized = np.shape(chunk.actions), np.shape(chunk.normalized)
    if len(actions) != 2 or len(normalized) != 2 or actions[0] != normalized[0] or not actions[0]:
        raise ValueError(
            f"a chunk must have actions (h, robot_action_dim) and normalized (h, a), "
            f"got {actions} and {normalized}"
        )
    if not np.isfinite(chunk.actions).all():
        raise ValueError("a chunk's actions must be finite, got NaN or infinite values")
