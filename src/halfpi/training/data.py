"""Recorded demonstrations as training batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

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
WORKERS = 12  # enough to write the prompts of some hundred batches a second

Prompts = tuple[Tensor, Tensor, Tensor]  # rows (b,), tokens (b, l), token_mask (b, l)


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
    """Random batches of demonstrations, drawn anew for every step but the same for the same seed.

    Tasks are drawn evenly, the precise ones `PRECISE_WEIGHT` times as often. All frames live on
    `device`; worker processes draw rows and write prompts, which is most of the work of a batch.
    """

    def __init__(
        self,
        data: Demonstrations,
        processing: ProcessingConfig,
        tokenizer: Tokenizer,
        device: torch.device,
    ) -> None:
        frames, self.device = data.frames, device
        rule, eps = processing.norm_rule, processing.norm_eps
        state = Normalizer("state", processing.state_norm, rule, eps, processing.state_stats)
        action = Normalizer("actions", processing.action_norm, rule, eps, processing.action_stats)
        self._prompts = partial(
            _Prompts,
            data.tasks,
            state.normalize(frames.states),
            tokenizer,
            processing.max_prompt_tokens,
        )
        self._images = torch.from_numpy(frames.images).to(device)
        self._actions = torch.from_numpy(action.normalize(frames.chunks)).float().to(device)
        self._located = torch.from_numpy(_standardise(frames.full_states[:, LOCATED])).to(device)

    @property
    def cameras(self) -> int:
        """The number of cameras in a recorded frame."""
        return self._images.shape[1]

    @property
    def located(self) -> int:
        """The number of auxiliary targets."""
        return self._located.shape[1]

    def steps(self, first: int, end: int, size: int, seed: int) -> Iterator[Batch]:
        """The batches of steps `first` to `end`, each of `size` frames.

        Seeds torch for every step: its augmentation and the noise of its update follow from `seed`
        and the step's number alone, as a resumed training needs.
        """
        loader: DataLoader[Prompts] = DataLoader(
            self._prompts(size, seed),
            sampler=range(first, end),
            batch_size=None,
            num_workers=max(1, min(WORKERS, (os.cpu_count() or 1) - 2)),
        )
        for step, (rows, tokens, token_mask) in enumerate(loader, first):
            torch.manual_seed((seed << 32) + step)
            chosen = rows.to(self.device)
            images = self._images[chosen].permute(0, 1, 4, 2, 3).float() / 127.5 - 1
            yield Batch(
                images=augment(images),
                image_mask=torch.ones(images.shape[:2], dtype=torch.bool, device=self.device),
                tokens=tokens.to(self.device),
                token_mask=token_mask.to(self.device),
                actions=self._actions[chosen],
                auxiliary=self._located[chosen],
            )


class _Prompts(Dataset[Prompts]):
    """Which frames a step sees, and their prompts, each a random paraphrase of its task."""

    def __init__(
        self,
        tasks: NDArray[np.int64],
        states: NDArray[Any],
        tokenizer: Tokenizer,
        max_tokens: int,
        size: int,
        seed: int,
    ) -> None:
        self._tasks, self._states = tasks, states
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self._size, self._seed = size, seed
        self._chances = _frame_chances(tasks)
        self._sentences = [
            [clean_prompt(sentence) for sentence in task.sentences] for task in TASKS.values()
        ]

    def __getitem__(self, step: int) -> Prompts:
        generator = np.random.default_rng((self._seed, step))
        rows = generator.choice(len(self._chances), self._size, p=self._chances)
        encoded = [self._encode(row, generator) for row in rows]
        tokens, mask = (torch.from_numpy(np.stack(column)) for column in zip(*encoded, strict=True))
        longest = int(mask.sum(1).max())
        return torch.from_numpy(rows), tokens[:, :longest], mask[:, :longest]

    def _encode(
        self, row: int, generator: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        sentences = self._sentences[self._tasks[row]]
        sentence = sentences[generator.integers(len(sentences))]
        return encode_prompt(sentence, self._states[row], self._tokenizer, self._max_tokens)


def augment(images: Tensor) -> Tensor:
    """Shift `images` fp32 (b, n, 3, h, w) in [-1, 1] by up to two pixels, and change their light.

    Every camera of every row draws its own change.
    """
    b, n, _, height, width = images.shape
    device = images.device
    padded = F.pad(images.flatten(0, 1), (SHIFT_PIXELS,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * SHIFT_PIXELS + 1, (2, b * n, 1), device=device)
    rows = offsets[0] + torch.arange(height, device=device)
    columns = offsets[1] + torch.arange(width, device=device)
    index = torch.arange(b * n, device=device)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    brightness, contrast = 2 * torch.rand((2, b * n, 1, 1, 1), device=device) - 1
    changed: Tensor = shifted * (1 + CONTRAST * contrast) + BRIGHTNESS * brightness
    return changed.clamp(-1, 1).permute(0, 3, 1, 2).reshape(images.shape)


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
