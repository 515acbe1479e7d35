"""One Meta-World task as an environment: observe, act, reset, and ask its scripted expert."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfpi.sim.rendering import CAMERAS, SceneRenderer, choose_gl
from halfpi.sim.tasks import Task
from halfpi.types import Observation

ACTION_DIM = 4
STATE_DIM = 4  # hand x, y, z and the gripper's opening
STEP_SECONDS = 0.0125
MAX_STEPS = 300


class MetaWorldEnvironment:
    """A task of Meta-World v3; the seed of an episode decides where objects and goals are.

    Actions are float (4,): hand displacement per step (1 = 1 cm) and gripper effort, clipped to ±1.
    """

    def __init__(self, task: Task, image_size: int) -> None:
        choose_gl()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
            from metaworld.policies import ENV_POLICY_MAP

            self._env: Any = ALL_V3_ENVIRONMENTS[task.environment]()
        self.task = task
        # Without a task object from a benchmark, Meta-World draws positions from its own seeded
        # generator.
        self._env._set_task_called = True
        self._env._freeze_rand_vec = False
        self._env._partially_observable = False
        # The cached observation space still clips the goal to zero, and observations are clipped to
        # it.
        vars(self._env).pop("sawyer_observation_space", None)
        self._env.seeded_rand_vec = True
        self._env.max_path_length = np.iinfo(np.int64).max
        self._expert: Any = ENV_POLICY_MAP[task.environment]()  # type: ignore[abstract]
        self._renderer = SceneRenderer(self._env.model, image_size)
        self._full_state = np.zeros(0)

    @property
    def full_state(self) -> NDArray[np.float64]:
        """What the expert sees, float64 (39,): hand, gripper, objects, the frame before, goal."""
        return self._full_state

    def reset(self, seed: int) -> None:
        """Start the episode that `seed` determines."""
        self._env.seed(seed)
        self._full_state, _ = self._env.reset()

    def observe(self, prompt: str | None = None) -> Observation:
        """Render both cameras; the prompt defaults to the task's instruction."""
        images = {name: self._renderer.render(self._env.data, name) for name in CAMERAS}
        state = self._full_state[:STATE_DIM].astype(np.float32)
        return Observation(images, state, self.task.instruction if prompt is None else prompt)

    def act(self, action: NDArray[np.floating[Any]]) -> bool:
        """Execute one action of (4,); True when the task is solved at this step."""
        self._full_state, _, _, _, info = self._env.step(np.clip(action, -1.0, 1.0))
        return bool(info["success"])

    def expert_action(self) -> NDArray[np.float32]:
        """What the scripted expert does now, clipped to ±1."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces every clipped action
            # Some experts write into the array they are given.
            action = self._expert.get_action(self._full_state.copy())
        clipped: NDArray[np.float32] = np.clip(action, -1.0, 1.0).astype(np.float32)
        return clipped

    def expert_chunk(self, horizon: int) -> NDArray[np.float32]:
        """The expert's next actions (horizon, 4), played on a copy of the present state."""
        # The copy holds all that MuJoCo derives from the state, too: some of it lags a substep
        # behind, and what is derived anew would differ in the last bits.
        present = self._env.data, self._full_state, self._env._prev_obs.copy()
        self._env.data = copy.copy(self._env.data)
        chunk = np.empty((horizon, ACTION_DIM), np.float32)
        for step in range(horizon):
            chunk[step] = self.expert_action()
            self.act(chunk[step])
        self._env.data, self._full_state, self._env._prev_obs = present
        return chunk

    def close(self) -> None:
        """Free the renderer."""
        self._renderer.close()
        self._env.close()
