"""From what a checkpoint states to a checked `ProcessingConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from halfpi.checkpoints.errors import CheckpointError
from halfpi.checkpoints.stats import check_stats, feature_stats, length
from halfpi.config import FeatureStats, Pi05Config, ProcessingConfig
from halfpi.processing import ROBOTS, check_processing


def build_processing(
    config: Pi05Config, stated: Mapping[str, Any], overrides: Mapping[str, object]
) -> ProcessingConfig:
    """The processing that fits `config`; `overrides` win over what the checkpoint has `stated`.

    Values may be as in JSON: lists for tuples, and dictionaries for statistics.

    Raises CheckpointError for an override that is no field of ProcessingConfig, for statistics that
    are broken or too short for the robot, and as `check_processing` does.
    """
    names = [field.name for field in dataclasses.fields(ProcessingConfig)]
    unknown = sorted(set(overrides) - set(names))
    if unknown:
        raise CheckpointError(
            f"ProcessingConfig has no field {', '.join(unknown)}; it has {', '.join(names)}"
        )
    fields: dict[str, Any] = {
        "image_size": config.image_size,
        "max_prompt_tokens": config.max_prompt_tokens,
        "robot_action_dim": config.action_dim,
        **stated,
        **overrides,
    }
    for name in ("cameras", "delta_mask"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(fields[name])
    for name in ("state_stats", "action_stats"):
        fields[name] = _statistics(fields.get(name), name)
    processing = ProcessingConfig(**fields)
    for name in ("image_size", "max_prompt_tokens"):
        of_model, of_processing = getattr(config, name), fields[name]
        if of_model != of_processing:
            raise CheckpointError(f"{name} is {of_model} in the model, got {of_processing}")
    try:
        check_processing(processing, config.action_dim)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"the processing does not fit: {error}") from error
    _check_lengths(processing)
    return processing


def _statistics(value: object, name: str) -> FeatureStats | None:
    if isinstance(value, Mapping):
        return feature_stats(value, name)
    if isinstance(value, FeatureStats):
        check_stats(value, name)
        return value
    if value is not None:
        raise CheckpointError(f"{name} must map statistics to numbers, got {value!r}")
    return None


def _check_lengths(processing: ProcessingConfig) -> None:
    for name, stats, needed in (
        ("state_stats", processing.state_stats, ROBOTS[processing.robot].state_dim),
        ("action_stats", processing.action_stats, processing.robot_action_dim),
    ):
        found = length(stats)
        if found is not None and needed is not None and found < needed:
            raise CheckpointError(f"{name} have length {found}, the robot has {needed}")
