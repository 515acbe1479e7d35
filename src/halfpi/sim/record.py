"""Demonstrations by Meta-World's scripted experts, disturbed by bursts of action noise.

An undisturbed expert only ever shows the states on its own path, so a policy trained on it cannot
come back once it has left that path. Here bursts of a constant random push (and sometimes a flipped
gripper) carry the arm away, while every recorded frame is labelled with what the expert would do
*from there*: its next `horizon` actions, played out on a copy of the simulation. A label therefore
never contains noise.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfpi.files import atomic_write
from halfpi.sim.environment import ACTION_DIM, MAX_STEPS, MetaWorldEnvironment
from halfpi.sim.rendering import CAMERAS
from halfpi.sim.tasks import FULFILLED_AT_START, TASKS, Task

EPISODES_PER_SHARD = 10
# Evaluation draws its seeds from here on, recording from zero: the two never meet.
HELD_OUT_SEED = 1_000_000
STEPS_AFTER_SUCCESS = 8
FULFILLED_STEPS = 24
FULFILLED = ".fulfilled"


@dataclass(frozen=True)
class BurstConfig:
    """Noise bursts: chance at the start and at each later step, longest in control steps."""

    start_chance: float = 0.5
    start_steps: int = 20
    chance: float = 0.025
    steps: int = 8
    flip_gripper_chance: float = 0.1


@dataclass(frozen=True)
class RecordConfig:
    """What to record. `stride` is the number of control steps between recorded frames."""

    image_size: int
    horizon: int
    stride: int = 2
    bursts: BurstConfig = dataclasses.field(default_factory=BurstConfig)


@dataclass(frozen=True)
class Frames:
    """Recorded frames, first axis f.

    images uint8 (f, camera, size, size, 3); states float32 (f, 4); chunks float32 (f, horizon, 4),
    the expert's actions from this frame on; full_states float32 (f, 39), what the expert saw;
    episodes int64 (f,), the seed of the episode.
    """

    images: NDArray[np.uint8]
    states: NDArray[np.float32]
    chunks: NDArray[np.float32]
    full_states: NDArray[np.float32]
    episodes: NDArray[np.int64]

    def save(self, path: Path, *, compressed: bool = False) -> None:
        """Write an .npz of the arrays; the file appears whole or not at all."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            (np.savez_compressed if compressed else np.savez)(file, **arrays)

    @classmethod
    def concatenate(cls, parts: Sequence[Frames]) -> Frames:
        """The frames of all parts, in order."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @classmethod
    def load(cls, path: Path) -> Frames:
        """Read what `save` wrote; raises ValueError that names a file which is none."""
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                return cls(**{name: data[name] for name in names})
        except Exception as error:  # zipfile, numpy and OS errors alike
            raise ValueError(f"{path} is not a recording by 'halfpi record': {error}") from error


def burst_noise(
    config: BurstConfig, steps: int, generator: np.random.Generator
) -> list[NDArray[np.float32] | None]:
    """For each control step the action that replaces the expert's xyz, or None to leave it alone.

    The fourth entry multiplies the expert's gripper action: 1, or -1 where the burst flips it.
    """
    noise: list[NDArray[np.float32] | None] = []
    while len(noise) < steps:
        first = not noise
        chance, longest = (
            (config.start_chance, config.start_steps) if first else (config.chance, config.steps)
        )
        if generator.random() >= chance:
            noise.append(None)
            continue
        strength = generator.uniform(0.3, 1.0)
        push = (strength * generator.uniform(-1, 1, ACTION_DIM)).astype(np.float32)
        push[3] = -1 if not first and generator.random() < config.flip_gripper_chance else 1
        noise += [push] * int(generator.integers(3, longest + 1))
    return noise[:steps]


def record_episode(
    environment: MetaWorldEnvironment, seed: int, config: RecordConfig
) -> Frames | None:
    """Play one disturbed demonstration; None if the expert does not solve the task in time."""
    actions = _solve(environment, seed, config.bursts)
    if actions is None:
        return None
    rows: list[tuple[NDArray[Any], ...]] = []
    environment.reset(seed)
    for step, action in enumerate(actions):
        if step % config.stride == 0:
            rows.append(_frame(environment, environment.expert_chunk(config.horizon)))
        environment.act(action)
    return _stacked(rows, seed)


def _solve(
    environment: MetaWorldEnvironment, seed: int, bursts: BurstConfig
) -> list[NDArray[np.float32]] | None:
    """The actions of a disturbed demonstration. Nothing is rendered: a failed one costs little."""
    noise = burst_noise(bursts, MAX_STEPS, np.random.default_rng(seed))
    actions: list[NDArray[np.float32]] = []
    environment.reset(seed)
    for disturbance in noise:
        action = environment.expert_action()
        if disturbance is not None:
            action = np.append(disturbance[:3], action[3] * disturbance[3]).astype(np.float32)
        actions.append(action)
        if environment.act(action):
            return actions + [environment.expert_action()] * STEPS_AFTER_SUCCESS
    return None


def record_fulfilled(environment: MetaWorldEnvironment, seed: int, config: RecordConfig) -> Frames:
    """Frames of a scene in which there is nothing to do: every label is to keep still.

    A first burst moves the hand, as in a demonstration, so that it may be anywhere near its start.
    """
    still = np.array([0, 0, 0, -1], np.float32)
    noise = burst_noise(
        dataclasses.replace(config.bursts, chance=0), FULFILLED_STEPS, np.random.default_rng(seed)
    )
    rows: list[tuple[NDArray[Any], ...]] = []
    environment.reset(seed)
    for step, push in enumerate(noise):
        if step % config.stride == 0:
            rows.append(_frame(environment, np.tile(still, (config.horizon, 1))))
        environment.act(still if push is None else np.append(push[:3], still[3]))
    return _stacked(rows, seed)


def record_moment(environment: MetaWorldEnvironment, seed: int, step: int, horizon: int) -> Frames:
    """One frame, after `step` steps of the undisturbed expert."""
    environment.reset(seed)
    for _ in range(step):
        environment.act(environment.expert_action())
    return _stacked([_frame(environment, environment.expert_chunk(horizon))], seed)


def _stacked(rows: list[tuple[NDArray[Any], ...]], seed: int) -> Frames:
    images, states, chunks, full_states = (np.stack(rows) for rows in zip(*rows, strict=True))
    return Frames(images, states, chunks, full_states, np.full(len(states), seed, np.int64))


def _frame(
    environment: MetaWorldEnvironment, chunk: NDArray[np.float32]
) -> tuple[NDArray[Any], ...]:
    observation = environment.observe()
    return (
        np.stack([observation.images[name] for name in CAMERAS]),
        observation.state,
        chunk,
        environment.full_state.astype(np.float32),
    )


@dataclass(frozen=True)
class _Shard:
    """Ten seeds of `scene`, where `task` is asked for, which may be done there already."""

    task: Task
    scene: Task
    first_seed: int
    path: Path
    config: RecordConfig


def record(
    tasks: list[Task],
    episodes: int,
    directory: Path,
    config: RecordConfig,
    workers: int | None = None,
) -> Iterator[tuple[Path, int, int]]:
    """Record `episodes` seeds of each task in parallel; yields (shard, solved episodes, frames).

    A task that can be found done already is recorded as such too, on as many seeds. A shard that is
    there already is kept, so an interrupted recording goes on where it stopped. Demonstrations that
    the expert did not finish are left out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    scenes = [(task, task, task.name) for task in tasks]
    scenes += [
        (task, TASKS[FULFILLED_AT_START[task.name]], task.name + FULFILLED)
        for task in tasks
        if task.name in FULFILLED_AT_START
    ]
    shards = [
        _Shard(task, scene, first, directory / f"{name}-{first:06d}.npz", config)
        for first in range(0, episodes, EPISODES_PER_SHARD)
        for task, scene, name in scenes
    ]
    missing = [shard for shard in shards if not shard.path.exists()]
    if not missing:
        return
    context = multiprocessing.get_context("spawn")  # OpenGL contexts do not survive a fork
    with context.Pool(min(workers or os.cpu_count() or 1, len(missing))) as pool:
        yield from pool.imap_unordered(_record_shard, missing)


_environments: dict[tuple[str, int], MetaWorldEnvironment] = {}


def _record_shard(shard: _Shard) -> tuple[Path, int, int]:
    key = (shard.scene.name, shard.config.image_size)
    if key not in _environments:
        _environments[key] = MetaWorldEnvironment(shard.scene, shard.config.image_size)
    seeds = range(shard.first_seed, shard.first_seed + EPISODES_PER_SHARD)
    play = record_episode if shard.scene == shard.task else record_fulfilled
    played = (play(_environments[key], seed, shard.config) for seed in seeds)
    episodes = [episode for episode in played if episode is not None]
    if not episodes:
        raise RuntimeError(f"the expert solved none of the seeds {seeds} of {shard.task.name}")
    frames = Frames.concatenate(episodes)
    frames.save(shard.path)
    return shard.path, len(episodes), len(frames.states)


def load_recordings(directory: Path) -> dict[str, list[Path]]:
    """The shards in `directory` by task; raises ValueError on none, or one of no known task."""
    shards: dict[str, list[Path]] = {}
    for path in sorted(directory.glob("*.npz")):
        task = path.stem.rsplit("-", 1)[0].removesuffix(FULFILLED)
        if task not in TASKS:
            raise ValueError(f"{path} is of no known task")
        shards.setdefault(task, []).append(path)
    if not shards:
        raise ValueError(f"no recordings (*.npz) in {directory}; make some with 'halfpi record'")
    return shards
