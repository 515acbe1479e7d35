"""Normalisation statistics: from the files' numbers to `FeatureStats`, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from halfpi.checkpoints.errors import CheckpointError
from halfpi.config import FeatureStats, NormMode

_NEEDED: Mapping[NormMode, tuple[str, ...]] = {
    "quantile": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "identity": (),
}


def feature_stats(values: Mapping[str, Any], where: str, mode: NormMode) -> FeatureStats:
    """The statistics in `values`, name → numbers; names unknown to FeatureStats are ignored.

    Raises CheckpointError, beginning with `where`, as `check_stats` does.
    """
    names = [field.name for field in dataclasses.fields(FeatureStats)]
    stats = FeatureStats(
        **{
            name: _numbers(values[name], f"{where}.{name}")
            for name in names
            if values.get(name) is not None
        }
    )
    check_stats(stats, where, mode)
    return stats


def check_stats(stats: FeatureStats, where: str, mode: NormMode) -> None:
    """Raise CheckpointError for unequal lengths, NaN, infinity, or lack of what `mode` needs."""
    present = {name: value for name, value in vars(stats).items() if value is not None}
    missing = [name for name in _NEEDED[mode] if name not in present]
    if missing:
        raise CheckpointError(f"{where} has no {' and '.join(missing)}, which {mode} needs")
    lengths = {name: len(value) for name, value in present.items()}
    if len(set(lengths.values())) > 1:
        raise CheckpointError(f"{where} has statistics of unequal lengths: {lengths}")
    for name, value in present.items():
        if not all(map(math.isfinite, value)):
            raise CheckpointError(f"{where}.{name} is not finite: {list(value)}")


def length(stats: FeatureStats) -> int | None:
    """How many dimensions checked `stats` describe; None when they are empty."""
    return next((len(value) for value in vars(stats).values() if value is not None), None)


def _numbers(values: object, where: str) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise CheckpointError(f"{where} must be a list of numbers, got {str(values)[:80]}")
    return tuple(map(float, values))
