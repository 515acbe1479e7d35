"""From what a checkpoint states to a checked `ProcessingConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from halfpi.checkpoints.errors import CheckpointError
from halfpi.checkpoints.stats import check_stats, length
from halfpi.config import (
    NormMode,
    NormRule,
    Pi05Config,
    ProcessingConfig,
    ResizeRule,
    RobotName,
)

_CHOICES = {
    "resize": ResizeRule,
    "norm_rule": NormRule,
    "state_norm": NormMode,
    "action_norm": NormMode,
    "robot": RobotName,
}


def build_processing(
    config: Pi05Config, stated: Mapping[str, Any], overrides: Mapping[str, object]
) -> ProcessingConfig:
    """The processing that fits `config`; `overrides` win over what the checkpoint has `stated`.

    Raises CheckpointError for an override that is no field of ProcessingConfig, for a value that a
    field cannot have, and for statistics that do not fit the normalisation or the robot.
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
    processing = ProcessingConfig(**fields)
    _check_values(processing, config)
    _check_statistics(processing)
    return processing


def _check_values(processing: ProcessingConfig, config: Pi05Config) -> None:
    for name, choices in _CHOICES.items():
        _require(
            name, processing, getattr(processing, name) in get_args(choices), get_args(choices)
        )
    for name in ("image_size", "max_prompt_tokens"):
        value = getattr(config, name)
        _require(name, processing, getattr(processing, name) == value, f"{value}, as in the model")
    _require(
        "cameras",
        processing,
        _is_tuple_of(str, processing.cameras)
        and 0 < len(set(processing.cameras)) == len(processing.cameras),
        "one or more distinct names",
    )
    _require(
        "robot_action_dim",
        processing,
        type(processing.robot_action_dim) is int
        and 0 < processing.robot_action_dim <= config.action_dim,
        f"1 to {config.action_dim}",
    )
    mask = processing.delta_mask
    _require(
        "delta_mask",
        processing,
        mask is None or (_is_tuple_of(bool, mask) and len(mask) <= processing.robot_action_dim),
        f"at most {processing.robot_action_dim} booleans, or None",
    )
    padded = processing.prompt_state_dim
    _require(
        "prompt_state_dim",
        processing,
        padded is None or (type(padded) is int and padded > 0),
        "a positive int or None",
    )


def _check_statistics(processing: ProcessingConfig) -> None:
    for name in ("state", "action"):
        stats = getattr(processing, f"{name}_stats")
        if stats is not None:
            check_stats(stats, f"{name}_stats", getattr(processing, f"{name}_norm"))
    actions = None if processing.action_stats is None else length(processing.action_stats)
    if actions is not None and actions < processing.robot_action_dim:
        raise CheckpointError(
            f"action_stats have length {actions}, robot_action_dim is {processing.robot_action_dim}"
        )


def _is_tuple_of(kind: type, value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, kind) for item in value)


def _require(name: str, processing: ProcessingConfig, holds: bool, expected: object) -> None:
    if not holds:
        raise CheckpointError(f"{name} must be {expected}, got {getattr(processing, name)!r}")
