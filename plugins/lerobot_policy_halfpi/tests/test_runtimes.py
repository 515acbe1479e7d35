"""The example, and LeRobot's own runtime for real-time chunking, with halfpi inside."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.rollout.inference.rtc import RTCInferenceEngine

from lerobot_policy_halfpi import HalfpiPolicy
from lerobot_policy_halfpi.__main__ import describe

EXAMPLE = Path(__file__).parents[3] / "examples" / "lerobot_rollout.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("lerobot_rollout", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RATE_HZ", 1000.0)
    return module


def test_the_example_with_the_plugin(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    target = describe("nano", tmp_path / "nano", num_steps=1, device="cpu")
    monkeypatch.setattr("sys.argv", ["rollout", str(target), "--steps", "20"])
    example.main()
    printed = capsys.readouterr().out
    assert "20 steps, last action [" in printed
    assert "step: median" in printed


def test_the_example_accelerates_pi05(
    example: Any,
    make_pi05: Callable[..., Any],
    pi05_processors: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    actions = []
    for plain in ([], ["--plain"]):
        policy = make_pi05()
        monkeypatch.setattr(example, "load", lambda _, policy=policy: (policy, *pi05_processors))
        monkeypatch.setattr("sys.argv", ["rollout", "anywhere", "--steps", "12", *plain])
        torch.manual_seed(0)
        example.main()
        assert ("sample_actions" in vars(policy.model)) == (not plain)
        line = capsys.readouterr().out.splitlines()[0]
        actions.append(json.loads(line.partition("last action ")[2]))
    np.testing.assert_allclose(actions[0], actions[1], atol=2e-3)


def test_lerobots_rtc_runtime(tmp_path: Path) -> None:
    target = describe("nano", tmp_path / "nano", num_steps=2, device="cpu")
    config = PreTrainedConfig.from_pretrained(target)
    policy = HalfpiPolicy.from_pretrained(target, config=config)
    policy.config.rtc_config = RTCConfig(execution_horizon=8)
    guided = []
    infer = policy._policy.infer

    def watched(observation: Any, **options: Any) -> Any:
        guided.append(options["guidance"])
        return infer(observation, **options)

    policy._policy.infer = watched
    preprocessor, postprocessor = make_pre_post_processors(config, pretrained_path=str(target))
    joints = ["x.pos", "y.pos", "z.pos", "gripper.pos"]
    camera = {"dtype": "image", "shape": (84, 84, 3), "names": ["height", "width", "channels"]}
    engine = RTCInferenceEngine(
        policy=policy,
        preprocessor=preprocessor,
        postprocessor=postprocessor,
        robot_wrapper=SimpleNamespace(robot_type="pretend"),
        rtc_config=policy.config.rtc_config,
        hw_features={
            "observation.state": {"dtype": "float32", "shape": (4,), "names": joints},
            "observation.images.scene": camera,
            "observation.images.wrist": camera,
        },
        task="open the drawer",
        fps=20.0,
        device="cpu",
        shutdown_event=threading.Event(),
    )
    frame = np.full((84, 84, 3), 127, np.uint8)
    engine.start()
    engine.resume()
    actions = []
    try:
        until = time.monotonic() + 60
        while len(actions) < 40 and time.monotonic() < until and not engine.failed:
            engine.notify_observation(
                {**dict.fromkeys(joints, 0.2), "scene": frame, "wrist": frame}
            )
            action = engine.get_action(None)
            if action is not None:
                actions.append(action)
            time.sleep(0.01)
    finally:
        engine.stop()
    assert len(actions) == 40
    assert actions[0].shape == (4,)
    assert guided[0] is None
    assert any(guidance is not None for guidance in guided)
