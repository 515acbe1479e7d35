"""A simulated robot and a scripted policy: what the loop did is a list of numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from halfpi.model import Guidance
from halfpi.runtime import ControlLoop, LoopReport, Scheduler, VirtualClock, repeat_last
from halfpi.runtime.schedulers import Request
from halfpi.types import ActionChunk, Observation

RATE_HZ = 10.0

Script = Callable[[int], NDArray[np.float32]]


def counting(call: int) -> NDArray[np.float32]:
    """Eight actions 100·call + place."""
    return 100.0 * call + np.arange(8, dtype=np.float32)


@dataclass
class ScriptedPolicy:
    """Call i gives the chunk `script(i)`, of one action dimension; the model has one more, of ones.

    Its age is `age(i)`.

    Actions are relative to the state, as seen by the model: a robot that is further on sees less.
    """

    script: Script = counting
    age: Callable[[int], int] = lambda call: 0
    horizon: int = 8
    requests: list[Request] = field(default_factory=list)
    resets: int = 0

    def reset(self) -> None:
        self.resets += 1

    def infer(
        self,
        observation: Observation,
        *,
        given: NDArray[np.float32] | None = None,
        guidance: Guidance | None = None,
    ) -> ActionChunk:
        self.requests.append(Request(given, guidance))
        call = len(self.requests) - 1
        actions = self.script(call)[:, None]
        normalized = np.hstack([actions, np.ones_like(actions)])
        return ActionChunk(actions, normalized, age=self.age(call))

    def rebase(
        self, normalized: NDArray[np.float32], was: Observation, now: Observation
    ) -> NDArray[np.float32]:
        return normalized + (was.state - now.state)


@dataclass
class RecordingRobot:
    """Writes down what it is told; its state is `state` always."""

    actions: list[float] = field(default_factory=list)
    observations: int = 0
    resets: int = 0
    state: float = 0.0
    on_act: Callable[[], bool | None] = lambda: None

    def reset(self) -> None:
        self.resets += 1

    def observe(self) -> Observation:
        self.observations += 1
        return Observation({}, np.array([self.state], np.float32))

    def act(self, action: NDArray[np.float32]) -> bool | None:
        self.actions.append(float(action[0]))
        return self.on_act()


@dataclass
class Simulation:
    """A loop in virtual time, with all that it works on."""

    policy: ScriptedPolicy
    robot: RecordingRobot
    clock: VirtualClock
    loop: ControlLoop

    def run(self, ticks: int) -> LoopReport:
        return self.loop.run(ticks)


@pytest.fixture
def simulate() -> Callable[..., Simulation]:
    """Build a simulation at 10 Hz whose calls take `latencies_s`, zero by default."""

    def build(
        scheduler: Scheduler,
        latencies_s: Iterable[float] | None = None,
        script: Script = counting,
        hold: Callable[[NDArray[np.float32]], NDArray[np.float32]] = repeat_last,
    ) -> Simulation:
        policy, robot = ScriptedPolicy(script), RecordingRobot()
        clock = VirtualClock() if latencies_s is None else VirtualClock(latencies_s)
        loop = ControlLoop(policy, robot, RATE_HZ, scheduler, clock=clock, hold=hold)
        return Simulation(policy, robot, clock, loop)

    return build
