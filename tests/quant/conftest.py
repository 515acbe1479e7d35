"""A tiny random policy, and what calibration makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfpi.checkpoints import Checkpoint, open_checkpoint, save_model
from halfpi.config import Pi05Config
from halfpi.engine import EagerEngine
from halfpi.model import Pi05
from halfpi.perf.cases import Case
from halfpi.perf.synthetic import random_model, random_observations, random_policy
from halfpi.policy import Policy
from halfpi.quant import Scales, calibrate
from halfpi.types import Observation

CASE = Case("tiny", cameras=2, prompt_tokens=9, horizon=7, steps=4, precision="fp32")


@pytest.fixture
def model(tiny_config: Pi05Config) -> Pi05:
    return random_model(tiny_config)


@pytest.fixture
def policy(model: Pi05) -> Policy:
    """A policy of four denoising steps."""
    return random_policy(EagerEngine(model), CASE)


@pytest.fixture
def observations(tiny_config: Pi05Config) -> list[Observation]:
    return random_observations(tiny_config, CASE, 3)


@pytest.fixture
def scales(model: Pi05, policy: Policy, observations: list[Observation]) -> Scales:
    return calibrate(model, policy.infer, observations)


@pytest.fixture
def checkpoint(model: Pi05, policy: Policy, tmp_path: Path) -> Checkpoint:
    """The model as a halfpi checkpoint that a test may change."""
    return open_checkpoint(save_model(model, policy.processor.config, tmp_path / "checkpoint"))
