"""The configuration of a policy of type "halfpi"."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from halfpi.checkpoints import open_checkpoint
from halfpi.checkpoints.stats import length
from halfpi.config import ProcessingConfig
from halfpi.policy import checkpoint_path
from halfpi.processing import ROBOTS

INFERENCE_ONLY = "halfpi is for inference; train with LeRobot's policy type pi05"


@PreTrainedConfig.register_subclass("halfpi")
@dataclass
class HalfpiConfig(PreTrainedConfig):
    """What is run, and how; `of_checkpoint` fills in the features and the chunk's length.

    checkpoint: a directory of any format that halfpi opens, or "nano". precision, backend and
    tokenizer: as in `halfpi.load_policy`. num_steps: Euler steps of a chunk. n_action_steps: how
    many actions of a chunk `select_action` executes.
    """

    checkpoint: str = ""
    precision: str = "fp32"
    backend: str = "eager"
    num_steps: int = 10
    tokenizer: str | None = None
    chunk_size: int = 50
    n_action_steps: int = 50
    rtc_config: RTCConfig | None = None
    # halfpi normalises by the checkpoint's own statistics.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(
            ("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps must be from 1 to {self.chunk_size}, got {self.n_action_steps}"
            )

    @classmethod
    def of_checkpoint(cls, checkpoint: str | os.PathLike[str], **fields: Any) -> Self:
        """The configuration that runs `checkpoint`; `fields` win over what is filled in.

        Raises CheckpointError, a ValueError, for what is no π0.5.
        """
        opened = open_checkpoint(checkpoint_path(checkpoint))
        processing, size = opened.processing, opened.config.image_size
        filled = {
            "checkpoint": str(Path(opened.path).absolute()),
            "chunk_size": opened.config.horizon,
            "n_action_steps": opened.config.horizon,
            "input_features": {
                f"{OBS_IMAGES}.{camera}": PolicyFeature(FeatureType.VISUAL, (3, size, size))
                for camera in processing.cameras
            }
            | {OBS_STATE: PolicyFeature(FeatureType.STATE, (_state_dim(processing),))},
            "output_features": {
                ACTION: PolicyFeature(FeatureType.ACTION, (processing.robot_action_dim,))
            },
        }
        return cls(**{**filled, **fields})

    @property
    def observation_delta_indices(self) -> None:
        """One observation at a time."""
        return

    @property
    def action_delta_indices(self) -> list[int]:
        """A whole chunk."""
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        """No rewards."""
        return

    def validate_features(self) -> None:
        """Raise ValueError without an image, a state or an action."""
        features = {**(self.input_features or {}), **(self.output_features or {})}
        found = {feature.type for feature in features.values()}
        for kind in (FeatureType.VISUAL, FeatureType.STATE, FeatureType.ACTION):
            if kind not in found:
                raise ValueError(f"the policy has no feature of type {kind.value}")

    def get_optimizer_preset(self) -> Any:
        """Raise NotImplementedError."""
        raise NotImplementedError(INFERENCE_ONLY)

    def get_scheduler_preset(self) -> Any:
        """Raise NotImplementedError."""
        raise NotImplementedError(INFERENCE_ONLY)


def _state_dim(processing: ProcessingConfig) -> int:
    """What the robot or the statistics say; without either, as many as there are actions."""
    known = ROBOTS[processing.robot].state_dim or length(processing.state_stats)
    return known or processing.robot_action_dim
