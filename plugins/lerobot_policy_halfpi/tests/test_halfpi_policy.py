"""The policy type "halfpi" in the real LeRobot, against LeRobot's own "pi05"."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.rollout.inference.rtc import supports_rtc_inference

from lerobot_policy_halfpi import HalfpiConfig, HalfpiPolicy
from lerobot_policy_halfpi.__main__ import describe

NOISE = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def described(golden_checkpoint: Path, tokenizer_file: Path, tmp_path: Path) -> Path:
    """What is handed to --policy.path."""
    return describe(
        golden_checkpoint, tmp_path / "described", tokenizer=str(tokenizer_file), device="cpu"
    )


@pytest.fixture
def policy(described: Path) -> HalfpiPolicy:
    return HalfpiPolicy.from_pretrained(described)


def batch_of(path: Path, observation: dict[str, Any]) -> dict[str, Any]:
    """The batch as LeRobot's programs make it."""
    preprocessor, _ = make_pre_post_processors(
        PreTrainedConfig.from_pretrained(path),
        pretrained_path=str(path),
        preprocessor_overrides={
            "device_processor": {"device": "cpu"},
            "rename_observations_processor": {"rename_map": {}},
        },
    )
    return preprocessor(observation)


def test_lerobot_finds_the_plugin(golden_checkpoint: Path) -> None:
    code = (
        "from lerobot.utils.import_utils import register_third_party_plugins as register;"
        "from lerobot.configs import PreTrainedConfig;"
        "assert 'halfpi' not in PreTrainedConfig.get_known_choices();"
        "register(); print('halfpi' in PreTrainedConfig.get_known_choices())"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "True\n"
    assert get_policy_class("halfpi") is HalfpiPolicy


def test_actions_are_those_of_lerobots_pi05(
    described: Path,
    make_pi05: Callable[..., Any],
    pi05_processors: tuple[Any, Any],
    observation: dict[str, Any],
) -> None:
    theirs, (pre, post) = make_pi05(), pi05_processors
    expected = post(theirs.predict_action_chunk(pre(dict(observation)), noise=NOISE))
    config = PreTrainedConfig.from_pretrained(described)
    ours = get_policy_class(config.type).from_pretrained(described, config=config)
    batch = batch_of(described, observation)
    actual = ours.predict_action_chunk(batch, noise=NOISE)
    assert actual.shape == (1, 10, 7)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    ours.reset()
    assert ours.select_action(batch).shape == (1, 7)


@pytest.fixture
def relative(golden_checkpoint: Path, tmp_path: Path) -> Path:
    """The golden checkpoint as if its actions were relative to the state, but for the gripper's."""
    root = Path(shutil.copytree(golden_checkpoint, tmp_path / "relative"))
    options = {
        "relative_actions_processor": {
            "enabled": True,
            "action_names": [*(f"joint_{index}" for index in range(6)), "gripper"],
        },
        "absolute_actions_processor": {"enabled": True},
    }
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        saved = json.loads((root / name).read_text())
        for step in saved["steps"]:
            step["config"].update(options.get(step["registry_name"], {}))
        (root / name).write_text(json.dumps(saved))
    return root


def test_relative_actions_come_out_absolute(
    relative: Path,
    tokenizer_file: Path,
    make_pi05: Callable[..., Any],
    load_pi05_processors: Callable[[Path], tuple[Any, Any]],
    observation: dict[str, Any],
    tmp_path: Path,
) -> None:
    pre, post = load_pi05_processors(relative)
    expected = post(make_pi05().predict_action_chunk(pre(dict(observation)), noise=NOISE))
    target = describe(relative, tmp_path / "target", tokenizer=str(tokenizer_file), device="cpu")
    batch = batch_of(target, observation)
    ours = HalfpiPolicy.from_pretrained(target)
    actual = ours.predict_action_chunk(batch, noise=NOISE)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    ours.config.rtc_config = RTCConfig(execution_horizon=10)
    on_plan = {"inference_delay": 10, "prev_chunk_left_over": actual[0]}
    again = ours.predict_action_chunk(batch, noise=-NOISE, **on_plan)
    free = ours.predict_action_chunk(batch, noise=-NOISE)
    assert (again - actual).abs().mean() < 0.5 * (free - actual).abs().mean()


def test_guidance_in_the_robots_units(
    policy: HalfpiPolicy,
    described: Path,
    make_pi05: Callable[..., Any],
    pi05_processors: tuple[Any, Any],
    observation: dict[str, Any],
) -> None:
    theirs, (pre, post) = make_pi05(rtc_config=RTCConfig()), pi05_processors
    rest = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    options = {"noise": NOISE, "inference_delay": 2}
    expected = post(
        theirs.predict_action_chunk(pre(dict(observation)), **options, prev_chunk_left_over=rest)
    )
    policy.config.rtc_config = RTCConfig()
    assert supports_rtc_inference(policy)
    batch, planned = batch_of(described, observation), post(rest)
    actual = policy.predict_action_chunk(batch, **options, prev_chunk_left_over=planned)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)
    padded = torch.cat([planned, torch.zeros(4, 7)])
    again = policy.predict_action_chunk(batch, **options, prev_chunk_left_over=padded)
    assert torch.equal(again, actual)
    plain = policy.predict_action_chunk(batch, noise=NOISE)
    assert (actual - plain).abs().max() > 0.1
    with pytest.raises(ValueError, match="use predict_action_chunk"):
        policy.select_action(batch)


def test_rows_of_a_batch(
    policy: HalfpiPolicy, described: Path, observation: dict[str, Any]
) -> None:
    batch = batch_of(described, observation)
    twice = {
        name: torch.cat([value, value]) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    } | {"task": [*batch["task"], "do nothing"]}
    noise = NOISE.expand(2, -1, -1)
    chunks = policy.predict_action_chunk(twice, noise=noise)
    assert torch.equal(chunks[:1], policy.predict_action_chunk(batch, noise=NOISE))
    assert not torch.allclose(chunks[0], chunks[1], atol=1e-3)


def test_a_checkpoint_itself_will_do(observation: dict[str, Any]) -> None:
    nano = HalfpiPolicy.from_pretrained("nano")
    assert list(nano.config.image_features) == [
        "observation.images.scene",
        "observation.images.wrist",
    ]
    assert (nano.config.chunk_size, nano.config.output_features["action"].shape) == (16, (4,))
    image = observation["observation.images.base_0_rgb"][None]
    batch = {
        "observation.images.scene": image,
        "observation.images.wrist": image,
        "observation.state": torch.tensor([[0.0, 0.6, 0.2, 1.0]]),
        "task": ["open the drawer"],
    }
    actions = [nano.select_action(batch) for _ in range(3)]
    assert actions[0].shape == (1, 4)
    assert not torch.equal(actions[0], actions[1])


def test_saved_again(policy: HalfpiPolicy, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["config.json"]
    assert PreTrainedConfig.from_pretrained(tmp_path / "saved") == policy.config


def test_what_is_refused(
    policy: HalfpiPolicy,
    described: Path,
    observation: dict[str, Any],
    pi05_processors: tuple[Any, Any],
) -> None:
    with pytest.raises(NotImplementedError, match="halfpi is for inference; train with"):
        policy.forward({})
    with pytest.raises(NotImplementedError, match="for inference"):
        policy.get_optim_params()
    with pytest.raises(ValueError, match="processors of another policy type"):
        policy.predict_action_chunk(pi05_processors[0](dict(observation)))
    with pytest.raises(ValueError, match="n_action_steps must be from 1 to 50, got 51"):
        HalfpiConfig(n_action_steps=51)
    with pytest.raises(ValueError, match="no feature of type VISUAL"):
        HalfpiPolicy(HalfpiConfig(checkpoint="nano", device="cpu"))
    config = PreTrainedConfig.from_pretrained(described)
    config.chunk_size = 20
    with pytest.raises(ValueError, match="chunk_size is 20, but the checkpoint's is 10"):
        HalfpiPolicy(config)
    with pytest.raises(ValueError, match="exists already"):
        describe("nano", described)
    with pytest.raises(ValueError, match="must be of type 'halfpi', got 'pi05'"):
        HalfpiPolicy.from_pretrained(described, config=pi05_config())


def pi05_config() -> Any:
    return get_policy_class("pi05").config_class(device="cpu")
