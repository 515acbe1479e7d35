"""Normalisation statistics: from the files' numbers to `FeatureStats`, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from halfpi.checkpoints.errors import CheckpointError
from halfpi.config import FeatureStats


def feature_stats(values: Mapping[str, Any], where: str) -> FeatureStats:
    """The statistics in `values`, name → numbers; names unknown to FeatureStats are ignored.

    Raises CheckpointError, beginning with `where`, for what is no list of numbers and as
    `check_stats` does.
    """
    names = [field.name for field in dataclasses.fields(FeatureStats)]
    present = {name: values[name] for name in names if values.get(name) is not None}
    stats = FeatureStats(
        **{name: _numbers(value, f"{where}.{name}") for name, value in present.items()}
    )
    check_stats(stats, where)
    return stats


def check_stats(stats: FeatureStats, where: str) -> None:
    """Raise CheckpointError for statistics of unequal lengths, NaN and infinity."""
    present = {name: value for name, value in vars(stats).items() if value is not None}
    lengths = {name: len(value) for name, value in present.items()}
    if len(set(lengths.values())) > 1:
        raise CheckpointError(f"{where} has statistics of unequal lengths: {lengths}")
    for name, value in present.items():
        if not all(map(math.isfinite, value)):
            raise CheckpointError(f"{where}.{name} is not finite: {list(value)}")


def length(stats: FeatureStats | None) -> int | None:
    """How many dimensions `stats` describe; None when there are none."""
    values = () if stats is None else vars(stats).values()
    return next((len(value) for value in values if value is not None), None)


def _numbers(values: object, where: str) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise CheckpointError(f"{where} must be a list of numbers, got {str(values)[:80]}")
    return tuple(map(float, values))
