"""From an observation to the model's tensors, and from its output to robot actions.

In: robot units to model units → normalise → bins and tokens, the state unpadded. Out: normalised →
model units → absolute → robot units. The order is openpi's (policies/policy_config.py) and decides
what the model reads: bins are of the normalised state, and deltas are added to the state that is
not normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfpi.config import NormMode, NormRule, ProcessingConfig, ResizeRule, RobotName
from halfpi.processing.images import Pictures, camera_mask, pictures, prepare_images
from halfpi.processing.normalize import Floats, Normalizer
from halfpi.processing.prompt import clean_prompt, encode_prompt
from halfpi.processing.robots import ROBOTS, Robot
from halfpi.processing.tokenizer import Tokenizer
from halfpi.types import Observation


@dataclass(frozen=True)
class ModelInputs:
    """What the model reads, on the CPU.

    images: uint8 (1, n, h, w, 3) or float32 (1, n, 3, h, w), see `images.to_model`; or, for an
    engine that resizes, `Pictures`. image_mask: bool (1, n), False where a camera is absent.
    tokens: int64 (1, l). token_mask: bool (1, l), False where the prompt is padded.
    """

    images: Tensor | Pictures
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor

    @property
    def prepared(self) -> Tensor:
        """`images` of the model's size. Raises TypeError if they are `Pictures`."""
        if not isinstance(self.images, Tensor):
            raise TypeError("the images must be prepared: this engine does not resize")
        return self.images

    @property
    def places(self) -> list[int]:
        """Of the cameras that are there, in a batch of one."""
        if not isinstance(self.images, Tensor):
            return [place for place, picture in enumerate(self.images) if picture is not None]
        # As a list: operations of NumPy or torch on so little take several times as long.
        return [place for place, there in enumerate(self.image_mask.tolist()[0]) if there]


class DeferredInputs(ModelInputs):
    """`ModelInputs` of which only the images are there before something else is asked for.

    So they can be under way to the device while the host tokenises. Errors of the prompt are raised
    when it is read.
    """

    _read_mask: Callable[[], Tensor]
    _read_prompt: Callable[[], tuple[Tensor, Tensor]]

    def __init__(
        self,
        images: Tensor | Pictures,
        read_mask: Callable[[], Tensor],
        read_prompt: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        """read_mask, read_prompt: give `image_mask`, and `tokens` with `token_mask`."""
        vars(self).update(images=images, _read_mask=read_mask, _read_prompt=read_prompt)

    @property
    def image_mask(self) -> Tensor:
        """As in `ModelInputs`."""
        return self._read_mask()

    @cached_property
    def _prompt(self) -> tuple[Tensor, Tensor]:
        return self._read_prompt()

    @property
    def tokens(self) -> Tensor:
        """As in `ModelInputs`."""
        return self._prompt[0]

    @property
    def token_mask(self) -> Tensor:
        """As in `ModelInputs`."""
        return self._prompt[1]


class Processor:
    """Everything between a robot and the model, as `config` sets it; stateless.

    action_dim: of the model. `state_normalizer` and `action_normalizer` also serve training.
    Raises ValueError where `config` contradicts itself, its robot or the model.
    """

    def __init__(self, config: ProcessingConfig, action_dim: int, tokenizer: Tokenizer) -> None:
        self.config = config
        self.action_dim = action_dim
        self.tokenizer = tokenizer
        check_processing(config, action_dim)
        self._robot = ROBOTS[config.robot]
        self.state_normalizer, self.action_normalizer = _normalizers(config)

    def inputs(self, observation: Observation) -> ModelInputs:
        """The model's tensors. Images may also be float in [0, 1] or (3, height, width).

        Raises ValueError naming the camera, the state or the prompt that is at fault,
        PromptTooLongError when the prompt does not fit.
        """
        return ModelInputs(*self._prepared(observation), *self._prompt(observation))

    def deferred_inputs(self, observation: Observation) -> DeferredInputs:
        """As `inputs`, for an engine that begins with the images and resizes by the rule "pil"."""
        config = self.config
        came, cameras = observation.images, config.cameras
        images: Tensor | Pictures
        if config.resize == "pil":
            images = pictures(came, cameras, config.image_size)
        else:
            images, _ = self._prepared(observation)
        return DeferredInputs(
            images, lambda: camera_mask(came, cameras), lambda: self._prompt(observation)
        )

    def _prepared(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Images of the model's size, and their mask."""
        config = self.config
        return prepare_images(observation.images, config.cameras, config.image_size, config.resize)

    def _prompt(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Tokens and their mask."""
        config = self.config
        state = self.state_normalizer.normalize(self._model_state(observation))
        tokens, token_mask = encode_prompt(
            self._instruction(observation),
            _padded(state, config.prompt_state_dim) if config.state_in_prompt else None,
            self.tokenizer,
            config.max_prompt_tokens,
        )
        return torch.from_numpy(tokens)[None], torch.from_numpy(token_mask)[None]

    def outputs(
        self, normalized: NDArray[np.float32], observation: Observation
    ) -> NDArray[np.float32]:
        """Actions in the robot's units, ready to execute.

        normalized: float32 (h, a), as the model gave them for `observation`.
        Returns float32 (h, robot_action_dim). Raises ValueError on another shape and on values that
        are not finite, which no robot should be given.
        """
        if normalized.ndim != 2 or normalized.shape[1] != self.action_dim:
            raise ValueError(f"actions must be (h, {self.action_dim}), got {normalized.shape}")
        if not np.isfinite(normalized).all():
            raise ValueError("actions must be finite, got NaN or infinite values")
        actions = self.action_normalizer.unnormalize(normalized[:, : self.config.robot_action_dim])
        if self.config.delta_mask is not None:
            relative = np.flatnonzero(self.config.delta_mask)
            state = self._model_state(observation)
            if relative.size and relative[-1] >= len(state):
                raise ValueError(
                    f"delta_mask makes action {relative[-1]} relative to the state, "
                    f"which has {len(state)} values"
                )
            actions[:, relative] += state[relative]
        return self._robot.actions_to_robot(actions).astype(np.float32)

    def normalized(
        self, actions: NDArray[np.float32], observation: Observation
    ) -> NDArray[np.float32]:
        """The inverse of `outputs`, but for what that cuts off or clips.

        actions: float32 (r, robot_action_dim), planned in the robot's units.
        Returns float32 (r, robot_action_dim), as the model would give them for `observation`.
        Raises ValueError on another shape.
        """
        if actions.ndim != 2 or actions.shape[1] != self.config.robot_action_dim:
            expected = f"(r, {self.config.robot_action_dim})"
            raise ValueError(f"actions must be {expected}, got {actions.shape}")
        planned = self._robot.actions_to_model(actions.astype(np.float64))
        relative = np.flatnonzero(self.config.delta_mask or ())
        if relative.size:
            planned[:, relative] -= self._model_state(observation)[relative]
        return self.action_normalizer.normalize(planned).astype(np.float32)

    def rebase(
        self, normalized: NDArray[np.float32], was: Observation, now: Observation
    ) -> NDArray[np.float32]:
        """Actions `normalized` (r, a), planned at `was`, as a chunk for `now` would have them.

        Actions relative to the state (`delta_mask`) lead to the same place from another state; the
        rest is unchanged. LeRobot does it before real-time chunking (relative.py).
        """
        relative = np.flatnonzero(self.config.delta_mask or ())
        if not relative.size:
            return normalized
        shift = (self._model_state(was) - self._model_state(now))[relative]
        actions = self.action_normalizer.unnormalize(normalized[:, : self.config.robot_action_dim])
        actions[:, relative] += shift
        rebased = normalized.copy()
        rebased[:, relative] = self.action_normalizer.normalize(actions)[:, relative]
        return rebased

    def observation_from_dict(self, data: Mapping[str, Any]) -> Observation:
        """The dictionary of the robot's client as an `Observation`; keys are in `robots`.

        Raises ValueError on a missing state, an unknown camera or a prompt that is no text.
        """
        return self._robot.observation(data, self.config.cameras)

    def _model_state(self, observation: Observation) -> Floats:
        """The state in the model's units, not normalised."""
        state = np.asarray(observation.state)
        expected = "state_dim" if self._robot.state_dim is None else self._robot.state_dim
        if state.ndim != 1 or not len(state) or self._robot.state_dim not in (None, len(state)):
            raise ValueError(f"state must be ({expected},), got {state.shape}")
        if not np.issubdtype(state.dtype, np.floating):
            raise ValueError(f"state must be float, got {state.dtype}")
        if not np.isfinite(state).all():
            raise ValueError(f"state must be finite, got {state}")
        return self._robot.state_to_model(state)

    def _instruction(self, observation: Observation) -> str:
        for prompt in (observation.prompt, self.config.default_prompt):
            cleaned = clean_prompt(prompt or "")
            if cleaned:
                return cleaned
        raise ValueError(f"the prompt is empty, got {observation.prompt!r} and no default prompt")


def _padded(state: Floats, dim: int | None) -> Floats:
    """The normalised state with zeros up to `dim` values."""
    if dim is None:
        return state
    if len(state) > dim:
        raise ValueError(f"prompt_state_dim is {dim}, but the state has {len(state)} values")
    return np.pad(state, (0, dim - len(state)))


def check_processing(config: ProcessingConfig, action_dim: int) -> None:
    """Raise ValueError where `config` contradicts itself, its robot or a model of `action_dim`."""
    _check_choices(config)
    _check_dimensions(config, ROBOTS[config.robot], action_dim)
    _normalizers(config)


def _normalizers(config: ProcessingConfig) -> tuple[Normalizer, Normalizer]:
    """Of the state and of the actions."""
    rule, eps = config.norm_rule, config.norm_eps
    return (
        Normalizer("state", config.state_norm, rule, eps, config.state_stats),
        Normalizer("action", config.action_norm, rule, eps, config.action_stats),
    )


def _check_dimensions(config: ProcessingConfig, robot: Robot, action_dim: int) -> None:
    action_dims, delta_mask = config.robot_action_dim, config.delta_mask or ()
    if not 0 < action_dims <= action_dim:
        raise ValueError(f"robot_action_dim must be in [1, {action_dim}], got {action_dims}")
    if robot.action_dim not in (None, action_dims):
        raise ValueError(
            f"robot {config.robot} has {robot.action_dim} action dimensions, "
            f"but robot_action_dim is {action_dims}"
        )
    if len(delta_mask) > action_dims:
        raise ValueError(
            f"delta_mask has {len(delta_mask)} entries, but robot_action_dim is {action_dims}"
        )
    names = robot.image_names or ()
    if len(names) > len(config.cameras):
        raise ValueError(
            f"robot {config.robot} has cameras {', '.join(names)}, "
            f"but the model only {', '.join(config.cameras)}"
        )


def _check_choices(config: ProcessingConfig) -> None:
    """Types are not checked when a configuration is read from JSON."""
    choices = {
        "resize": ResizeRule,
        "norm_rule": NormRule,
        "state_norm": NormMode,
        "action_norm": NormMode,
        "robot": RobotName,
    }
    for name, choice in choices.items():
        value, allowed = getattr(config, name), get_args(choice)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if len(set(config.cameras)) != len(config.cameras) or not config.cameras:
        raise ValueError(f"cameras must be different names, got {config.cameras}")
