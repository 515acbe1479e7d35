"""Intervals against published and hand-computed values."""

from __future__ import annotations

import math

import pytest

from halfpi.sim.statistics import PairedDifference, Proportion


# Newcombe 1998, Statistics in Medicine 17, table I: the score method without continuity correction.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_wilson_interval_matches_newcombe(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert Proportion(successes, trials).interval == pytest.approx((low, high), abs=5e-5)


def test_the_interval_is_symmetric_under_exchange_of_outcomes() -> None:
    low, high = Proportion(7, 50).interval
    assert Proportion(43, 50).interval == pytest.approx((1 - high, 1 - low))


def test_the_interval_stays_in_range() -> None:
    for successes, trials in ((0, 1), (0, 50), (1, 1), (50, 50)):
        low, high = Proportion(successes, trials).interval
        assert 0 <= low <= successes / trials
        assert successes / trials == pytest.approx(min(high, successes / trials))
        assert high <= 1


def test_a_proportion_counts_what_it_is_given() -> None:
    proportion = Proportion.of(success for success in (True, False, True, True))
    assert (proportion.successes, proportion.trials, proportion.rate) == (3, 4, 0.75)


def test_a_proportion_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one episode"):
        Proportion.of([])


def test_the_paired_difference_matches_a_computation_by_hand() -> None:
    # 20 episodes: 9 solved by both, 2 by the first alone, 6 by the second alone, 3 by none.
    outcomes = [(True, True)] * 9 + [(True, False)] * 2 + [(False, True)] * 6 + [(False, False)] * 3
    first, second = (dict(enumerate(column)) for column in zip(*outcomes, strict=True))
    paired = PairedDifference.of(first, second)
    assert paired == PairedDifference(only_first=2, only_second=6, pairs=20)
    assert paired.difference == pytest.approx(0.2)
    # The deviation of twenty values: six of 1, two of −1, twelve of 0.
    mean = 4 / 20
    variance = (6 * (1 - mean) ** 2 + 2 * (1 + mean) ** 2 + 12 * mean**2) / 20
    half = 1.959964 * math.sqrt(variance / 20)
    assert paired.interval == pytest.approx((mean - half, mean + half))


def test_episodes_are_paired_by_key_not_by_order() -> None:
    first = {("push", 1): True, ("push", 2): False}
    second = {("push", 2): False, ("push", 1): True}
    assert PairedDifference.of(first, second) == PairedDifference(0, 0, 2)


def test_equal_settings_differ_by_nothing() -> None:
    outcomes = {1: True, 2: False}
    assert PairedDifference.of(outcomes, outcomes).interval == (0, 0)


@pytest.mark.parametrize(
    ("first", "second"), [({}, {}), ({1: True}, {2: True}), ({1: True}, {1: True, 2: True})]
)
def test_unpaired_episodes_are_an_error(first: dict[int, bool], second: dict[int, bool]) -> None:
    with pytest.raises(ValueError, match="the same episodes"):
        PairedDifference.of(first, second)
