"""A robot of your own under halfpi's control loop, in plain Python.

    python examples/plain_robot.py [CHECKPOINT [RUN.jsonl [RUN.rrd]]]

`ToyRobot` stands where your driver goes: a hand that moves by what it is told, seen by two cameras
that render a dot. CHECKPOINT is "nano", the policy that ships with halfpi, unless you name another
for four-dimensional states and actions. RUN.jsonl is where the run goes, for `halfpi report`;
RUN.rrd is a recording for rerun (the extra `rerun`).
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfpi import Observation, load_policy
from halfpi.runtime import ControlLoop, RerunLog, TrainedRtc, save_run

RATE_HZ = 20.0
SIZE = 84


class ToyRobot:
    """A hand at (x, y, z) with a gripper, told displacements in centimetres and gripper effort."""

    def __init__(self, prompt: str) -> None:
        self.prompt = prompt
        self.reset()

    def reset(self) -> None:
        """Drive home. The loop calls it before the first tick."""
        self.state = np.array([0.0, 0.6, 0.2, 1.0], np.float32)

    def observe(self) -> Observation:
        """The newest frames that the camera threads have; do not wait for the next ones here."""
        images = {"scene": self._render(0, 1), "wrist": self._render(0, 2)}
        return Observation(images, self.state.copy(), self.prompt)

    def act(self, action: NDArray[np.float32]) -> None:
        """Start the motion and return; the loop comes back in 1 / RATE_HZ seconds."""
        self.state[:3] += 0.01 * action[:3]
        self.state[3] = np.clip(self.state[3] - 0.1 * action[3], 0, 1)

    def _render(self, across: int, down: int) -> NDArray[np.uint8]:
        frame = np.full((SIZE, SIZE, 3), 90, np.uint8)
        x, y = (int(np.clip(self.state[axis], -1, 1) * 40 + 42) for axis in (across, down))
        frame[max(0, y - 3) : y + 3, max(0, x - 3) : x + 3] = 255
        return frame


def stand_still(action: NDArray[np.float32]) -> NDArray[np.float32]:
    """What to send while no action is due: no displacement, and the gripper as it was."""
    return np.array([0, 0, 0, action[3]], np.float32)


def main(
    checkpoint: str = "nano", run: str = "", recording: str = "", seconds: float = 10.0
) -> None:
    """Run for a while and say how it went."""
    robot = ToyRobot("press the button from above")
    policy = load_policy(checkpoint)
    scheduler = TrainedRtc(threshold=10, max_delay=6)
    with RerunLog(Path(recording)) if recording else nullcontext() as log:
        loop = ControlLoop(policy, robot, RATE_HZ, scheduler, hold=stand_still, watcher=log)
        report = loop.run(max_ticks=int(seconds * RATE_HZ))
    if run:
        save_run(report, Path(run))
    print(json.dumps(report.summary(), indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:4])
