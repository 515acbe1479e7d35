"""The demo: closed loop in Meta-World, or recorded frames where nothing can be rendered."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from halfpi.policy import NANO, Policy
from halfpi.runtime.rerun_log import RerunLog
from halfpi.sim.environment import MetaWorldEnvironment
from halfpi.sim.evaluate import Episode, EvalConfig, play_episode
from halfpi.sim.record import HELD_OUT_SEED, Frames, record_moment
from halfpi.sim.rendering import CAMERAS
from halfpi.sim.tasks import Task, select
from halfpi.types import ActionChunk, Observation, StageTimes

RECORDED_FRAMES = NANO / "frames.npz"
MOMENT = 12  # control steps into an episode
SHEET_COLUMNS = 12
TILE = 112


def play(
    policy: Policy,
    tasks: list[Task],
    episodes: int,
    config: EvalConfig,
    directory: Path,
    log: RerunLog | None = None,
) -> Iterator[tuple[Episode, Path]]:
    """Play held-out episodes one after the other; yields each with its contact sheet.

    log: a recording to which every call is added.

    Raises RenderingUnavailableError before the first episode where no OpenGL can be had.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        size = policy.processor.config.image_size
        with closing(MetaWorldEnvironment(task, size)) as environment:
            for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + episodes):
                seen: list[Observation] = []
                watch = _watch(seen, log, f"{task.name}, seed {seed}")
                episode = play_episode(policy, environment, seed, config, watch=watch)
                sheet = directory / f"{task.name}-{seed}.png"
                contact_sheet(seen).save(sheet)
                yield episode, sheet


def _watch(
    seen: list[Observation], log: RerunLog | None, title: str
) -> Callable[[Observation, ActionChunk], None]:
    """Collects what the policy saw, and adds it to the recording if there is one."""

    def watch(observation: Observation, chunk: ActionChunk) -> None:
        now_s = time.monotonic()
        if log is not None and not seen:
            log.note(now_s - chunk.times.total_ms / 1000, title)
        seen.append(observation)
        if log is not None:
            log.inferred(now_s - chunk.times.total_ms / 1000, now_s, observation, chunk)

    return watch


def contact_sheet(observations: list[Observation]) -> Image.Image:
    """What the cameras saw, a row for each camera, at up to twelve calls from first to last."""
    count = min(SHEET_COLUMNS, len(observations))
    chosen = [
        observations[i] for i in np.linspace(0, len(observations) - 1, count).round().astype(int)
    ]
    sheet = Image.new("RGB", (TILE * count, TILE * len(CAMERAS)))
    for column, observation in enumerate(chosen):
        for row, camera in enumerate(CAMERAS):
            tile = Image.fromarray(observation.images[camera]).resize((TILE, TILE))
            sheet.paste(tile, (column * TILE, row * TILE))
    return sheet


@dataclass(frozen=True)
class FrameResult:
    """One call on a recorded frame, against what the expert did there."""

    task: str
    action_error: float
    times: StageTimes


def save_moments(policy: Policy, path: Path = RECORDED_FRAMES) -> None:
    """Record what `play_frames` plays: a moment on the way to the object, of each precise task."""
    size, moments = policy.processor.config.image_size, []
    for task in select(["precise"]):
        with closing(MetaWorldEnvironment(task, size)) as environment:
            moments.append(record_moment(environment, HELD_OUT_SEED, MOMENT, policy.horizon))
    Frames.concatenate(moments).save(path, compressed=True)


def play_frames(policy: Policy, path: Path = RECORDED_FRAMES) -> Iterator[FrameResult]:
    """Run the policy on recorded moments of the precise tasks; needs no simulator."""
    frames = Frames.load(path)
    for row, task in enumerate(select(["precise"])):
        images: dict[str, NDArray[np.uint8]] = dict(zip(CAMERAS, frames.images[row], strict=True))
        chunk = policy.infer(Observation(images, frames.states[row], task.instruction))
        difference = np.abs(np.clip(chunk.actions, -1, 1) - frames.chunks[row])
        yield FrameResult(task.name, float(difference.mean()), chunk.times)
