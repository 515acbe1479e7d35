"""Recorded demonstrations as training batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfpi.config import FeatureStats, Pi05Config, ProcessingConfig
from halfpi.processing.normalize import Normalizer
from halfpi.processing.prompt import clean_prompt, encode_prompt
from halfpi.processing.tokenizer import Tokenizer
from halfpi.sim.record import Frames, load_recordings
from halfpi.sim.rendering import CAMERAS
from halfpi.sim.tasks import PRECISE, TASKS
from halfpi.training.loss import Batch

# Hand, gripper and objects of the present frame, and the goal; the frame before in between says
# little more.
LOCATED = [*range(18), 36, 37, 38]
PRECISE_WEIGHT = 2.5
SHIFT_PIXELS = 2
BRIGHTNESS, CONTRAST = 0.15, 0.15


@dataclass(frozen=True)
class Demonstrations:
    """All recorded frames in memory, and the index in `TASKS` of each frame's task."""

    frames: Frames
    tasks: NDArray[np.int64]

    @classmethod
    def load(cls, directory: Path) -> Demonstrations:
        """Read every recording in `directory`; raises ValueError as `load_recordings` does."""
        names = list(TASKS)
        parts, tasks = [], []
        for task, shards in load_recordings(directory).items():
            for shard in shards:
                parts.append(Frames.load(shard))
                tasks.append(np.full(len(parts[-1].states), names.index(task)))
        return cls(Frames.concatenate(parts), np.concatenate(tasks))

    def processing(self, config: Pi05Config) -> ProcessingConfig:
        """How nano's observations are processed: quantiles of these states and actions."""
        return ProcessingConfig(
            cameras=CAMERAS,
            image_size=config.image_size,
            state_stats=_stats(self.frames.states),
            action_stats=_stats(self.frames.chunks.reshape(-1, config.action_dim)),
            max_prompt_tokens=config.max_prompt_tokens,
            robot="metaworld",
            robot_action_dim=config.action_dim,
        )


def _stats(values: NDArray[np.float32]) -> FeatureStats:
    low, high = np.quantile(values.astype(np.float64), (0.01, 0.99), axis=0)
    return FeatureStats(q01=tuple(low.tolist()), q99=tuple(high.tolist()))


class Batches:
    """Random batches of demonstrations, the same for the same seed and step.

    Tasks are drawn evenly, the precise ones `PRECISE_WEIGHT` times as often; sentences are drawn
    from a task's paraphrases; images are shifted by up to two pixels and change in brightness and
    contrast.
    """

    def __init__(
        self,
        data: Demonstrations,
        processing: ProcessingConfig,
        tokenizer: Tokenizer,
        number_tokens: Mapping[int, int],
    ) -> None:
        self._data = data
        self.number_tokens = number_tokens
        self._tokenizer = tokenizer
        self._max_tokens = processing.max_prompt_tokens
        rule, eps = processing.norm_rule, processing.norm_eps
        state = Normalizer("state", processing.state_norm, rule, eps, processing.state_stats)
        action = Normalizer("actions", processing.action_norm, rule, eps, processing.action_stats)
        self._states = state.normalize(data.frames.states)
        self._actions = action.normalize(data.frames.chunks).astype(np.float32)
        self._located = _standardise(data.frames.full_states[:, LOCATED])
        self._chances = _frame_chances(data.tasks)

    @property
    def cameras(self) -> int:
        """The number of cameras in a recorded frame."""
        return int(self._data.frames.images.shape[1])

    @property
    def located(self) -> int:
        """The number of auxiliary targets."""
        return int(self._located.shape[1])

    def batch(self, size: int, seed: int, step: int, device: torch.device) -> Batch:
        """The batch of `step`."""
        generator = np.random.default_rng((seed, step))
        rows = generator.choice(len(self._chances), size, p=self._chances)
        tokens, token_mask = self._prompts(rows, generator)
        images = torch.from_numpy(self._data.frames.images[rows]).to(device)
        return Batch(
            images=augment(images.permute(0, 1, 4, 2, 3).float() / 127.5 - 1, generator),
            image_mask=torch.ones(images.shape[:2], dtype=torch.bool, device=device),
            tokens=tokens.to(device),
            token_mask=token_mask.to(device),
            actions=torch.from_numpy(self._actions[rows]).to(device),
            auxiliary=torch.from_numpy(self._located[rows]).to(device),
        )

    def _prompts(
        self, rows: NDArray[np.int64], generator: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        tasks = list(TASKS.values())
        encoded = []
        for row in rows:
            sentences = tasks[self._data.tasks[row]].sentences
            sentence = clean_prompt(sentences[generator.integers(len(sentences))])
            encoded.append(
                encode_prompt(sentence, self._states[row], self._tokenizer, self._max_tokens)
            )
        tokens, mask = (torch.from_numpy(np.stack(column)) for column in zip(*encoded, strict=True))
        longest = int(mask.sum(1).max())
        return tokens[:, :longest], mask[:, :longest]


def augment(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Shift and brighten `images` fp32 (b, n, 3, h, w) in [-1, 1], each camera on its own."""
    b, n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images.flatten(0, 1), (SHIFT_PIXELS,) * 4, mode="replicate")
    offsets = torch.from_numpy(generator.integers(0, 2 * SHIFT_PIXELS + 1, (b * n, 2, 1)))
    rows = (offsets[:, 0] + torch.arange(height)).to(images.device)
    columns = (offsets[:, 1] + torch.arange(width)).to(images.device)
    index = torch.arange(b * n, device=images.device)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    change = generator.uniform(-1, 1, (b, n, 2)).astype(np.float32)
    brightness, contrast = (
        torch.from_numpy(change).to(images.device)[..., None, None, None].unbind(2)
    )
    result = shifted.permute(0, 3, 1, 2).reshape(images.shape)
    return torch.clamp(result * (1 + CONTRAST * contrast) + BRIGHTNESS * brightness, -1, 1)


def _standardise(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Zero mean and unit deviation, by column; what hardly varies (under 1 mm) stays near zero."""
    result: NDArray[np.float32] = (values - values.mean(0)) / np.maximum(values.std(0), 1e-3)
    return result


def _frame_chances(tasks: NDArray[np.int64]) -> NDArray[np.float64]:
    names = list(TASKS)
    counts = np.bincount(tasks, minlength=len(names))
    weights: Mapping[str, float] = dict.fromkeys(PRECISE, PRECISE_WEIGHT)
    by_task = np.array([weights.get(name, 1.0) for name in names])
    chances = by_task[tasks] / counts[tasks]
    return np.asarray(chances / chances.sum())
