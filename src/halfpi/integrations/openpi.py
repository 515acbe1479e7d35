"""A policy in the shape that openpi's clients know: a dictionary in, a dictionary out.

It is also what answers in `halfpi serve`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfpi.batching import Call, can_batch, infer_many
from halfpi.policy import Policy
from halfpi.runtime.reuse import ReuseReport, remembering
from halfpi.serving.extras import EXTRAS, Extras, extras_of
from halfpi.types import ActionChunk, Observation

# Far above any robot, far below what makes tokenising take seconds.
_MAX_PROMPT_CHARACTERS = 10_000
_MAX_STATE = 1_000


@dataclass(frozen=True)
class Answer:
    """A reply as openpi's clients read it, and what it cost.

    observation, chunk: what the reply was made of. infer_ms: the whole call; the sum of the chunk's
    times and the way from and to dictionaries, and of all that was computed in the same pass.
    """

    reply: dict[str, Any]
    observation: Observation
    chunk: ActionChunk
    infer_ms: float


class OpenpiPolicy:
    """openpi's BasePolicy around `policy`; what it raises is ValueError where the caller is wrong.

    It goes wherever openpi's own goes: into an ActionChunkBroker, or into openpi's websocket
    server, together with its `metadata`.

    metadata: added to what `metadata` tells clients. max_steps: what a request may ask for.
    Tokens of recent prompts are remembered, which changes no action.
    """

    def __init__(
        self, policy: Policy, *, metadata: Mapping[str, Any] | None = None, max_steps: int = 100
    ) -> None:
        self._prompts, self._counted = ReuseReport(), (0, 0)
        self._policy = copy.copy(policy)
        self._policy.processor = remembering(policy.processor, self._prompts)
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

    @property
    def can_batch(self) -> bool:
        """Whether `answer_many` computes several requests in one pass."""
        return can_batch(self._policy)

    def infer(self, obs: Mapping[str, Any]) -> dict[str, Any]:
        """{"actions": float32 (h, robot_action_dim), "policy_timing": {"infer_ms"}}.

        obs: the dictionary of the robot's client; keys are in `halfpi.processing.robots`. It may
        hold `EXTRAS`. Raises ValueError that names what is wrong with it.
        """
        return self.answer(obs).reply

    def answer(self, obs: Mapping[str, Any]) -> Answer:
        """`infer`, and what it cost."""
        began = time.perf_counter()
        call, extras = self._call(obs)
        chunk = self._policy.infer(
            call.observation,
            noise=call.noise,
            given=call.given,
            guidance=call.guidance,
            num_steps=call.num_steps,
        )
        return _answer(call.observation, chunk, extras, began)

    def answer_many(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer | Exception]:
        """What `answer` gives or raises for each of `requests`, computed together if possible.

        If what is computed together fails, each is tried alone, so that one cannot harm the others.
        """
        if len(requests) > 1 and self.can_batch:
            try:
                return self._answer_together(requests)
            except Exception:  # noqa: BLE001 (it is raised again for the one that causes it)
                pass
        return [self._outcome(request) for request in requests]

    def lookups(self) -> tuple[int, int]:
        """Prompts found among those remembered, and not found, since this was last asked."""
        counted, self._counted = self._counted, (self._prompts.hits, self._prompts.misses)
        return self._counted[0] - counted[0], self._counted[1] - counted[1]

    def reset(self) -> None:
        """Nothing: no call depends on the one before."""

    def _answer_together(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer | Exception]:
        began = time.perf_counter()
        outcomes: dict[int, Answer | Exception] = {}
        calls: dict[int, tuple[Call, Extras]] = {}
        for index, request in enumerate(requests):
            try:
                calls[index] = self._call(request)
            except ValueError as error:
                outcomes[index] = error
        results = infer_many(self._policy, [call for call, _ in calls.values()])
        for (index, (call, extras)), result in zip(calls.items(), results, strict=True):
            outcomes[index] = (
                result
                if isinstance(result, ValueError)
                else _answer(call.observation, result, extras, began)
            )
        return [outcomes[index] for index in range(len(requests))]

    def _outcome(self, request: Mapping[str, Any]) -> Answer | Exception:
        try:
            return self.answer(request)
        except Exception as error:  # noqa: BLE001 (whoever asked is told)
            return error

    def _call(self, obs: Mapping[str, Any]) -> tuple[Call, Extras]:
        extras = extras_of(obs.get(EXTRAS, {}), self._max_steps)
        observation = self._policy.processor.observation_from_dict(
            {key: value for key, value in obs.items() if key != EXTRAS}
        )
        _check_size(observation)
        config = self._policy.engine.config
        guidance = extras.guidance(config.horizon, config.action_dim)
        return Call(observation, extras.noise, extras.given, guidance, extras.steps), extras


def _answer(observation: Observation, chunk: ActionChunk, extras: Extras, began: float) -> Answer:
    """ActionChunkBroker slices every array along its first axis, so all of them are (h, ·)."""
    arrays = {"actions": chunk.actions}
    if extras.normalized:
        arrays["normalized"] = chunk.normalized
    times = chunk.times
    model_ms = times.vision_ms + times.prefill_ms + times.denoise_ms
    reply = {**arrays, "policy_timing": {"infer_ms": model_ms}}
    return Answer(reply, observation, chunk, (time.perf_counter() - began) * 1000)


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
