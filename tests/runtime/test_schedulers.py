"""Every scheduler in virtual time: exactly which action is executed at which tick."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import repeat
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from halfpi.runtime import (
    AdaptiveHorizon,
    Asynchronous,
    GuidedRtc,
    RecedingHorizon,
    Scheduler,
    SynchronousChunk,
    TemporalEnsemble,
    TrainedRtc,
)

Simulate = Callable[..., Any]


def ticks(count: int) -> repeat[float]:
    """Every call takes `count` ticks."""
    return repeat(count * 0.1)


def test_synchronous_executes_whole_chunks(simulate: Simulate) -> None:
    simulation = simulate(SynchronousChunk())
    report = simulation.run(18)
    assert simulation.robot.actions == [*range(8), *range(100, 108), 200, 201]
    assert simulation.robot.observations == len(report.calls) == 3
    assert report.held_ticks == report.waiting_ticks == 0


def test_synchronous_holds_while_it_infers(simulate: Simulate) -> None:
    simulation = simulate(SynchronousChunk(), ticks(2))
    report = simulation.run(14)
    assert simulation.robot.actions == [*range(8), 7, 7, 100, 101]
    assert report.waiting_ticks == 2  # nothing to hold yet
    assert [(stall.tick, stall.ticks, stall.cause) for stall in report.stalls] == [(10, 2, "late")]


def test_receding_horizon_drops_the_rest(simulate: Simulate) -> None:
    simulation = simulate(RecedingHorizon(3), ticks(1))
    simulation.run(10)
    assert simulation.robot.actions == [0, 1, 2, 2, 100, 101, 102, 102, 200]


def test_asynchronous_skips_what_was_executed_meanwhile(simulate: Simulate) -> None:
    simulation = simulate(Asynchronous(4), ticks(2))
    report = simulation.run(14)
    assert simulation.robot.actions == [0, 1, 2, 3, 4, 5, 102, 103, 104, 105, 202, 203]
    assert [call.consumed for call in report.calls] == [0, 2, 2]
    assert report.held_ticks == 0


def test_asynchronous_at_threshold_zero_is_synchronous(simulate: Simulate) -> None:
    simulations = [
        simulate(scheduler, ticks(3)) for scheduler in (Asynchronous(0), SynchronousChunk())
    ]
    for simulation in simulations:
        simulation.run(40)
    assert simulations[0].robot.actions == simulations[1].robot.actions


@pytest.mark.parametrize("latency", [0, 1, 3])
def test_temporal_ensemble_is_acts_mean(simulate: Simulate, latency: int) -> None:
    decay, horizon = math.log(2), 8
    simulation = simulate(TemporalEnsemble(decay), ticks(latency))
    report = simulation.run(30)
    # The steps at which each chunk begins, and from which on it is known.
    begun = [max(0, call.tick - report.waiting_ticks) for call in report.calls]
    known_from = [start + call.consumed for start, call in zip(begun, report.calls, strict=True)]
    expected = []
    for step in range(30 - latency):
        said = [
            100 * index + step - start
            for index, (start, known) in enumerate(zip(begun, known_from, strict=True))
            if known <= step < start + horizon
        ]
        expected.append(np.average(said, weights=np.exp(-decay * np.arange(len(said)))))
    np.testing.assert_allclose(simulation.robot.actions, expected, rtol=1e-6)
    assert len(report.calls) == {0: 30, 1: 29, 3: 9}[latency]


def test_an_ensemble_forgets_its_chunks_between_runs(simulate: Simulate) -> None:
    simulation = simulate(TemporalEnsemble(0.0), script=lambda call: np.full(8, call, np.float32))
    simulation.run(2)
    simulation.run(2)
    assert simulation.robot.actions == [0, 0.5, 2, 2.5]


def test_guided_rtc_guides_towards_the_rest_of_the_plan(simulate: Simulate) -> None:
    simulation = simulate(GuidedRtc(4, execution_horizon=6), ticks(2))
    simulation.run(14)
    assert simulation.robot.actions == [0, 1, 2, 3, 4, 5, 102, 103, 104, 105, 202, 203]
    first, second, third = (request.guidance for request in simulation.policy.requests)
    assert first is None
    assert second.target[:, 0].tolist() == [4, 5, 6, 7, 0, 0, 0, 0]
    assert second.weights.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]  # the delay is not known yet
    assert third.target[:4, 0].tolist() == [104, 105, 106, 107]
    np.testing.assert_allclose(third.weights, [1, 1, 2 / 3, 1 / 3, 0, 0, 0, 0], rtol=1e-6)


def test_guided_rtc_keeps_to_its_execution_horizon(simulate: Simulate) -> None:
    simulation = simulate(GuidedRtc(5, execution_horizon=2, schedule="ones"), ticks(1))
    simulation.run(20)
    assert simulation.policy.requests[-1].guidance.weights.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_trained_rtc_gives_as_many_actions_as_the_call_uses_up(simulate: Simulate) -> None:
    simulation = simulate(TrainedRtc(4, max_delay=3), ticks(2))
    simulation.run(14)
    first, second, third = (request.given for request in simulation.policy.requests)
    assert first is None
    assert second.tolist() == [[4, 1], [5, 1], [6, 1]]  # the delay is not known yet
    assert third.tolist() == [[104, 1], [105, 1]]


def test_trained_rtc_never_gives_more_than_the_model_knows(simulate: Simulate) -> None:
    simulation = simulate(TrainedRtc(6, max_delay=2), ticks(4))
    simulation.run(40)
    assert {len(request.given) for request in simulation.policy.requests[1:]} == {2}


def test_what_is_left_is_normalised_for_the_new_observation(simulate: Simulate) -> None:
    simulation = simulate(TrainedRtc(4, max_delay=2), ticks(1))

    def move() -> None:
        simulation.robot.state += 10

    simulation.robot.on_act = move
    simulation.run(7)
    # Four actions, each of which moved the state by ten, lie between the two observations.
    assert simulation.policy.requests[1].given[:, 0].tolist() == [4 - 40, 5 - 40]


SLOW, FAST = np.linspace(0, 0.7, 8, dtype=np.float32), np.arange(8, dtype=np.float32)


def observed_at(simulation: Any, count: int = 8) -> list[int]:
    return [call.tick for call in simulation.run(count).calls]


def test_adaptive_horizon_replans_early_where_the_chunk_moves_fast(simulate: Simulate) -> None:
    def run(chunk: NDArray[np.float32]) -> list[int]:
        scheduler = AdaptiveHorizon(1, travel=2.0, disagreement=math.inf)
        return observed_at(simulate(scheduler, script=lambda call: chunk))

    assert run(FAST) == [0, 3, 6]  # from action to action a distance of 1, of which 2 are allowed
    assert run(SLOW) == [0, 7]  # only the threshold stops it


def test_adaptive_horizon_replans_early_after_disagreement(simulate: Simulate) -> None:
    def script(call: int) -> NDArray[np.float32]:
        return np.full(8, 5.0 if call == 1 else 0.0, np.float32)

    scheduler = AdaptiveHorizon(4, shortest=2, travel=100.0, disagreement=1.0)
    # The chunk of tick 4 contradicts the plan, and so does the next one; then all agree.
    assert observed_at(simulate(scheduler, script=script), 16) == [0, 4, 6, 8, 12]


BAD: list[tuple[Callable[[], Scheduler], str]] = [
    (lambda: RecedingHorizon(9), r"execute must be in \[1, 8\], got 9"),
    (lambda: Asynchronous(8), r"threshold must be in \[0, 7\], got 8"),
    (lambda: GuidedRtc(4, execution_horizon=9), r"execution_horizon must be in \[1, 8\], got 9"),
    (lambda: TrainedRtc(4, max_delay=0), r"max_delay must be in \[1, 8\], got 0"),
    (lambda: AdaptiveHorizon(4, shortest=0), r"shortest must be in \[1, 8\], got 0"),
    (lambda: AdaptiveHorizon(4, travel=0), "travel must be positive, got 0"),
    (lambda: GuidedRtc(4, max_gain=-1), "max_gain must be positive, got -1"),
    (lambda: GuidedRtc(4, schedule="cosine"), "schedule must be one of zeros, .*, got 'cosine'"),  # type: ignore[arg-type]
    (lambda: TemporalEnsemble(math.nan), "decay must be finite, got nan"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_settings_that_do_not_fit_are_refused(
    simulate: Simulate, make: Callable[[], Scheduler], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(make()).run(1)
