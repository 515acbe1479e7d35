"""What crosses the borders of the package: observations in, action chunks and timings out.

Dimension names, used everywhere:

| letter | meaning                          |
|--------|----------------------------------|
| b      | batch                            |
| n      | camera                           |
| s      | prefix tokens (images + prompt)  |
| l      | prompt tokens                    |
| h      | action horizon                   |
| a      | action dimension                 |
| d      | width                            |
| q      | query heads                      |
| k      | head_dim                         |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Observation:
    """One moment as the robot sees it.

    images: camera name → uint8 (height, width, 3), any size; a camera that is absent is masked out.
    state: float (state_dim,), in the robot's own units.
    prompt: the instruction; None takes the checkpoint's default prompt.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    prompt: str | None = None


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of a call: of each stage of the model, and of processing, all the rest."""

    processing_ms: float = 0.0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    denoise_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """The whole call: the sum of the stages."""
        return self.processing_ms + self.vision_ms + self.prefill_ms + self.denoise_ms

    def within(self, total_ms: float) -> StageTimes:
        """The same stages of a call that took `total_ms`: the rest is processing."""
        stages = self.vision_ms, self.prefill_ms, self.denoise_ms
        return StageTimes(total_ms - sum(stages), *stages)


@dataclass(frozen=True)
class Keep:
    """What a call takes over from the calls before it instead of computing it again.

    cameras: whose image tokens stay those that were encoded last.
    prefix: all that the actions are conditioned on stays: images, state and prompt. The chunk then
    begins at the observation that the prefix was computed from.
    """

    cameras: frozenset[str] = frozenset()
    prefix: bool = False


@dataclass(frozen=True)
class ActionChunk:
    """A plan of h actions.

    actions: float32 (h, robot_action_dim), in the robot's own units, ready to execute.
    normalized: float32 (h, a), as the model gave them; what real-time chunking feeds back.
    age: row 0 belongs to the observation of the call that many calls ago. Above 0 only where a
    prefix was kept.
    kept: what the call took over from those before it.
    """

    actions: NDArray[np.float32]
    normalized: NDArray[np.float32]
    times: StageTimes = field(default_factory=StageTimes)
    age: int = 0
    kept: Keep = field(default_factory=Keep)
