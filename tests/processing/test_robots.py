"""The dictionaries of openpi's and LeRobot's clients, and ALOHA's units."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from halfpi.processing.robots import ROBOTS

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


def image(level: int) -> Any:
    return np.full((4, 5, 3), level, np.uint8)


def test_libero() -> None:
    data = {
        "observation/image": image(1),
        "observation/wrist_image": image(2),
        "observation/state": np.arange(8.0),
        "prompt": np.asarray("do something"),
    }
    observation = ROBOTS["libero"].observation(data, CAMERAS)
    assert list(observation.images) == ["base_0_rgb", "left_wrist_0_rgb"]
    assert observation.images["left_wrist_0_rgb"].max() == 2
    assert observation.state.tolist() == list(range(8))
    assert observation.state.dtype == np.float32
    assert observation.prompt == "do something"


def test_cameras_count_by_place_not_by_name() -> None:
    data = {"observation/wrist_image": image(2), "observation/state": np.zeros(8)}
    observation = ROBOTS["libero"].observation(data, ("image", "image2"))
    assert list(observation.images) == ["image2"]


@pytest.mark.parametrize("gripper", [np.array([0.25]), np.array(0.25), 0.25])
def test_droid(gripper: Any) -> None:
    data = {
        "observation/exterior_image_1_left": image(1),
        "observation/exterior_image_2_left": image(9),
        "observation/wrist_image_left": image(2),
        "observation/joint_position": np.arange(7.0),
        "observation/gripper_position": gripper,
        "observation/cartesian_position": np.zeros(6),
        "prompt": b"pick up the caf\xc3\xa9 cup",
    }
    observation = ROBOTS["droid"].observation(data, CAMERAS)
    assert {name: pixels.max() for name, pixels in observation.images.items()} == {
        "base_0_rgb": 1,
        "left_wrist_0_rgb": 2,
    }
    assert observation.state.tolist() == [0, 1, 2, 3, 4, 5, 6, 0.25]
    assert observation.prompt == "pick up the café cup"


def test_aloha_with_a_lost_camera() -> None:
    images = {"cam_high": image(1), "cam_low": image(9), "cam_right_wrist": image(3)}
    data = {"images": images, "state": np.ones(14)}
    observation = ROBOTS["aloha"].observation(data, CAMERAS)
    assert {name: pixels.max() for name, pixels in observation.images.items()} == {
        "base_0_rgb": 1,
        "right_wrist_0_rgb": 3,
    }
    assert observation.prompt is None


def test_metaworld_has_the_cameras_of_its_model() -> None:
    data = {"images": {"corner": image(1)}, "state": np.zeros(4), "prompt": "open the door"}
    observation = ROBOTS["metaworld"].observation(data, ("corner", "gripper"))
    assert list(observation.images) == ["corner"]


@pytest.mark.parametrize("task", ["open it", ["open it"]])
def test_lerobot(task: Any) -> None:
    data = {
        "observation.images.top": torch.zeros(3, 4, 5),
        "observation.state": torch.arange(6.0),
        "task": task,
    }
    observation = ROBOTS["none"].observation(data, ("top", "wrist"))
    assert observation.images["top"].shape == (3, 4, 5)
    assert observation.state.tolist() == list(range(6))
    assert observation.prompt == "open it"


@pytest.mark.parametrize(
    ("robot", "key"),
    [
        ("libero", "observation/wrist_img"),
        ("aloha", "images/top"),
        ("metaworld", "images/top"),
        ("none", "observation.images.top"),
    ],
)
def test_an_unknown_camera_is_never_ignored(robot: Any, key: str) -> None:
    expected = ROBOTS[robot].image_prefix + (ROBOTS[robot].image_names or CAMERAS)[0]
    with pytest.raises(ValueError, match=f"unknown camera '{key}': expected {expected}"):
        ROBOTS[robot].observation({key: image(1)}, CAMERAS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": np.zeros((1, 4))}, r"'state' must be one vector, got shape \(1, 4\)"),
        ({"state": "home"}, "'state' must be numbers, got 'home'"),
        ({"prompt": b"\xff"}, "must be UTF-8"),
        ({"prompt": ["a", "b"]}, "must be one text"),
        ({"prompt": 7}, "must be one text, got 7"),
    ],
)
def test_malformed_dictionaries(changes: dict[str, Any], message: str) -> None:
    data = {"images": {}, "state": np.zeros(4), "prompt": "open"} | changes
    with pytest.raises(ValueError, match=message):
        ROBOTS["metaworld"].observation(data, CAMERAS)


def test_a_missing_state_is_named() -> None:
    data = {"prompt": "open", "observation/joint_position": np.zeros(7)}
    with pytest.raises(ValueError, match="no 'observation/gripper_position', got observation/joi"):
        ROBOTS["droid"].observation(data, CAMERAS)


def test_aloha_joints_turn() -> None:
    state = np.arange(1, 15, dtype=np.float32)
    signs = np.array([1, -1, -1, 1, 1, 1, 0, 1, -1, -1, 1, 1, 1, 0])  # 0: the grippers
    adapted = ROBOTS["aloha"].state_to_model(state)
    np.testing.assert_array_equal(adapted[signs != 0], (state * signs)[signs != 0])
    actions = ROBOTS["aloha"].actions_to_robot(np.stack([state, 2 * state]))
    np.testing.assert_array_equal(actions[1, signs != 0], (2 * state * signs)[signs != 0])
    assert state.tolist() == list(range(1, 15))  # the observation is left alone


@pytest.mark.parametrize("angle", [0.3, 0.5476, 1.0, 1.4])
def test_aloha_gripper_opening_becomes_the_angle_of_its_motor(angle: float) -> None:
    # The crank: a horn of 22 mm turns by `angle`, an arm of 36 mm pushes the finger.
    opening = 0.022 * math.sin(angle) + math.sqrt(0.036**2 - (0.022 * math.cos(angle)) ** 2)
    state = np.zeros(14)
    state[[6, 13]] = (opening - 0.01844) / (0.05800 - 0.01844)
    adapted = ROBOTS["aloha"].state_to_model(state)
    np.testing.assert_allclose(adapted[[6, 13]], (angle - 0.5476) / (1.6296 - 0.5476), atol=1e-9)


def test_aloha_gripper_beyond_the_crank_stays_finite() -> None:
    state = np.zeros(14)
    state[[6, 13]] = 3.0
    adapted = ROBOTS["aloha"].state_to_model(state)
    np.testing.assert_allclose(adapted[6], (math.pi / 2 - 0.5476) / (1.6296 - 0.5476))


def test_aloha_gripper_command() -> None:
    actions = np.zeros((3, 14))
    actions[:, 6] = [-0.6213 - 0.5476, 1.4910 - 0.5476, 0.0]
    commands = ROBOTS["aloha"].actions_to_robot(actions)
    np.testing.assert_allclose(commands[:, 6], [0, 1, (0.5476 + 0.6213) / 2.1123], atol=1e-12)
    np.testing.assert_allclose(commands[:, 13], (0.5476 + 0.6213) / 2.1123)


def test_metaworld_actions_are_clipped() -> None:
    actions = np.array([[-3.0, -1.0, 0.5, 1.5]])
    assert ROBOTS["metaworld"].actions_to_robot(actions).tolist() == [[-1, -1, 0.5, 1]]
