"""LeRobot's config and processors as halfpi's processing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfpi.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from halfpi.config import FeatureStats

EditJson = Callable[[Path, Callable[[dict[str, Any]], object]], None]
Change = Callable[[dict[str, Any]], object]

STATE_FILE = "policy_preprocessor_step_3_normalizer_processor.safetensors"
ACTION_FILE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


def opened(root: Path, **overrides: object) -> Checkpoint:
    return open_checkpoint(root, processing_overrides=overrides, vision_heads=4)


def step(pipeline: dict[str, Any], name: str) -> dict[str, Any]:
    (config,) = (entry["config"] for entry in pipeline["steps"] if entry["registry_name"] == name)
    assert isinstance(config, dict)
    return config


def test_golden_processing(lerobot: Path) -> None:
    checkpoint = opened(lerobot)
    processing = checkpoint.processing
    assert processing.cameras == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    assert (processing.image_size, processing.resize) == (28, "interpolate")
    assert (processing.norm_rule, processing.norm_eps) == ("lerobot", 1e-8)
    assert (processing.state_norm, processing.action_norm) == ("quantile", "quantile")
    assert (processing.max_prompt_tokens, processing.prompt_state_dim) == (24, None)
    assert (processing.robot, processing.robot_action_dim) == ("none", 7)
    assert processing.delta_mask is None
    assert processing.state_in_prompt
    saved = load_file(lerobot / ACTION_FILE)
    assert processing.action_stats == FeatureStats(
        q01=tuple(saved["action.q01"].tolist()), q99=tuple(saved["action.q99"].tolist())
    )
    assert processing.state_stats is not None
    assert processing.state_stats.q01 == tuple(saved["observation.state.q01"].tolist())
    assert checkpoint.config.horizon == 10
    assert checkpoint.config.max_prompt_tokens == 24


def test_periods_come_from_the_config(lerobot: Path, edit_json: EditJson) -> None:
    edit_json(lerobot / "config.json", lambda data: data.update(min_period=0.01, max_period=2))
    config = opened(lerobot).config
    assert (config.time_min_period, config.time_max_period) == (0.01, 2.0)


def test_cameras_keep_the_configs_order(lerobot: Path, edit_json: EditJson) -> None:
    def change(data: dict[str, Any]) -> None:
        visual = {"type": "VISUAL", "shape": [3, 480, 640]}
        data["input_features"] = {
            "observation.images.wrist": visual,
            "observation.state": {"type": "STATE", "shape": [8]},
            "observation.image": visual,
            "observation.images.empty_camera_0": visual,
        }
        data["empty_cameras"] = 2

    edit_json(lerobot / "config.json", change)
    assert opened(lerobot).processing.cameras == (
        "wrist",
        "image",
        "empty_camera_0",
        "empty_camera_1",
    )


def test_cameras_are_named_as_before_the_renaming(lerobot: Path, edit_json: EditJson) -> None:
    def change(data: dict[str, Any]) -> None:
        step(data, "rename_observations_processor")["rename_map"].update(
            {"observation.images.front": "observation.images.base_0_rgb"}
        )

    edit_json(lerobot / "policy_preprocessor.json", change)
    assert opened(lerobot).processing.cameras == ("front", "left_wrist_0_rgb", "right_wrist_0_rgb")


@pytest.mark.parametrize(
    ("theirs", "ours", "names"),
    [
        ("MEAN_STD", "mean_std", ("mean", "std")),
        ("MIN_MAX", "min_max", ("min", "max")),
        ("QUANTILE10", "quantile10", ("q10", "q90")),
        ("IDENTITY", "identity", ()),
    ],
)
def test_normalisation_modes(
    lerobot: Path, edit_json: EditJson, theirs: str, ours: str, names: tuple[str, ...]
) -> None:
    def change(data: dict[str, Any]) -> None:
        config = step(data, "normalizer_processor")
        config["norm_map"]["STATE"] = theirs

    edit_json(lerobot / "policy_preprocessor.json", change)
    values = {f"observation.state.{name}": torch.arange(8) / 7 + 1 for name in names}
    count = {"observation.state.count": torch.tensor([100])}
    save_file({**values, **count}, lerobot / STATE_FILE)
    processing = opened(lerobot).processing
    assert (processing.state_norm, processing.action_norm) == (ours, "quantile")
    expected = tuple((torch.arange(8) / 7 + 1).tolist())
    assert processing.state_stats == FeatureStats(**dict.fromkeys(names, expected))


def test_the_state_file_is_followed(lerobot: Path, edit_json: EditJson) -> None:
    (lerobot / STATE_FILE).rename(lerobot / "elsewhere.safetensors")

    def change(data: dict[str, Any]) -> None:
        for entry in data["steps"]:
            if entry["registry_name"] == "normalizer_processor":
                entry["state_file"] = "elsewhere.safetensors"

    with pytest.raises(CheckpointError, match=f"{STATE_FILE} cannot be read"):
        opened(lerobot)
    edit_json(lerobot / "policy_preprocessor.json", change)
    assert opened(lerobot).processing.state_stats is not None


def test_without_processors_there_are_no_statistics(lerobot: Path) -> None:
    (lerobot / "policy_preprocessor.json").unlink()
    (lerobot / "policy_postprocessor.json").unlink()
    processing = opened(lerobot).processing
    assert (processing.state_stats, processing.action_stats) == (None, None)
    assert (processing.state_norm, processing.norm_rule) == ("quantile", "lerobot")


@pytest.mark.parametrize(
    ("excluded", "names", "expected"),
    [
        (["gripper"], ["x", "y", "z", "a", "b", "c", "Left_Gripper.pos"], (*[True] * 6, False)),
        (["gripper"], ["gripper"], (False, *[True] * 6)),
        (["gripper"], None, (True,) * 7),
        ([], ["gripper"] * 7, (True,) * 7),
        (["", "A"], ["a", "ba", "c", "c", "c", "c", "c"], (False, False, *[True] * 5)),
    ],
)
def test_relative_actions(
    lerobot: Path,
    edit_json: EditJson,
    excluded: list[str],
    names: list[str] | None,
    expected: tuple[bool, ...],
) -> None:
    relative = {"enabled": True, "exclude_joints": excluded, "action_names": names}
    edit_json(
        lerobot / "policy_preprocessor.json",
        lambda data: step(data, "relative_actions_processor").update(relative),
    )
    assert opened(lerobot).processing.delta_mask is None
    edit_json(
        lerobot / "policy_postprocessor.json",
        lambda data: step(data, "absolute_actions_processor").update(enabled=True),
    )
    assert opened(lerobot).processing.delta_mask == expected


def without_relative_step(data: dict[str, Any]) -> None:
    data["steps"] = [
        entry for entry in data["steps"] if entry["registry_name"] != "relative_actions_processor"
    ]


def test_absolute_actions_need_their_partner(lerobot: Path, edit_json: EditJson) -> None:
    edit_json(lerobot / "policy_preprocessor.json", without_relative_step)
    edit_json(
        lerobot / "policy_postprocessor.json",
        lambda data: step(data, "absolute_actions_processor").update(enabled=True),
    )
    with pytest.raises(CheckpointError, match="enabled without a relative_actions_processor"):
        opened(lerobot)


def test_old_checkpoints_may_have_padded_their_state(lerobot: Path, edit_json: EditJson) -> None:
    edit_json(lerobot / "policy_preprocessor.json", without_relative_step)
    with pytest.warns(UserWarning, match='"prompt_state_dim": 32, "resize": "interpolate-0.4"'):
        processing = opened(lerobot).processing
    assert (processing.prompt_state_dim, processing.resize) == (None, "interpolate")
    assert opened(lerobot, prompt_state_dim=None).assumptions == ()
    processing = opened(lerobot, prompt_state_dim=32, resize="interpolate-0.4").processing
    assert (processing.prompt_state_dim, processing.resize) == (32, "interpolate-0.4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(type="pi0"), "is of policy type 'pi0', expected 'pi05'"),
        (lambda data: data.pop("type"), "is of policy type None"),
        (lambda data: data.update(use_peft=True), "has use_peft set"),
        (lambda data: data.update(use_visual_memory=True), "has use_visual_memory set"),
        (lambda data: data.pop("chunk_size"), "'chunk_size' must be of type int, got nothing"),
        (lambda data: data.update(chunk_size="10"), "'chunk_size' must be of type int, got '10'"),
        (lambda data: data.update(chunk_size=0), "horizon must be positive, got 0"),
        (lambda data: data.update(max_period=None), "'max_period' must be of type float"),
        (lambda data: data.update(image_resolution=[28, 32]), "two equal numbers, got .28, 32."),
        (lambda data: data.update(image_resolution=[224, 224]), "image_size=224 contradicts"),
        (lambda data: data.update(input_features=[]), "'input_features' must be of type dict"),
        (lambda data: data.update(input_features={"a": 3}), "has a malformed a: 3"),
        (lambda data: data.update(input_features={}), "cameras must be different names"),
        (lambda data: data.update(output_features={}), "must have an action of one axis"),
        (
            lambda data: data["output_features"]["action"].update(shape=[33]),
            "action_stats have length 7, the robot has 33",
        ),
    ],
)
def test_broken_config(lerobot: Path, edit_json: EditJson, change: Change, message: str) -> None:
    edit_json(lerobot / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        opened(lerobot)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("steps"), "policy_preprocessor.json: 'steps' must be of type list"),
        (lambda data: data["steps"].append({"config": {}}), "has a malformed step"),
        (
            lambda data: step(data, "normalizer_processor")["norm_map"].update(STATE="LOG"),
            "normalizer_processor has the unknown mode 'LOG' for STATE",
        ),
        (
            lambda data: step(data, "normalizer_processor")["norm_map"].update(STATE="MEAN_STD"),
            "state normalisation needs the statistic mean",
        ),
        (
            lambda data: step(data, "normalizer_processor").update(eps="x"),
            "'eps' must be of type f",
        ),
        (
            lambda data: step(data, "normalizer_processor").update(eps=0),
            r"processors have different eps: \[0\.0, 1e-08\]",
        ),
        (
            lambda data: step(data, "rename_observations_processor").update(rename_map=[]),
            "'rename_map' must be of type dict",
        ),
    ],
)
def test_broken_processors(
    lerobot: Path, edit_json: EditJson, change: Change, message: str
) -> None:
    edit_json(lerobot / "policy_preprocessor.json", change)
    with pytest.raises(CheckpointError, match=message):
        opened(lerobot)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("observation.state.q01", torch.zeros(7), "statistics of unequal lengths"),
        ("observation.state.q01", torch.full((8,), torch.nan), "observation.state.q01 is not fin"),
        ("observation.state.q99", torch.full((8,), torch.inf), "observation.state.q99 is not fin"),
    ],
)
def test_broken_statistics(lerobot: Path, name: str, value: torch.Tensor, message: str) -> None:
    save_file({**load_file(lerobot / STATE_FILE), name: value}, lerobot / STATE_FILE)
    with pytest.raises(CheckpointError, match=message):
        opened(lerobot)


def test_statistics_of_another_robot(lerobot: Path) -> None:
    stats = {
        f"action.{name}": torch.arange(9.0) + offset for name, offset in (("q01", 0), ("q99", 9))
    }
    save_file(stats, lerobot / ACTION_FILE)
    with pytest.raises(CheckpointError, match=r"action has statistics of length 9, expected \[7\]"):
        opened(lerobot)


def test_truncated_statistics(lerobot: Path) -> None:
    content = (lerobot / STATE_FILE).read_bytes()
    (lerobot / STATE_FILE).write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=f"{STATE_FILE} is truncated"):
        opened(lerobot)
