"""Robots: the keys of their observation dictionaries, and their units against the model's.

The dictionaries are openpi's (policies/libero_policy.py, droid_policy.py, aloha_policy.py) and
LeRobot's, so a client written for either works unchanged. A camera counts by its place among the
model's cameras, not by its name: a robot's first image is the model's first camera. A camera that
is left out is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfpi.config import RobotName
from halfpi.processing.normalize import Floats
from halfpi.types import Observation


def _unchanged(values: Floats) -> Floats:
    return values


@dataclass(frozen=True)
class Robot:
    """One robot's dictionary and units.

    Keys are flat: `a/b` is also `b` in the dictionary `a`. The prompt's is "prompt", or LeRobot's
    "task".

    image_prefix: an image's key is this and its name.
    image_names: in the order of the model's cameras; None takes the names of those.
    unused_images: names that clients send and the model does not see.
    state_keys: the parts of the state, in order.
    state_dim, action_dim: what the robot has; None where any number will do.
    state_to_model: state (state_dim,) in the robot's units → the model's.
    actions_to_robot: actions (h, action_dim) in the model's units → the robot's, ready to execute.
    actions_to_model: the way back.
    """

    image_prefix: str
    state_keys: tuple[str, ...]
    image_names: tuple[str, ...] | None = None
    unused_images: tuple[str, ...] = ()
    state_dim: int | None = None
    action_dim: int | None = None
    state_to_model: Callable[[Floats], Floats] = _unchanged
    actions_to_robot: Callable[[Floats], Floats] = _unchanged
    actions_to_model: Callable[[Floats], Floats] = _unchanged

    def observation(self, data: Mapping[str, Any], cameras: tuple[str, ...]) -> Observation:
        """`data` as an `Observation` of the model's `cameras`; images stay as they came.

        Raises ValueError on a missing state, an image of an unknown name, or a prompt that is no
        text.
        """
        flat = _flatten(data)
        return Observation(
            images=self._images(flat, cameras),
            state=self._state(flat),
            prompt=_text(flat.get("prompt", flat.get("task"))),
        )

    def _images(self, flat: Mapping[str, Any], cameras: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        names = cameras if self.image_names is None else self.image_names
        # A robot may have fewer cameras than the model, never more.
        by_key = dict(zip((self.image_prefix + name for name in names), cameras, strict=False))
        unused = {self.image_prefix + name for name in self.unused_images}
        images = {}
        for key, value in flat.items():
            if key in by_key:
                images[by_key[key]] = np.asarray(value)
            elif key.startswith(self.image_prefix) and np.ndim(value) == 3 and key not in unused:
                raise ValueError(f"unknown camera {key!r}: expected {', '.join(by_key)}")
        return images

    def _state(self, flat: Mapping[str, Any]) -> NDArray[np.float32]:
        parts = []
        for key in self.state_keys:
            if key not in flat:
                raise ValueError(f"the observation has no {key!r}, got {', '.join(sorted(flat))}")
            try:
                part = np.asarray(flat[key], dtype=np.float32)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{key!r} must be numbers, got {flat[key]!r}") from error
            if part.ndim > 1:
                raise ValueError(f"{key!r} must be one vector, got shape {part.shape}")
            parts.append(np.atleast_1d(part))
        return np.concatenate(parts)


def _flatten(data: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{inner}": item for inner, item in value.items()})
        else:
            flat[key] = value
    return flat


def _text(value: object) -> str | None:
    """The prompt as text: openpi sends a str, a 0-d array or bytes, LeRobot also a list of one."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt must be UTF-8, got {value!r}") from error
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"the prompt must be one text, got {value!r}")


# ALOHA (openpi aloha_policy.py): two arms of six joints and a gripper. The model was trained with
# three joints of each arm turning the other way, and with the gripper as the motor's angle where
# ALOHA has its linear opening.
_ALOHA_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2)
_ALOHA_GRIPPERS = [6, 13]
_GRIPPER_OPENING_M = (0.01844, 0.05800)  # ALOHA's 0 and 1
_GRIPPER_JOINT_RAD = (-0.6213, 1.4910)  # ALOHA's 0 and 1, as its commands have them
_GRIPPER_MODEL_RAD = (0.5476, 1.6296)  # the model's 0 and 1
_HORN_RADIUS_M, _ARM_LENGTH_M = 0.022, 0.036  # of the crank that turns angle into opening


def _aloha_state_to_model(state: Floats) -> Floats:
    adapted: Floats = state * _ALOHA_SIGNS
    closed, opened = _GRIPPER_OPENING_M
    opening = closed + adapted[_ALOHA_GRIPPERS] * (opened - closed)
    # Law of cosines in the triangle of horn, arm and opening.
    sine = (_HORN_RADIUS_M**2 + opening**2 - _ARM_LENGTH_M**2) / (2 * _HORN_RADIUS_M * opening)
    low, high = _GRIPPER_MODEL_RAD
    adapted[_ALOHA_GRIPPERS] = (np.arcsin(np.clip(sine, -1, 1)) - low) / (high - low)
    return adapted


def _aloha_actions_to_robot(actions: Floats) -> Floats:
    adapted: Floats = actions * _ALOHA_SIGNS
    # Predicted grippers are radians above the model's 0, not fractions of its range.
    angle = adapted[:, _ALOHA_GRIPPERS] + _GRIPPER_MODEL_RAD[0]
    closed, opened = _GRIPPER_JOINT_RAD
    adapted[:, _ALOHA_GRIPPERS] = (angle - closed) / (opened - closed)
    return adapted


def _aloha_actions_to_model(actions: Floats) -> Floats:
    adapted: Floats = actions.copy()
    closed, opened = _GRIPPER_JOINT_RAD
    angle = closed + adapted[:, _ALOHA_GRIPPERS] * (opened - closed)
    adapted[:, _ALOHA_GRIPPERS] = angle - _GRIPPER_MODEL_RAD[0]
    adapted *= _ALOHA_SIGNS
    return adapted


def _clip_to_unit(actions: Floats) -> Floats:
    return np.clip(actions, -1, 1)


ROBOTS: Mapping[RobotName, Robot] = {
    # LeRobot's keys, units as the model's.
    "none": Robot(image_prefix="observation.images.", state_keys=("observation.state",)),
    "libero": Robot(
        image_prefix="observation/",
        image_names=("image", "wrist_image"),
        state_keys=("observation/state",),
        state_dim=8,
        action_dim=7,
    ),
    # Actions are joint velocities and the gripper's position.
    "droid": Robot(
        image_prefix="observation/",
        image_names=("exterior_image_1_left", "wrist_image_left"),
        unused_images=("exterior_image_2_left",),
        state_keys=("observation/joint_position", "observation/gripper_position"),
        state_dim=8,
        action_dim=8,
    ),
    "aloha": Robot(
        image_prefix="images/",
        image_names=("cam_high", "cam_left_wrist", "cam_right_wrist"),
        unused_images=("cam_low",),
        state_keys=("state",),
        state_dim=14,
        action_dim=14,
        state_to_model=_aloha_state_to_model,
        actions_to_robot=_aloha_actions_to_robot,
        actions_to_model=_aloha_actions_to_model,
    ),
    # State: the hand's x, y, z in metres and the gripper's opening. Actions: how the hand moves in
    # x, y, z and the gripper's effort, each of which the simulator takes within ±1.
    "metaworld": Robot(
        image_prefix="images/",
        state_keys=("state",),
        state_dim=4,
        action_dim=4,
        actions_to_robot=_clip_to_unit,
    ),
}
