"""The loop itself: ticks on time, faults of calls, and what the report says of them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, count, repeat
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from halfpi.model import Guidance
from halfpi.runtime import (
    Asynchronous,
    Call,
    ControlLoop,
    RealClock,
    Stall,
    SynchronousChunk,
    TrainedRtc,
)
from halfpi.runtime.report import DelayEstimate, LoopReport
from halfpi.types import ActionChunk, Observation

Simulate = Callable[..., Any]


def failing(*calls: int) -> Callable[[int], NDArray[np.float32]]:
    def script(call: int) -> NDArray[np.float32]:
        if call in calls:
            raise RuntimeError("no power")
        return 100.0 * call + np.arange(8, dtype=np.float32)

    return script


def test_a_late_call_holds_the_last_action_and_is_aligned_by_what_was_executed(
    simulate: Simulate,
) -> None:
    # The plan has two actions left when a call begins that takes five ticks.
    simulation = simulate(Asynchronous(2), chain([0.0, 0.5], repeat(0.1)))
    report = simulation.run(14)
    assert simulation.robot.actions == [*range(8), 7, 7, 7, 102, 103, 104]
    assert report.stalls == [Stall(8, 3, "late")]
    assert report.held_ticks == 3
    slow = report.calls[1]
    assert (slow.tick, slow.consumed) == (6, 2)
    assert slow.latency_ms == pytest.approx(500)


def test_a_failed_call_is_made_again_while_the_plan_lasts(
    simulate: Simulate, caplog: pytest.LogCaptureFixture
) -> None:
    simulation = simulate(Asynchronous(2), repeat(0.1), failing(1))
    report = simulation.run(12)
    assert simulation.robot.actions == [*range(8), 201, 202, 203]
    assert report.failed_calls == 1
    assert report.calls[1].error == "RuntimeError: no power"
    assert report.stalls == []
    assert [record.getMessage() for record in caplog.records] == [
        "a call failed, and the plan is executed to its end: RuntimeError: no power"
    ]


def test_a_policy_that_keeps_failing_makes_the_robot_hold(
    simulate: Simulate, caplog: pytest.LogCaptureFixture
) -> None:
    simulation = simulate(SynchronousChunk(), None, failing(1, 2, 3))
    report = simulation.run(13)
    assert simulation.robot.actions == [*range(8), 7, 7, 7, 400, 401]
    assert report.stalls == [Stall(8, 3, "failed")]
    assert len(caplog.records) == 1  # not one a tick


def test_a_robot_that_has_had_no_action_is_sent_none(simulate: Simulate) -> None:
    simulation = simulate(SynchronousChunk(), None, failing(*range(5)))
    report = simulation.run(5)
    assert simulation.robot.actions == []
    assert (report.waiting_ticks, report.held_ticks, report.failed_calls) == (5, 0, 5)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.array([0, np.nan] * 4), "a chunk's actions must be finite"),
        (np.zeros(0), r"a chunk must have actions \(h, robot_action_dim\).*, got \(0, 1\)"),
    ],
)
def test_a_chunk_that_cannot_be_executed_is_a_failed_call(
    simulate: Simulate, chunk: NDArray[np.float32], message: str
) -> None:
    simulation = simulate(SynchronousChunk(), None, lambda call: chunk)
    report = simulation.run(2)
    assert simulation.robot.actions == []
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(report.calls[0].error)


def test_how_to_hold_is_the_robots_choice(simulate: Simulate) -> None:
    simulation = simulate(SynchronousChunk(), repeat(0.2), hold=np.zeros_like)
    simulation.run(14)
    assert simulation.robot.actions == [*range(8), 0, 0, 100, 101]


def test_ticks_are_counted_from_the_start_and_missed_ones_are_left_out(simulate: Simulate) -> None:
    simulation = simulate(SynchronousChunk())
    clock, times = simulation.clock, []
    spans = chain([0.03, 0.25], repeat(0.03))  # the second action takes two and a half ticks

    def act() -> None:
        times.append(clock.now())
        clock.sleep_until(clock.now() + next(spans))

    simulation.robot.on_act = act
    report = simulation.run(7)
    np.testing.assert_allclose(times, [0, 0.1, 0.35, 0.4, 0.5, 0.6])
    assert report.missed_ticks == 1
    np.testing.assert_allclose(report.tick_errors_ms, [0, 0, 50, 0, 0, 0], atol=1e-6)
    assert report.late_ticks == 1
    assert simulation.robot.actions == [0, 1, 2, 3, 4, 5]  # none is skipped


@pytest.mark.parametrize("rate_hz", [30.0, 1 / 0.0125, 100.0, 77.7])
def test_a_latency_of_k_ticks_is_k_ticks_at_any_rate(simulate: Simulate, rate_hz: float) -> None:
    simulation = simulate(Asynchronous(5), repeat(3 / rate_hz))
    simulation.loop.rate_hz = rate_hz
    report = simulation.run(500)
    assert {call.consumed for call in report.calls[1:]} == {3}
    assert max(report.tick_errors_ms) < 1e-6


def test_the_robot_ends_the_run(simulate: Simulate) -> None:
    simulation = simulate(SynchronousChunk())
    simulation.robot.on_act = lambda: len(simulation.robot.actions) == 5
    assert simulation.loop.run().ticks == 5
    assert simulation.policy.resets == simulation.robot.resets == 1


def test_a_second_run_starts_anew_but_knows_the_delay(simulate: Simulate) -> None:
    simulation = simulate(TrainedRtc(4, max_delay=3), repeat(0.2))
    first, second = simulation.run(14), simulation.run(14)
    assert [call.expected for call in first.calls] == [None, None, 2]
    assert [call.expected for call in second.calls] == [2, 2, 2]
    assert [call.warm_up for call in first.calls] == [True, False, False]
    assert not any(call.warm_up for call in second.calls)
    assert len(first.ages_ms) == len(second.ages_ms) == 12


def test_the_same_run_twice_is_the_same(simulate: Simulate) -> None:
    runs = []
    for _ in range(2):
        latencies = (0.05 * (7 * index % 11) for index in count())
        simulation = simulate(TrainedRtc(5, max_delay=3), latencies, failing(4, 9))
        runs.append((simulation.run(300), simulation.robot.actions))
    assert runs[0] == runs[1]


def test_the_age_of_an_action_is_that_of_its_observation(simulate: Simulate) -> None:
    report = simulate(Asynchronous(4), repeat(0.2)).run(10)
    np.testing.assert_allclose(report.ages_ms, [200, 300, 400, 500, 600, 700, 200, 300])


def test_a_chunk_of_a_kept_prefix_begins_at_the_observation_of_the_prefix(
    simulate: Simulate,
) -> None:
    simulation = simulate(Asynchronous(4))
    simulation.policy.age = lambda call: call % 2
    report = simulation.run(11)
    # Calls 1 and 3 begin where 0 and 2 did, four actions earlier.
    assert simulation.robot.actions == [0, 1, 2, 3, 104, 200, 201, 202, 203, 304, 400]
    np.testing.assert_allclose(report.ages_ms[3:6], [300, 400, 0])


def test_the_delay_estimate_forgives_a_slow_call() -> None:
    estimate = DelayEstimate()
    assert estimate.actions is None
    for consumed in [3] * 30 + [40] + [4] * 2:
        estimate.add(consumed)
    assert estimate.actions == 3
    for _ in range(4):
        estimate.add(4)
    assert estimate.actions == 4
    for _ in range(50):
        estimate.add(1)
    assert estimate.actions == 1


def test_the_summary_leaves_out_the_warm_up() -> None:
    report = LoopReport(10.0)
    assert report.summary()["latency_p50_ms"] is None
    report.calls += [
        Call(0, 9000.0, True, None, 0),
        Call(1, 20.0, False, None, 2),
        Call(3, 500.0, False, 2, 2, "RuntimeError: no power"),
    ]
    summary = report.summary()
    assert (summary["latency_p99_ms"], summary["calls"], summary["failed_calls"]) == (20.0, 3, 1)


def test_latencies_may_not_run_out(simulate: Simulate) -> None:
    with pytest.raises(ValueError, match="latencies_s has no latency for another call"):
        simulate(SynchronousChunk(), [0.1]).run(20)


def test_a_rate_must_be_positive(simulate: Simulate) -> None:
    simulation = simulate(SynchronousChunk())
    with pytest.raises(ValueError, match="rate_hz must be positive, got 0"):
        ControlLoop(simulation.policy, simulation.robot, 0, SynchronousChunk())


@dataclass
class WaitingPolicy:
    """Its second call returns only when the robot has held four times."""

    robot: CountingRobot
    horizon: int = 4
    calls: int = 0
    threads: set[int] = field(default_factory=set)

    def reset(self) -> None:
        pass

    def infer(
        self,
        observation: Observation,
        *,
        given: NDArray[np.float32] | None = None,
        guidance: Guidance | None = None,
    ) -> ActionChunk:
        self.calls += 1
        self.threads.add(threading.get_ident())
        if self.calls == 2:
            assert self.robot.has_held.wait(timeout=30)
        actions = 100.0 * self.calls + np.arange(4, dtype=np.float32)[:, None]
        return ActionChunk(actions, actions)

    def rebase(
        self, normalized: NDArray[np.float32], was: Observation, now: Observation
    ) -> NDArray[np.float32]:
        return normalized


@dataclass
class CountingRobot:
    actions: list[float] = field(default_factory=list)
    has_held: threading.Event = field(default_factory=threading.Event)

    def reset(self) -> None:
        pass

    def observe(self) -> Observation:
        return Observation({}, np.zeros(1, np.float32))

    def act(self, action: NDArray[np.float32]) -> bool:
        self.actions.append(float(action[0]))
        if self.actions.count(103) == 5:
            self.has_held.set()
        return self.actions[-1] >= 200


def test_on_a_real_clock_the_loop_goes_on_while_a_call_hangs() -> None:
    robot = CountingRobot()
    policy = WaitingPolicy(robot)
    loop = ControlLoop(policy, robot, 1000.0, Asynchronous(1), clock=RealClock())
    report = loop.run(max_ticks=30_000)
    # Of the new chunk the first action is left out: one was executed while the call ran.
    assert robot.actions == [100, 101, 102, *[103] * report.held_ticks, 103, 201]
    assert report.held_ticks >= 4
    assert len(policy.threads) == 1
    assert threading.get_ident() not in policy.threads


def test_a_real_time_priority_is_the_loops_alone_and_ends_with_the_run() -> None:
    def policy_of_thread() -> int:
        return os.sched_getscheduler(0)

    before = policy_of_thread()
    try:
        clock = RealClock(priority=1).__enter__()
    except PermissionError as error:
        pytest.skip(f"real-time priorities are not allowed here: {error}")
    try:
        assert policy_of_thread() == os.SCHED_FIFO
        assert clock.start(policy_of_thread).result()[0] == before
    finally:
        clock.__exit__(None, None, None)
    assert policy_of_thread() == before


def test_a_priority_that_the_system_refuses() -> None:
    with pytest.raises(PermissionError, match=r"priority 100 was refused .*\[1, 99\]"):
        RealClock(priority=100).__enter__()


@pytest.mark.skipif(sys.platform != "linux", reason="niceness of a thread is Linux's")
def test_calls_give_way_to_the_loop() -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    with RealClock() as clock:
        of_call, _ = clock.start(niceness).result()
    assert of_call == min(niceness() + 5, 19)
