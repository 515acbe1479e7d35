"""A robot under LeRobot's policies, processors and queues, with halfpi doing the inference.

    python examples/lerobot_rollout.py POLICY [--task TASK] [--steps N] [--plain]

POLICY is what LeRobot's --policy.path takes: a checkpoint of type "pi05", which is accelerated in
place, or a directory that `python -m lerobot_policy_halfpi` wrote. `PretendRobot` stands where your
driver goes. Needs lerobot[pi] 0.6.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.utils.import_utils import register_third_party_plugins

import halfpi

RATE_HZ = 20.0


class PretendRobot:
    """Sees grey rooms by the policy's cameras; its joints go where they are told."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._cameras = {name: feature.shape for name, feature in config.image_features.items()}
        self._joints = np.zeros(config.robot_state_feature.shape, np.float32)

    def observe(self) -> dict[str, np.ndarray]:
        """LeRobot's frame: images uint8 (height, width, 3), and the state."""
        images = {
            name: np.full((height, width, 3), 127, np.uint8)
            for name, (_, height, width) in self._cameras.items()
        }
        return {**images, "observation.state": self._joints.copy()}

    def act(self, action: np.ndarray) -> None:
        """Start the motion and return."""
        self._joints[: len(action)] = action[: len(self._joints)]


def load(path: str) -> tuple:
    """Policy, preprocessor and postprocessor, as LeRobot's own programs load them."""
    register_third_party_plugins()
    config = PreTrainedConfig.from_pretrained(path)
    policy = get_policy_class(config.type).from_pretrained(path, config=config).eval()
    on_device = {"device_processor": {"device": config.device}}
    return policy, *make_pre_post_processors(
        config, pretrained_path=path, preprocessor_overrides=on_device
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Drive a pretend robot with a LeRobot policy.")
    parser.add_argument("policy", help="a directory in LeRobot's layout")
    parser.add_argument("--task", default="pick up the block")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--plain", action="store_true", help="LeRobot's own sampler, to compare")
    options = parser.parse_args()

    policy, preprocess, postprocess = load(options.policy)
    if policy.config.type == "pi05" and not options.plain:
        halfpi.accelerate(policy)
    robot, device = PretendRobot(policy.config), torch.device(policy.config.device)
    took_ms = []
    for _ in range(options.steps):
        began = time.monotonic()
        with torch.inference_mode():
            frame = prepare_observation_for_inference(robot.observe(), device, options.task)
            action = postprocess(policy.select_action(preprocess(frame)))[0].cpu().numpy()
        robot.act(action)
        took_ms.append((time.monotonic() - began) * 1000)
        time.sleep(max(0.0, 1 / RATE_HZ - took_ms[-1] / 1000))
    print(f"{options.steps} steps, last action {action.round(3).tolist()}")
    print(f"step: median {np.median(took_ms):.1f} ms, longest {max(took_ms):.1f} ms")


if __name__ == "__main__":
    main()
