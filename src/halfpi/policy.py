"""A policy: from what a robot sees to what it does, in the robot's own units."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfpi.checkpoints import Checkpoint, load_model, open_checkpoint
from halfpi.config import Backend, EngineConfig, Precision
from halfpi.engine import Engine, Noise, make_engine
from halfpi.model import Guidance
from halfpi.processing.pipeline import ModelInputs, Processor
from halfpi.processing.tokenizer import find_tokenizer, load_tokenizer
from halfpi.quant import load_scales
from halfpi.types import ActionChunk, Keep, Observation

NANO = Path(__file__).parent / "assets" / "nano"
NOTHING = Keep()


@dataclass(frozen=True)
class Arguments:
    """What a call denoises with, checked, as the engine takes it.

    noise: fp32 (h, a), or what draws it. given: fp32 (d, a) or None. guidance: of h actions, or
    None.
    """

    noise: Noise
    given: torch.Tensor | None
    guidance: Guidance | None
    num_steps: int


class Policy:
    """Observation → processing → engine → actions.

    Noise comes from a generator of its own, seeded with `seed`, so that a run can be repeated.
    """

    def __init__(
        self, processor: Processor, engine: Engine, *, num_steps: int = 10, seed: int = 0
    ) -> None:
        self.processor = processor
        self.engine = engine
        self.num_steps = _checked_steps(num_steps)
        self._generator = torch.Generator().manual_seed(seed)
        self._prefix_of: Observation | None = None
        self._age = 0

    @property
    def horizon(self) -> int:
        """The number of actions in a chunk."""
        return self.engine.config.horizon

    def reseed(self, seed: int) -> None:
        """Start the noise anew from `seed`."""
        self._generator.manual_seed(seed)

    def reset(self) -> None:
        """Forget the calls so far: the next has nothing to keep."""
        self.engine.forget()
        self._prefix_of, self._age = None, 0

    def infer(
        self,
        observation: Observation,
        *,
        noise: NDArray[np.float32] | None = None,
        given: NDArray[np.float32] | None = None,
        guidance: Guidance | None = None,
        num_steps: int | None = None,
        keep: Keep = NOTHING,
    ) -> ActionChunk:
        """One chunk of actions for `observation`.

        noise: float32 (h, a), drawn if absent. given: float32 (d, a), d ≤ h, the first actions of
        the chunk, normalised as in `ActionChunk.normalized`, if they are already decided
        (training-time real-time chunking). guidance: of h actions, pulls the chunk towards a plan.
        num_steps: Euler steps of this call, instead of the policy's. keep: what to take over from
        earlier calls; with a kept prefix, `given` and `guidance` count from its observation, too.

        Raises ValueError that names what is wrong with the observation or an argument.
        """
        began = time.perf_counter()
        kept = self._places(keep.cameras)
        inputs = None if keep.prefix else self._inputs(observation)
        with_ = self.arguments(noise, given, guidance, num_steps)
        normalized, times = self.engine.run(
            inputs, with_.noise, with_.num_steps, with_.given, with_.guidance, kept
        )
        if self._prefix_of is None or not keep.prefix:
            self._prefix_of, self._age = observation, 0
        else:
            self._age += 1
        chunk = normalized.numpy()
        actions = self.processor.outputs(chunk, self._prefix_of)
        times = times.within((time.perf_counter() - began) * 1000)
        return ActionChunk(actions, chunk, times, self._age, keep)

    def arguments(
        self,
        noise: NDArray[np.float32] | None = None,
        given: NDArray[np.float32] | None = None,
        guidance: Guidance | None = None,
        num_steps: int | None = None,
    ) -> Arguments:
        """The arguments of `infer`, checked; noise, if there is none, is yet to be drawn."""
        steps = self.num_steps if num_steps is None else _checked_steps(num_steps)
        start: Noise = self._draw
        if noise is not None:
            start = self._checked("noise", noise, shortest=self.horizon)
        decided = None if given is None else self._checked("given", given)
        if guidance is not None:
            self._check_guidance(guidance)
        return Arguments(start, decided, guidance, steps)

    def rebase(
        self, normalized: NDArray[np.float32], was: Observation, now: Observation
    ) -> NDArray[np.float32]:
        """Actions `normalized` (r, a) that were planned at `was`, as they are normalised at `now`.

        It is for `given` and `guidance`, and only changes actions that are relative to the state.
        """
        return self.processor.rebase(normalized, was, now)

    def _places(self, cameras: frozenset[str]) -> list[int]:
        known = self.processor.config.cameras
        unknown = cameras.difference(known)
        if unknown:
            raise ValueError(f"cannot keep camera {min(unknown)!r}: expected one of {known}")
        return [known.index(camera) for camera in cameras]

    def _check_guidance(self, guidance: Guidance) -> None:
        rows, columns = self.horizon, self.engine.config.action_dim
        shapes = {"target": (rows, columns), "weights": (rows,)}
        for name, shape in shapes.items():
            values: torch.Tensor = getattr(guidance, name)
            if values.shape != shape:
                raise ValueError(
                    f"the guidance's {name} must have shape {shape}, got {tuple(values.shape)}"
                )
            if not values.isfinite().all():
                raise ValueError(f"the guidance's {name} must be finite, got NaN or infinity")

    def _inputs(self, observation: Observation) -> ModelInputs:
        if self.engine.defers:
            return self.processor.deferred_inputs(observation)
        return self.processor.inputs(observation)

    def _draw(self) -> torch.Tensor:
        shape = (self.horizon, self.engine.config.action_dim)
        return torch.randn(shape, generator=self._generator)

    def _checked(self, name: str, actions: NDArray[np.float32], shortest: int = 0) -> torch.Tensor:
        rows, columns = self.horizon, self.engine.config.action_dim
        shape = np.shape(actions)
        if len(shape) != 2 or shape[1] != columns or not shortest <= shape[0] <= rows:
            expected = rows if shortest == rows else f"{shortest} to {rows}"
            raise ValueError(f"{name} must have shape ({expected}, {columns}), got {shape}")
        if not np.isfinite(actions).all():
            raise ValueError(f"{name} must be finite, got NaN or infinite values")
        return torch.tensor(actions, dtype=torch.float32)


def load_policy(
    path: str | os.PathLike[str] = "nano",
    *,
    device: str | None = None,
    precision: Precision = "fp32",
    backend: Backend = "eager",
    num_steps: int | Sequence[int] = 10,
    tokenizer: str | os.PathLike[str] | None = None,
    seed: int = 0,
    asset_id: str | None = None,
    processing_overrides: Mapping[str, object] | None = None,
    **config_overrides: Any,
) -> Policy:
    """The policy in the checkpoint directory `path`; "nano" is the one that ships with halfpi.

    device: a torch device; CUDA if there is one, else the CPU. precision: "fp32", "bf16", or "fp8"
    with the scales beside the checkpoint, whose arithmetic other backends than "triton" imitate.
    backend: see `EngineConfig`. num_steps: Euler steps of a call; of several, which "triton" plans
    for, the first is the default.
    tokenizer: a tokenizer.json or SentencePiece .model; if absent, the checkpoint is searched and
    then the usual caches. asset_id, processing_overrides, config_overrides: as in
    `open_checkpoint`, for what the checkpoint does not say.

    Raises ValueError (CheckpointError for the checkpoint's own files) naming what is missing or
    wrong; a checkpoint without normalisation statistics is refused unless the overrides set
    `state_norm` and `action_norm` to "identity".
    """
    checkpoint = open_checkpoint(
        checkpoint_path(path),
        asset_id=asset_id,
        processing_overrides=processing_overrides,
        **config_overrides,
    )
    _require_stats(checkpoint)
    found = find_tokenizer(None if tokenizer is None else Path(tokenizer), checkpoint.path)
    processor = Processor(
        checkpoint.processing, checkpoint.config.action_dim, load_tokenizer(found)
    )
    wanted = (num_steps,) if isinstance(num_steps, int) else num_steps
    steps = tuple(_checked_steps(number) for number in wanted)
    config = EngineConfig(
        backend,
        precision,
        steps,
        max_cameras=len(checkpoint.processing.cameras),
        max_prompt_tokens=checkpoint.processing.max_prompt_tokens,
    )
    engine = _engine(checkpoint, config, device or default_device())
    return Policy(processor, engine, num_steps=steps[0], seed=seed)


def checkpoint_path(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Where a checkpoint is: "nano" is the one that ships, anything else a directory."""
    return NANO if path == "nano" else path


def default_device() -> str:
    """CUDA if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _engine(checkpoint: Checkpoint, config: EngineConfig, device: str) -> Engine:
    scales = load_scales(checkpoint) if config.precision == "fp8" else None
    # A plan packs from the CPU; fake quantisation starts from the weights as they are stored.
    packed = config.backend == "triton"
    narrow = config.precision == "bf16" or (packed and config.precision == "fp8")
    model = load_model(
        checkpoint,
        device="cpu" if packed else device,
        dtype="bfloat16" if narrow else "float32",
    )
    return make_engine(model, config, device=device, scales=scales)


def _require_stats(checkpoint: Checkpoint) -> None:
    processing = checkpoint.processing
    for feature in ("state", "action"):
        mode, stats = (getattr(processing, f"{feature}_{part}") for part in ("norm", "stats"))
        if stats is None and mode != "identity":
            raise ValueError(
                f"{checkpoint.path} has no normalisation statistics of the {feature}: actions "
                "would come out in the wrong units. Put its norm_stats.json in place, or pass "
                f"processing_overrides={{'{feature}_norm': 'identity'}} to go without"
            )


def _checked_steps(num_steps: int) -> int:
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an int of at least 1, got {num_steps!r}")
    return num_steps
