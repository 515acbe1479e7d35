"""Engines to be timed: any backend on a random model, with what making it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from halfpi.config import EngineConfig
from halfpi.engine import EagerEngine, Engine, make_engine
from halfpi.model import Pi05
from halfpi.perf.cases import Case
from halfpi.perf.synthetic import random_inputs, random_observations, random_policy
from halfpi.quant import FakeQuantPi05, Scales, calibrate

_CALIBRATION_FRAMES = 4


class GraphEngine(Engine, Protocol):
    """An engine whose stages are captured in CUDA graphs."""

    def stage_graphs(
        self, cameras: int, prompt_tokens: int, num_steps: int
    ) -> Mapping[str, Callable[[], None]]:
        """Stage → what enqueues one replay of it, on the inputs of the latest `run`."""


@dataclass(frozen=True)
class Subject:
    """An engine, and the plain `model` that it was made from.

    cold_start_s: from a model on the device to the first actions: packing, compiling, capturing.
    peak_bytes: the most device memory in that time, without `model` if the engine has weights of
    its own; None on a CPU.
    """

    engine: Engine
    model: Pi05
    backend: str
    cold_start_s: float
    peak_bytes: int | None


def make_subject(model: Pi05, case: Case, config: EngineConfig) -> Subject:
    """Make an engine of `model` for `case` and run it once.

    Raises ValueError where `make_engine` does, and for fake quantisation, which is slower than what
    it imitates.
    """
    scales = random_scales(model, case) if config.precision == "fp8" else None
    device = model.action_in.weight.device
    on_gpu = device.type == "cuda"
    shared = torch.cuda.memory_allocated(device) if on_gpu and config.backend == "triton" else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    inputs, noise = random_inputs(model.config, case)
    began = time.perf_counter()
    engine = make_engine(model, config, scales=scales)
    if isinstance(engine, EagerEngine) and isinstance(engine.model, FakeQuantPi05):
        raise ValueError("fake quantisation shows what fp8 does to actions; its time means nothing")
    engine.run(inputs, noise, case.steps)
    return Subject(
        engine,
        model,
        config.backend,
        cold_start_s=time.perf_counter() - began,
        peak_bytes=torch.cuda.max_memory_allocated(device) - shared if on_gpu else None,
    )


def engine_config(case: Case, backend: str, *, persistent_expert: bool = True) -> EngineConfig:
    """The configuration that runs `case` and nothing larger.

    Raises ValueError for a backend or a precision that engines do not have.
    """
    return EngineConfig(
        backend=backend,  # type: ignore[arg-type]  # checked by EngineConfig
        precision=case.precision,  # type: ignore[arg-type]
        num_steps=(case.steps,),
        max_cameras=case.cameras,
        max_prompt_tokens=case.prompt_tokens,
        persistent_expert=persistent_expert,
    )


def random_scales(model: Pi05, case: Case) -> Scales:
    """fp8 scales of `model`, calibrated on random observations of `case`."""
    policy = random_policy(EagerEngine(model), case)
    observations = random_observations(model.config, case, _CALIBRATION_FRAMES)
    return calibrate(model, policy.infer, observations)
