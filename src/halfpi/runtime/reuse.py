"""Reuse: not computing again what has hardly changed since the last call. Off unless asked for.

Three modes. A camera's image tokens serve again while its picture stays the same. A prefix serves
several calls, which then only denoise. The tokens of a prompt are looked up. The first two are
approximations: how far they can go before success drops must be measured, task by task.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from halfpi.model import Guidance
from halfpi.policy import Policy
from halfpi.processing.images import resize_with_pad
from halfpi.processing.pipeline import Processor
from halfpi.processing.tokenizer import Tokenizer
from halfpi.types import ActionChunk, Keep, Observation

# Pictures are compared at this size: small enough to cost little beside an encoder, large enough
# for a hand or an object to fill a pixel.
_PICTURE_SIZE = 16
_PROMPTS = 256
_RECENT = 50


@dataclass(frozen=True)
class ReuseConfig:
    """What to reuse.

    camera_change: encode a camera again only when some part of its picture, shrunk to 16 × 16, has
    changed by more than this fraction of full brightness since it was encoded; None always encodes.
    always_encode: cameras excepted from that. Name the wrist's, which sees what the hand does.
    max_age: calls in a row that may do without encoding a camera.
    prefix_calls: calls in a row that may share a prefix; 1 computes it for each. A chunk begins at
    the observation of its prefix, so this is for schedulers that execute a part of each. Calls that
    are told of the plan, by real-time chunking, always compute theirs.
    prompt_tokens: remember the tokens of recent prompts.

    Raises ValueError if a number is out of its range.
    """

    camera_change: float | None = None
    always_encode: tuple[str, ...] = ()
    max_age: int = 10
    prefix_calls: int = 1
    prompt_tokens: bool = False

    def __post_init__(self) -> None:
        if self.camera_change is not None and not 0 <= self.camera_change <= 1:
            raise ValueError(f"camera_change must be in [0, 1], got {self.camera_change}")
        for name in ("max_age", "prefix_calls"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class ReuseReport:
    """What one mode did.

    hits, misses: how often something was reused, or computed. age, max_age: how many calls ago the
    thing last used, and the oldest thing used, was computed.
    """

    def __init__(self) -> None:
        self.hits = self.misses = self.age = self.max_age = 0
        self._costs_ms: deque[float] = deque(maxlen=_RECENT)
        self._overhead_ms = 0.0

    @property
    def saved_ms(self) -> float:
        """What the hits would have cost at the median of recent misses, less what deciding cost."""
        miss_ms = float(np.median(self._costs_ms)) if self._costs_ms else 0.0
        return self.hits * miss_ms - self._overhead_ms

    def hit(self, age: int, overhead_ms: float = 0.0) -> None:
        """Count a reuse of something `age` calls old."""
        self.hits += 1
        self.age = age
        self.max_age = max(self.max_age, age)
        self._overhead_ms += overhead_ms

    def miss(self, cost_ms: float, overhead_ms: float = 0.0) -> None:
        """Count a computation."""
        self.misses += 1
        self.age = 0
        self._costs_ms.append(cost_ms)
        self._overhead_ms += overhead_ms

    def __repr__(self) -> str:
        return (
            f"ReuseReport(hits={self.hits}, misses={self.misses}, age={self.age}, "
            f"max_age={self.max_age}, saved_ms={self.saved_ms:.1f})"
        )


class ReusingPolicy:
    """`policy` with reuse, to be called in the same way; `policy` itself computes all as before.

    Both share an engine, so neither may be called between two calls of the other that keep
    something. `reports` has one report for each mode that is on: "camera NAME", "prefix", "prompt".

    Raises ValueError if `config` excepts a camera that the policy does not have.
    """

    def __init__(self, policy: Policy, config: ReuseConfig) -> None:
        cameras = policy.processor.config.cameras
        unknown = sorted(set(config.always_encode).difference(cameras))
        if unknown:
            raise ValueError(f"always_encode has camera {unknown[0]!r}: expected one of {cameras}")
        self.reports: dict[str, ReuseReport] = {}
        self._policy = copy.copy(policy)
        if config.prompt_tokens:
            report = self.reports["prompt"] = ReuseReport()
            self._policy.processor = remembering(policy.processor, report)
        watched = () if config.camera_change is None else cameras
        self._cameras = _Cameras(config, set(watched).difference(config.always_encode))
        self.reports.update({f"camera {name}": r for name, r in self._cameras.reports.items()})
        self._prefix = _Prefix(config.prefix_calls)
        if config.prefix_calls > 1:
            self.reports["prefix"] = self._prefix.report

    @property
    def horizon(self) -> int:
        """The number of actions in a chunk."""
        return self._policy.horizon

    def reset(self) -> None:
        """Forget the calls so far: the next computes everything. Reports go on."""
        self._policy.reset()
        self._cameras.forget()
        self._prefix.forget()

    def rebase(
        self, normalized: NDArray[np.float32], was: Observation, now: Observation
    ) -> NDArray[np.float32]:
        """As `Policy.rebase`."""
        return self._policy.rebase(normalized, was, now)

    def infer(
        self,
        observation: Observation,
        *,
        noise: NDArray[np.float32] | None = None,
        given: NDArray[np.float32] | None = None,
        guidance: Guidance | None = None,
        num_steps: int | None = None,
    ) -> ActionChunk:
        """As `Policy.infer`, keeping what may be kept. A call that fails forgets everything."""
        # A plan counts from the present observation: an older prefix would misplace it.
        alone = given is None and guidance is None
        prefix = alone and self._prefix.serves(observation)
        cameras = frozenset[str]() if prefix else self._cameras.unchanged(observation)
        try:
            chunk = self._policy.infer(
                observation,
                noise=noise,
                given=given,
                guidance=guidance,
                num_steps=num_steps,
                keep=Keep(cameras, prefix),
            )
        except Exception:
            self.reset()
            raise
        if prefix:
            self._cameras.grow_older()
        else:
            self._cameras.count(observation, cameras, chunk.times.vision_ms)
        self._prefix.count(observation, prefix, chunk)
        return chunk


@dataclass
class _Encoded:
    """The picture whose tokens the engine holds, and its age in calls."""

    picture: Tensor
    age: int = 0


class _Cameras:
    """Decides which of `watched` cameras need not be encoded again."""

    def __init__(self, config: ReuseConfig, watched: Iterable[str]) -> None:
        self.reports = {camera: ReuseReport() for camera in sorted(watched)}
        self._config = config
        self.forget()

    def forget(self) -> None:
        self._encoded: dict[str, _Encoded] = {}

    def unchanged(self, observation: Observation) -> frozenset[str]:
        began = time.perf_counter()
        self._pictures = {
            camera: resize_with_pad(camera, observation.images[camera], _PICTURE_SIZE, "pil")
            for camera in self.reports
            if camera in observation.images
        }
        kept = frozenset(filter(self._is_unchanged, self._pictures))
        elapsed_ms = (time.perf_counter() - began) * 1000
        self._overhead_ms = elapsed_ms / max(1, len(self._pictures))
        return kept

    def _is_unchanged(self, camera: str) -> bool:
        encoded, change = self._encoded.get(camera), self._config.camera_change
        if encoded is None or change is None or encoded.age >= self._config.max_age:
            return False
        difference = (self._pictures[camera].int() - encoded.picture.int()).abs().max()
        return float(difference) / 255 <= change

    def grow_older(self) -> None:
        for encoded in self._encoded.values():
            encoded.age += 1

    def count(self, observation: Observation, kept: frozenset[str], vision_ms: float) -> None:
        self.grow_older()
        fresh = len(observation.images) - len(kept)
        for camera, picture in self._pictures.items():
            report = self.reports[camera]
            if camera in kept:
                report.hit(self._encoded[camera].age, self._overhead_ms)
            else:
                self._encoded[camera] = _Encoded(picture)
                report.miss(vision_ms / fresh, self._overhead_ms)


class _Prefix:
    """Decides whether the prefix of the call before serves another."""

    def __init__(self, calls: int) -> None:
        self.report = ReuseReport()
        self._calls = calls
        self.forget()

    def forget(self) -> None:
        self._age = 0
        self._shape: tuple[str | None, frozenset[str]] | None = None

    def serves(self, observation: Observation) -> bool:
        return self._age + 1 < self._calls and self._shape == _shape_of(observation)

    def count(self, observation: Observation, kept: bool, chunk: ActionChunk) -> None:
        times = chunk.times
        if kept:
            self._age += 1
            self.report.hit(self._age, times.processing_ms)
        else:
            self._age = 0
            self._shape = _shape_of(observation)
            self.report.miss(times.total_ms - times.denoise_ms)


def _shape_of(observation: Observation) -> tuple[str | None, frozenset[str]]:
    """What a prefix must share with an observation to serve it: the prompt and the cameras."""
    return observation.prompt, frozenset(observation.images)


class _RememberingTokenizer:
    """`tokenizer`, with the ids of recent texts looked up."""

    def __init__(self, tokenizer: Tokenizer, report: ReuseReport) -> None:
        self.bos_id, self.pad_id = tokenizer.bos_id, tokenizer.pad_id
        self.vocab_size = tokenizer.vocab_size
        self._report = report
        self._tokenizer = tokenizer
        self._remember = lru_cache(_PROMPTS)(self._compute)

    def encode(self, text: str) -> list[int]:
        misses = self._report.misses
        ids = list(self._remember(text))
        if self._report.misses == misses:
            self._report.hit(age=0)
        return ids

    def _compute(self, text: str) -> tuple[int, ...]:
        began = time.perf_counter()
        ids = tuple(self._tokenizer.encode(text))
        self._report.miss((time.perf_counter() - began) * 1000)
        return ids


def remembering(processor: Processor, report: ReuseReport) -> Processor:
    """`processor`, remembering the tokens of recent prompts; `report` counts."""
    tokenizer = _RememberingTokenizer(processor.tokenizer, report)
    return Processor(processor.config, processor.action_dim, tokenizer)
