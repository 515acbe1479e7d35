"""Both frameworks' formulas, written out again value by value, and the round trip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from halfpi.config import FeatureStats, NormMode, NormRule
from halfpi.processing.normalize import Floats, Normalizer

STATS = FeatureStats(
    mean=(1.0, -2.0, 0.5),
    std=(2.0, 0.5, 0.0),
    q01=(-1.0, 0.0, 0.25),
    q99=(3.0, 0.5, 0.25),
    q10=(0.0, 0.1, 0.3),
    q90=(2.0, 0.4, 0.3),
    min=(-4.0, -1.0, 0.2),
    max=(4.0, 1.0, 0.2),
)
X = np.array([0.75, 0.625, 0.26], np.float32)
MODES: list[NormMode] = ["quantile", "quantile10", "min_max", "mean_std"]
RULES: list[NormRule] = ["openpi", "lerobot"]


def normalizer(
    mode: NormMode, rule: NormRule, stats: FeatureStats | None = STATS, eps: float = 1e-6
) -> Normalizer:
    return Normalizer("state", mode, rule, eps, stats)


def low_high(mode: NormMode) -> list[tuple[float, float]]:
    low, high = {
        "quantile": (STATS.q01, STATS.q99),
        "quantile10": (STATS.q10, STATS.q90),
        "min_max": (STATS.min, STATS.max),
    }[mode]
    assert low is not None
    assert high is not None
    return list(zip(low, high, strict=True))


@pytest.mark.parametrize("mode", ["quantile", "quantile10", "min_max"])
def test_openpi_range(mode: NormMode) -> None:
    to_model = [
        (x - a) / (b - a + 1e-6) * 2 - 1
        for x, (a, b) in zip(X.tolist(), low_high(mode), strict=True)
    ]
    to_robot = [
        (x + 1) / 2 * (b - a + 1e-6) + a
        for x, (a, b) in zip(X.tolist(), low_high(mode), strict=True)
    ]
    result = normalizer(mode, "openpi")
    np.testing.assert_allclose(result.normalize(X), to_model, rtol=1e-12)
    np.testing.assert_allclose(result.unnormalize(X), to_robot, rtol=1e-12)
    assert result.normalize(X).dtype == np.float64


@pytest.mark.parametrize("mode", ["quantile", "quantile10", "min_max"])
def test_lerobot_range_replaces_only_a_zero_denominator(mode: NormMode) -> None:
    widths = [(a, b - a if b != a else 1e-6) for a, b in low_high(mode)]
    to_model = [2 * (x - a) / width - 1 for x, (a, width) in zip(X.tolist(), widths, strict=True)]
    to_robot = [(x + 1) * width / 2 + a for x, (a, width) in zip(X.tolist(), widths, strict=True)]
    result = normalizer(mode, "lerobot")
    np.testing.assert_allclose(result.normalize(X), to_model, rtol=1e-5)
    np.testing.assert_allclose(result.unnormalize(X), to_robot, rtol=1e-6)
    assert result.normalize(X).dtype == np.float32


def test_mean_std() -> None:
    assert STATS.mean is not None
    assert STATS.std is not None
    rows = list(zip(X.tolist(), STATS.mean, STATS.std, strict=True))
    to_model = [(x - mean) / (std + 1e-6) for x, mean, std in rows]
    openpi, lerobot = normalizer("mean_std", "openpi"), normalizer("mean_std", "lerobot")
    np.testing.assert_allclose(openpi.normalize(X), to_model, rtol=1e-12)
    np.testing.assert_allclose(lerobot.normalize(X), to_model, rtol=1e-5)
    with_eps = [x * (std + 1e-6) + mean for x, mean, std in rows]
    without = [x * std + mean for x, mean, std in rows]
    np.testing.assert_allclose(openpi.unnormalize(X), with_eps, rtol=1e-12)
    np.testing.assert_array_equal(lerobot.unnormalize(X), np.array(without, np.float32))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)  # a busy machine is no failure
@given(
    values=hnp.arrays(
        np.float32, st.tuples(st.integers(1, 4), st.just(2)), elements=st.floats(-10, 10, width=32)
    )
)
def test_round_trip(mode: NormMode, rule: NormRule, values: Floats) -> None:
    stats = FeatureStats(
        **{
            name: pair[:2]
            for name, pair in vars(STATS).items()  # the third dimension has no width
        }
    )
    both_ways = normalizer(mode, rule, stats)
    back = both_ways.unnormalize(both_ways.normalize(values))
    np.testing.assert_allclose(back, values, rtol=1e-4, atol=1e-4)
    assert back.shape == values.shape


def test_nothing_is_clipped() -> None:
    assert normalizer("quantile", "openpi").normalize(X * 100).max() > 100


@pytest.mark.parametrize("rule", RULES)
def test_no_statistics_and_identity_pass_through(rule: NormRule) -> None:
    for passing in (normalizer("quantile", rule, None), normalizer("identity", rule)):
        np.testing.assert_array_equal(passing.normalize(X), X)
        np.testing.assert_array_equal(passing.unnormalize(X), X)


def test_unnormalize_leaves_its_argument_alone() -> None:
    values = X.astype(np.float64)
    normalizer("quantile", "openpi").unnormalize(values)
    np.testing.assert_array_equal(values, X)


def test_openpi_slices_its_statistics() -> None:
    openpi = normalizer("quantile", "openpi")
    np.testing.assert_array_equal(openpi.normalize(X[:2]), openpi.normalize(X)[:2])
    np.testing.assert_array_equal(openpi.unnormalize(X[:2]), openpi.unnormalize(X)[:2])
    with pytest.raises(ValueError, match="state has 4 values, but its statistics have 3"):
        openpi.normalize(np.ones(4, np.float32))


def test_openpi_passes_dimensions_beyond_its_statistics_on_the_way_out() -> None:
    longer = np.array([*X, 0.1, -7.0])
    quantile = normalizer("quantile", "openpi").unnormalize(longer[None])[0]
    np.testing.assert_array_equal(quantile[3:], longer[3:])
    np.testing.assert_array_equal(
        quantile[:3], normalizer("quantile", "openpi").unnormalize(X.astype(float))
    )
    z_score = normalizer("mean_std", "openpi").unnormalize(longer)
    np.testing.assert_allclose(z_score[3:], longer[3:] * (1 + 1e-6), rtol=1e-15)


@pytest.mark.parametrize("dim", [2, 4])
def test_lerobot_wants_the_exact_length(dim: int) -> None:
    lerobot = normalizer("quantile", "lerobot")
    for direction in (lerobot.normalize, lerobot.unnormalize):
        with pytest.raises(ValueError, match=f"state has {dim} values, but its statistics have 3"):
            direction(np.ones(dim, np.float32))


def test_bad_statistics() -> None:
    with pytest.raises(ValueError, match="state normalisation needs the statistic q99"):
        normalizer("quantile", "openpi", FeatureStats(q01=(0.0,)))
    with pytest.raises(ValueError, match="q01 and q99 must be of one length, got 1 and 2"):
        normalizer("quantile", "openpi", FeatureStats(q01=(0.0,), q99=(1.0, 2.0)))
    with pytest.raises(ValueError, match="statistic std must be finite"):
        normalizer("mean_std", "openpi", FeatureStats(mean=(0.0,), std=(float("nan"),)))
    with pytest.raises(ValueError, match="norm_eps must be positive, got 0"):
        normalizer("quantile", "openpi", eps=0.0)
