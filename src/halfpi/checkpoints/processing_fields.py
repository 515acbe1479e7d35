"""From what a checkpoint states to a checked `ProcessingConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from halfpi.checkpoints.errors import CheckpointError
from halfpi.checkpoints.stats import check_stats, length
from halfpi.config import Pi05Config, ProcessingConfig
from halfpi.processing import ROBOTS, check_processing


def build_processing(
    config: Pi05Config, stated: Mapping[str, Any], overrides: Mapping[str, object]
) -> ProcessingConfig:
    """The processing that fits `config`; `overrides` win over what the checkpoint has `stated`.

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
    processing = ProcessingConfig(**fields)
    for name in ("image_size", "max_prompt_tokens"):
        of_model, of_processing = getattr(config, name), fields[name]
        if of_model != of_processing:
            raise CheckpointError(f"{name} is {of_model} in the model, got {of_processing}")
    _check_statistics(processing)
    try:
        check_processing(processing, config.action_dim)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the processing does not fit: {error}") from error
    return processing


def _check_statistics(processing: ProcessingConfig) -> None:
    robot = ROBOTS.get(processing.robot)
    for name, stats, needed in (
        ("state_stats", processing.state_stats, None if robot is None else robot.state_dim),
        ("action_stats", processing.action_stats, processing.robot_action_dim),
    ):
        if stats is None:
            continue
        check_stats(stats, name)
        found = length(stats)
        if found is not None and needed is not None and found < needed:
            raise CheckpointError(f"{name} have length {found}, the robot has {needed}")
