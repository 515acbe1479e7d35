"""`halfpi calibrate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from halfpi.commands.checkpoint import open_source, policy_of
from halfpi.commands.console import notes, track
from halfpi.engine import EagerEngine
from halfpi.quant import calibrate as calibrate_model
from halfpi.quant import save_scales
from halfpi.sim.record import Frames, load_recordings
from halfpi.sim.rendering import CAMERAS
from halfpi.sim.tasks import TASKS
from halfpi.types import Observation

if TYPE_CHECKING:
    from halfpi.cli import Calibrate


def calibrate(options: Calibrate) -> None:
    """Calibrate on recorded frames, and save the scales."""
    if options.precision != "fp32":
        raise ValueError(f"calibration runs in fp32, got --precision {options.precision}")
    policy = policy_of(options)
    if not isinstance(policy.engine, EagerEngine):
        raise ValueError(f"calibration runs plain torch, got --backend {options.backend}")
    observations = track(_observations(options), "frames", options.frames)
    scales = calibrate_model(
        policy.engine.model, policy.infer, observations, percentile=options.percentile
    )
    notes.print(f"wrote {save_scales(scales, open_source(options))}")


def _observations(options: Calibrate) -> Iterator[Observation]:
    """Frames in turn from every task's first recording, evenly spread over its length."""
    shards = load_recordings(options.recordings)
    loaded = {task: Frames.load(paths[0]) for task, paths in shards.items()}
    rounds = -(-options.frames // len(loaded))
    for index in range(options.frames):
        task = list(loaded)[index % len(loaded)]
        frames = loaded[task]
        row = (index // len(loaded)) * len(frames.states) // rounds
        images = dict(zip(CAMERAS, frames.images[row], strict=True))
        yield Observation(images, frames.states[row], TASKS[task].instruction)
