"""A policy in the shape that openpi's clients know: a dictionary in, a dictionary out.

It is also what answers in `halfpi serve`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfpi.policy import Policy
from halfpi.types import ActionChunk, Observation, StageTimes

EXTRAS = "halfpi"
"""The one key of a request that only halfpi knows; its value is a dictionary, see `_Extras`."""

# Far above any robot, far below what makes tokenising take seconds.
_MAX_PROMPT_CHARACTERS = 10_000
_MAX_STATE = 1_000


@dataclass(frozen=True)
class Answer:
    """A reply as openpi's clients read it, and what it cost.

    infer_ms: the whole call; the sum of `times` and the way from and to dictionaries.
    """

    reply: dict[str, Any]
    times: StageTimes
    infer_ms: float


@dataclass(frozen=True)
class _Extras:
    """What a request may ask beyond openpi's protocol.

    steps: Euler steps. noise: float (h, a). given: float (d, a), the first actions of the chunk,
    normalised, if they are decided already (real-time chunking). normalized: whether the reply
    also holds the chunk as the model gave it, float32 (h, a), to be fed back as `given`.
    """

    steps: int | None = None
    noise: NDArray[np.float32] | None = None
    given: NDArray[np.float32] | None = None
    normalized: bool = False


class OpenpiPolicy:
    """openpi's BasePolicy around `policy`; what it raises is ValueError where the caller is wrong.

    It goes wherever openpi's own goes: into an ActionChunkBroker, or into openpi's websocket
    server, together with its `metadata`.

    metadata: added to what `metadata` tells clients. max_steps: what a request may ask for.
    """

    def __init__(
        self, policy: Policy, *, metadata: Mapping[str, Any] | None = None, max_steps: int = 100
    ) -> None:
        self._policy = policy
        self._metadata = dict(metadata or {})
        self._max_steps = max_steps

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client is told when it connects: under the key of the extras, their shapes."""
        config, processing = self._policy.engine.config, self._policy.processor.config
        return self._metadata | {
            EXTRAS: {
                "horizon": config.horizon,
                "action_dim": config.action_dim,
                "robot_action_dim": processing.robot_action_dim,
                "robot": processing.robot,
                "cameras": list(processing.cameras),
                "steps": self._policy.num_steps,
            }
        }

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """{"actions": float32 (h, robot_action_dim), "policy_timing": {"infer_ms"}}.

        obs: the dictionary of the robot's client; keys are in `halfpi.processing.robots`. It may
        hold `EXTRAS`. Raises ValueError that names what is wrong with it.
        """
        return self.answer(obs).reply

    def answer(self, obs: Mapping[str, Any]) -> Answer:
        """`infer`, and what it cost."""
        began = time.perf_counter()
        extras = _extras(obs.get(EXTRAS, {}), self._max_steps)
        observation = self._policy.processor.observation_from_dict(
            {key: value for key, value in obs.items() if key != EXTRAS}
        )
        _check_size(observation)
        chunk = self._policy.infer(
            observation, noise=extras.noise, given=extras.given, num_steps=extras.steps
        )
        reply = _reply(chunk, extras.normalized)
        return Answer(reply, chunk.times, (time.perf_counter() - began) * 1000)

    def reset(self) -> None:
        """Nothing: no call depends on the one before."""


def _reply(chunk: ActionChunk, normalized: bool) -> dict[str, Any]:
    """ActionChunkBroker slices every array along its first axis, so all of them are (h, ·)."""
    arrays = {"actions": chunk.actions}
    if normalized:
        arrays["normalized"] = chunk.normalized
    times = chunk.times
    model_ms = times.vision_ms + times.prefill_ms + times.denoise_ms
    return {**arrays, "policy_timing": {"infer_ms": model_ms}}


def _extras(data: object, max_steps: int) -> _Extras:
    if not isinstance(data, Mapping):
        raise ValueError(f"{EXTRAS!r} must be a dictionary, got {type(data).__name__}")
    known = _Extras.__dataclass_fields__
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"{EXTRAS!r} has no {', '.join(unknown)}: expected {', '.join(known)}")
    extras = _Extras(**data)
    for name in ("noise", "given"):
        value = getattr(extras, name)
        if value is not None and not (isinstance(value, np.ndarray) and value.dtype.kind == "f"):
            raise ValueError(f"{name!r} must be a float array, got {_kind(value)}")
    if not isinstance(extras.normalized, bool):
        raise ValueError(f"'normalized' must be true or false, got {_kind(extras.normalized)}")
    if extras.steps is not None and not (
        type(extras.steps) is int and 1 <= extras.steps <= max_steps
    ):
        raise ValueError(f"'steps' must be an int from 1 to {max_steps}, got {extras.steps!r}")
    return extras


def _kind(value: object) -> str:
    return f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__


def _check_size(observation: Observation) -> None:
    characters = len(observation.prompt or "")
    if characters > _MAX_PROMPT_CHARACTERS:
        raise ValueError(
            f"the prompt must have at most {_MAX_PROMPT_CHARACTERS} characters, got {characters}"
        )
    if len(observation.state) > _MAX_STATE:
        raise ValueError(
            f"the state must have at most {_MAX_STATE} values, got {len(observation.state)}"
        )
