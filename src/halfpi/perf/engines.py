"""Engines to be timed: any backend on a random model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

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
    """An engine, and the plain `model` that it was made from."""

    engine: Engine
    model: Pi05
    backend: str


def make_subject(model: Pi05, case: Case, config: EngineConfig) -> Subject:
    """Make an engine of `model` for `case` and run it once, on inputs that its graphs then replay.

    Raises ValueError where `make_engine` does, and for fake quantisation, which is slower than what
    it imitates.
    """
    scales = random_scales(model, case) if config.precision == "fp8" else None
    engine = make_engine(model, config, scales=scales)
    if isinstance(engine, EagerEngine) and isinstance(engine.model, FakeQuantPi05):
        raise ValueError("fake quantisation shows what fp8 does to actions; its time means nothing")
    inputs, noise = random_inputs(model.config, case)
    engine.run(inputs, noise, case.steps)
    return Subject(engine, model, config.backend)


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
