"""A policy of type "halfpi": observations in LeRobot's form, actions in the robot's units."""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_IMAGES, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor

from halfpi import Observation, load_policy
from halfpi.integrations.lerobot import lerobot_guidance
from halfpi.model import Guidance
from lerobot_policy_halfpi.configuration_halfpi import INFERENCE_ONLY, HalfpiConfig

Batch = dict[str, Any]


class HalfpiPolicy(PreTrainedPolicy):
    """π0.5 run by halfpi.

    Batches are as `make_halfpi_pre_post_processors` leaves them: `observation.images.<camera>` fp32
    (b, 3, h, w) in [0, 1], any size, absent cameras left out; `observation.state` fp32 (b, d) in
    the robot's units; `task`, b texts. Rows of a batch are run one after the other.
    """

    config_class = HalfpiConfig
    name = "halfpi"

    def __init__(self, config: HalfpiConfig, **_: object) -> None:
        """LeRobot also passes statistics of the dataset; the checkpoint's own are used.

        Raises ValueError for a checkpoint that is missing, cannot be used or does not fit `config`.
        """
        super().__init__(config)
        config.validate_features()
        self._policy = load_policy(
            config.checkpoint,
            device=config.device,
            precision=config.precision,
            backend=config.backend,
            num_steps=config.num_steps,
            tokenizer=config.tokenizer,
        )
        if self._policy.horizon != config.chunk_size:
            raise ValueError(
                f"chunk_size is {config.chunk_size}, but the checkpoint's is {self._policy.horizon}"
            )
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | None = None,
        **options: Any,
    ) -> Self:
        """The policy of a directory of type "halfpi", or of any checkpoint that halfpi opens.

        options: LeRobot's, for finding a configuration on the Hub.
        """
        if config is None and _is_checkpoint(Path(pretrained_name_or_path)):
            config = HalfpiConfig.of_checkpoint(pretrained_name_or_path)
        elif config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, **options)
        if not isinstance(config, HalfpiConfig):
            raise ValueError(f"the configuration must be of type 'halfpi', got {config.type!r}")
        return cls(config).eval()

    def supports_rtc(self) -> bool:
        """Guided real-time chunking, as `config.rtc_config` has it."""
        return True

    def reset(self) -> None:
        """Forget the actions that wait, and what was seen."""
        self._actions: deque[Tensor] = deque()
        self._policy.reset()

    @torch.no_grad()
    def select_action(self, batch: Batch, **options: Any) -> Tensor:
        """The next action, fp32 (b, action_dim). Raises ValueError when RTC is enabled."""
        if self.config.rtc_config is not None and self.config.rtc_config.enabled:
            raise ValueError("select_action does not do RTC: use predict_action_chunk")
        if not self._actions:
            chunk = self.predict_action_chunk(batch, **options)
            self._actions.extend(chunk[:, : self.config.n_action_steps].unbind(1))
        return self._actions.popleft()

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: Batch,
        *,
        noise: Tensor | None = None,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
    ) -> Tensor:
        """Actions fp32 (b, chunk_size, action_dim) in the robot's units.

        noise: fp32 (b, chunk_size, a), a the model's own action dimension. The rest is LeRobot's
        RTC: prev_chunk_left_over is (r, action_dim) or (b, r, action_dim) of earlier actions.

        Raises ValueError naming what is wrong with the batch or an argument.
        """
        if OBS_LANGUAGE_TOKENS in batch:
            raise ValueError(
                "the batch went through the processors of another policy type: "
                "take those of make_pre_post_processors(policy.config)"
            )
        state = batch[OBS_STATE]
        chunks = []
        for row in range(len(state)):
            observation = self._observation(batch, row)
            rest = prev_chunk_left_over
            guidance = self._guidance(
                rest if rest is None or rest.ndim == 2 else rest[row],
                observation,
                inference_delay,
                execution_horizon,
            )
            start = None if noise is None else noise[row].cpu().numpy()
            chunk = self._policy.infer(observation, noise=start, guidance=guidance)
            chunks.append(torch.from_numpy(chunk.actions))
        return torch.stack(chunks).to(state.device)

    def forward(self, batch: Batch) -> Any:
        """Raise NotImplementedError."""
        raise NotImplementedError(INFERENCE_ONLY)

    def get_optim_params(self) -> Any:
        """Raise NotImplementedError."""
        raise NotImplementedError(INFERENCE_ONLY)

    def _save_pretrained(self, save_directory: Path, **_: object) -> None:
        """The configuration; the weights stay in the checkpoint that it names."""
        self.config._save_pretrained(save_directory)

    def _observation(self, batch: Batch, row: int) -> Observation:
        prefix = f"{OBS_IMAGES}."
        images = {
            name.removeprefix(prefix): batch[name][row].cpu().numpy()
            for name in self.config.image_features
            if name in batch
        }
        return Observation(images, batch[OBS_STATE][row].cpu().numpy(), batch["task"][row])

    def _guidance(
        self,
        rest: Tensor | None,
        observation: Observation,
        delay: int | None,
        execution_horizon: int | None,
    ) -> Guidance | None:
        config = self.config.rtc_config
        if config is None or not config.enabled or rest is None:
            return None
        planned = _without_padding(rest.cpu().numpy())
        normalized = torch.from_numpy(self._policy.processor.normalized(planned, observation))
        shape = (self._policy.horizon, self._policy.engine.config.action_dim)
        return lerobot_guidance(config, normalized, delay, execution_horizon, shape)


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is a directory, or "nano", and not of LeRobot's type "halfpi"."""
    described = path / "config.json"
    if described.is_file():
        return json.loads(described.read_text()).get("type") != "halfpi"
    return path.is_dir() or str(path) == "nano"


def _without_padding(rest: np.ndarray) -> np.ndarray:
    """`rest` (r, d) up to its last row that is not zero.

    LeRobot's runtime pads what is left of a plan with zeros, and in the robot's units they are a
    place to go to.
    """
    rows = np.flatnonzero(rest.any(1))
    return rest[: rows[-1] + 1] if len(rows) else rest[:0]
