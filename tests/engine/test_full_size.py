"""π0.5's full size with random weights on a Hopper GPU: how exact it is, and that bits repeat.

Its own sizes choose the CUDA kernels, which nano's do not.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from tests.engine.conftest import EngineCall, assert_calls_equal_fresh_captures
from tests.kernels.conftest import needs_hopper

from halfpi.config import PRESETS
from halfpi.engine import EagerEngine, Engine, make_engine
from halfpi.model import Pi05
from halfpi.perf.cases import Case, Precision, standard_case
from halfpi.perf.engines import engine_config, random_scales
from halfpi.perf.synthetic import random_inputs, random_model

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [pytest.mark.gpu, needs_hopper]
# Any number of cameras, and any place of the one that is absent.
SETS = [list(cameras) for cameras in itertools.product([True, False], repeat=3) if any(cameras)]


@pytest.fixture(scope="module", params=[50, 10], ids=["chunk-50", "chunk-10"])
def model(request: pytest.FixtureRequest) -> Pi05:
    config = dataclasses.replace(PRESETS["pi05"], horizon=request.param)
    return random_model(config, device="cuda", dtype="bfloat16")


def case_of(model: Pi05, precision: Precision) -> Case:
    return dataclasses.replace(standard_case(precision), horizon=model.config.horizon)


def call_with(model: Pi05, cameras: Sequence[bool], length: int, seed: int) -> EngineCall:
    case = case_of(model, "bf16")
    inputs, noise = random_inputs(model.config, case, seed)
    masked = dataclasses.replace(
        inputs,
        image_mask=torch.tensor([list(cameras)]),
        token_mask=torch.arange(case.prompt_tokens)[None] < length,
    )
    return masked, noise, case.steps


def random_calls(model: Pi05, count: int) -> list[EngineCall]:
    rng = random.Random(0)
    return [call_with(model, rng.choice(SETS), rng.randint(1, 200), seed) for seed in range(count)]


def planned(model: Pi05, precision: Precision) -> Engine:
    case = case_of(model, precision)
    scales = random_scales(model, case) if precision == "fp8" else None
    return make_engine(model, engine_config(case, "triton"), scales=scales)


def exact(model: Pi05) -> EagerEngine:
    return EagerEngine(copy.deepcopy(model).to_dtype(torch.float32))


def test_bf16_errs_at_most_twice_what_eager_errs(model: Pi05) -> None:
    truth, plain, engine = exact(model), EagerEngine(model), planned(model, "bf16")
    for call in random_calls(model, 10):
        expected, theirs, ours = (one.run(*call)[0] for one in (truth, plain, engine))
        assert (ours - expected).norm() <= 2 * (theirs - expected).norm()


def test_actions_in_fp8_point_where_those_in_fp32_do(model: Pi05) -> None:
    truth, engine = exact(model), planned(model, "fp8")
    calls = [call_with(model, [True] * 3, 200, seed) for seed in range(10)]
    expected, actions = (
        torch.stack([one.run(*call)[0] for call in calls]).flatten() for one in (truth, engine)
    )
    assert torch.cosine_similarity(expected, actions, 0) >= 0.999


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_thousand_calls_equal_fresh_captures(model: Pi05, precision: Precision) -> None:
    assert_calls_equal_fresh_captures(lambda: planned(model, precision), random_calls(model, 50))
