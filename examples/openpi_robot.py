"""A robot that is driven by openpi's own client; nothing of halfpi is imported.

In one environment, the server, with the policy that ships with halfpi:

    halfpi serve nano --port 8000

In another (openpi-client needs NumPy 1, and typing_extensions, which it does not say):

    pip install openpi-client 'numpy<2' typing_extensions
    python examples/openpi_robot.py --port 8000
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.runtime.agents.policy_agent import PolicyAgent
from openpi_client.runtime.environment import Environment
from openpi_client.runtime.runtime import Runtime
from openpi_client.runtime.subscriber import Subscriber
from openpi_client.websocket_client_policy import WebsocketClientPolicy

STEP_M = 0.01  # how far the hand moves at an action of 1


class PretendRobot(Environment):
    """A hand in an empty room, with Meta-World's observations and actions.

    State: the hand's x, y, z in metres and the gripper's opening. Actions: how the hand moves along
    x, y, z, and the gripper's effort; each within ±1.
    """

    def __init__(self, cameras: list[str]) -> None:
        self._cameras = cameras
        self._state = np.zeros(4, np.float32)

    def reset(self) -> None:
        self._state = np.array([0.0, 0.6, 0.2, 1.0], np.float32)

    def is_episode_complete(self) -> bool:
        return False  # the runtime counts the steps

    def get_observation(self) -> dict:
        room = np.full((84, 84, 3), 127, np.uint8)
        return {
            **{f"images/{camera}": room for camera in self._cameras},
            "state": self._state,
            "prompt": "open the drawer",
        }

    def apply_action(self, action: dict) -> None:
        move = action["actions"]
        self._state = self._state + np.append(move[:3] * STEP_M, 0).astype(np.float32)


class Report(Subscriber):
    """Prints what an episode came to."""

    def on_episode_start(self) -> None:
        self._began_s, self._steps = time.monotonic(), 0

    def on_step(self, _observation: dict, action: dict) -> None:
        self._steps += 1
        self._last = action["actions"]

    def on_episode_end(self) -> None:
        seconds = time.monotonic() - self._began_s
        print(f"{self._steps} steps in {seconds:.2f} s, last action {self._last.round(3).tolist()}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Drive a pretend robot with openpi's client.")
    parser.add_argument("--host", default="127.0.0.1", help="a name, or a wss:// address")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key")
    parser.add_argument("--episodes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="control steps of an episode")
    parser.add_argument("--execute", type=int, default=8, help="actions executed of each chunk")
    options = parser.parse_args()

    policy = WebsocketClientPolicy(options.host, options.port, options.api_key)
    cameras = policy.get_server_metadata()["halfpi"]["cameras"]
    Runtime(
        environment=PretendRobot(cameras),
        agent=PolicyAgent(ActionChunkBroker(policy, options.execute)),
        subscribers=[Report()],
        max_hz=80,
        num_episodes=options.episodes,
        max_episode_steps=options.steps,
    ).run()


if __name__ == "__main__":
    main()
