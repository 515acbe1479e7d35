"""The policy as users hold it: what it accepts, what it repeats, and nano, which ships with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from tests.conftest import TINY

from halfpi.checkpoints import CheckpointError, load_model, save_model
from halfpi.config import FeatureStats, Pi05Config, ProcessingConfig
from halfpi.engine import EagerEngine
from halfpi.model import Pi05
from halfpi.policy import NANO, Policy, load_policy
from halfpi.sim.demo import RECORDED_FRAMES
from halfpi.sim.record import Frames
from halfpi.sim.rendering import CAMERAS
from halfpi.sim.tasks import select
from halfpi.types import ActionChunk, Observation


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("nano", device="cpu", num_steps=2)


def observation(seed: int = 0, cameras: tuple[str, ...] = ("scene", "wrist")) -> Observation:
    generator = np.random.default_rng(seed)
    images = {name: generator.integers(0, 256, (112, 112, 3), np.uint8) for name in cameras}
    return Observation(images, np.array([0.0, 0.6, 0.2, 1.0], np.float32), "open the door")


def noise(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(16, 4)).astype(np.float32)


def save_tiny(model: Pi05, target: Path, **processing: Any) -> Path:
    config = ProcessingConfig(
        cameras=("left", "right"),
        image_size=TINY.image_size,
        max_prompt_tokens=TINY.max_prompt_tokens,
        robot_action_dim=TINY.action_dim,
        **processing,
    )
    tokenizer = NANO / "tokenizer.json"
    return save_model(model, config, target, tokenizer=tokenizer)


def test_nano_is_small() -> None:
    assert sum(file.stat().st_size for file in NANO.iterdir()) < 10_000_000
    parameters = sum(tensor.numel() for tensor in load_model(NANO).state_dict().values())
    assert parameters <= 5_000_000


def test_nano_has_the_shape_that_kernels_want(policy: Policy) -> None:
    config: Pi05Config = policy.engine.config
    for name in ("vision_width", "prefix_width", "expert_width", "head_dim", "vision_head_dim"):
        assert getattr(config, name) % 64 == 0, name
    assert config.patch_size == 14
    assert policy.processor.config.cameras == ("scene", "wrist")
    assert policy.horizon == config.horizon == 16


def test_nano_holds_exactly_the_tensors_of_its_model(policy: Policy) -> None:
    expected = Pi05(policy.engine.config).state_dict()
    loaded = load_model(NANO).state_dict()
    assert {name: t.shape for name, t in loaded.items()} == {
        name: t.shape for name, t in expected.items()
    }


def test_a_chunk_is_in_the_robots_units(policy: Policy) -> None:
    chunk = policy.infer(observation())
    assert chunk.actions.shape == chunk.normalized.shape == (16, 4)
    assert chunk.actions.dtype == chunk.normalized.dtype == np.float32
    assert np.abs(chunk.actions).max() <= 1
    assert chunk.age == 0
    times = chunk.times
    assert min(times.processing_ms, times.vision_ms, times.prefill_ms, times.denoise_ms) > 0


def test_the_seed_decides_the_noise(policy: Policy) -> None:
    def chunks() -> list[ActionChunk]:
        policy.reseed(7)
        return [policy.infer(observation()) for _ in range(2)]

    first, again = chunks(), chunks()
    for one, other in zip(first, again, strict=True):
        assert_array_equal(one.actions, other.actions)
    assert (first[0].actions != first[1].actions).any()
    fresh = load_policy("nano", device="cpu", num_steps=2, seed=7).infer(observation())
    assert_array_equal(fresh.actions, first[0].actions)


def test_noise_of_the_caller_leaves_the_policys_own_alone(policy: Policy) -> None:
    policy.reseed(3)
    plain = policy.infer(observation()).normalized
    policy.reseed(3)
    first = policy.infer(observation(), noise=noise()).normalized
    assert_array_equal(policy.infer(observation(), noise=noise()).normalized, first)
    assert_array_equal(policy.infer(observation()).normalized, plain)


def test_num_steps_of_a_call_win(policy: Policy) -> None:
    usual = policy.infer(observation(), noise=noise()).normalized
    one = policy.infer(observation(), noise=noise(), num_steps=1).normalized
    assert (usual != one).any()
    again = policy.infer(observation(), noise=noise(), num_steps=2).normalized
    assert_array_equal(usual, again)


@pytest.mark.parametrize("decided", [0, 1, 5, 16])
def test_given_actions_come_back_as_they_were(policy: Policy, decided: int) -> None:
    given = 0.3 * noise(2)[:decided]
    chunk = policy.infer(observation(), noise=noise(), given=given)
    assert_array_equal(chunk.normalized[:decided], given)
    free = policy.infer(observation(), noise=noise()).normalized
    assert bool((chunk.normalized[decided:] != free[decided:]).any()) == (0 < decided < 16)


def test_a_missing_camera_is_masked(policy: Policy) -> None:
    both, one = observation(), observation(cameras=("scene",))
    assert_array_equal(both.images["scene"], one.images["scene"])
    chunk = policy.infer(one, noise=noise())
    assert np.isfinite(chunk.actions).all()
    assert (chunk.actions != policy.infer(both, noise=noise()).actions).any()


@pytest.mark.parametrize("name", ["noise", "given"])
@pytest.mark.parametrize("shape", [(17, 4), (16, 5), (16,), (1, 16, 4)])
def test_actions_of_another_shape_are_an_error(
    policy: Policy, name: str, shape: tuple[int, ...]
) -> None:
    arguments: dict[str, Any] = {name: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=rf"{name} must have shape \(.*16, 4\), got \({shape[0]}"):
        policy.infer(observation(), **arguments)


def test_noise_must_fill_the_horizon(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"noise must have shape \(16, 4\), got \(15, 4\)"):
        policy.infer(observation(), noise=noise()[:15])


@pytest.mark.parametrize("name", ["noise", "given"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_actions_must_be_finite(policy: Policy, name: str, value: float) -> None:
    arguments: dict[str, Any] = {name: np.full((16, 4), value, np.float32)}
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        policy.infer(observation(), **arguments)


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, "10"])
def test_num_steps_must_be_a_positive_int(policy: Policy, num_steps: Any) -> None:
    expected = f"num_steps must be an int of at least 1, got {num_steps!r}"
    with pytest.raises(ValueError, match=expected):
        policy.infer(observation(), num_steps=num_steps)
    with pytest.raises(ValueError, match=expected):
        Policy(policy.processor, policy.engine, num_steps=num_steps)


def test_a_checkpoint_without_statistics_is_refused(
    random_pi05: Callable[..., Pi05], tmp_path: Path
) -> None:
    path = save_tiny(random_pi05(), tmp_path / "policy")
    with pytest.raises(ValueError, match=r"no normalisation statistics of the state.*overrides"):
        load_policy(path, device="cpu")
    stats = FeatureStats(q01=(0.0,) * 6, q99=(1.0,) * 6)
    half = save_tiny(random_pi05(), tmp_path / "half", state_stats=stats)
    with pytest.raises(ValueError, match="no normalisation statistics of the action"):
        load_policy(half, device="cpu")
    identity = {"state_norm": "identity", "action_norm": "identity"}
    policy = load_policy(path, device="cpu", processing_overrides=identity)
    assert policy.horizon == TINY.horizon


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"processing_overrides": {"resise": "pil"}}, "resise"),
        ({"depht": 3}, "depht"),
        ({"depth": 3}, "depth"),
        ({"precision": "fp16"}, "fp16"),
        ({"num_steps": 0}, "num_steps"),
        ({"tokenizer": "nowhere/tokenizer.json"}, "nowhere/tokenizer.json"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_policy("nano", device="cpu", **options)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing-here does not exist"):
        load_policy(tmp_path / "nothing-here")


def test_bf16_is_close_to_fp32(policy: Policy) -> None:
    narrow = load_policy("nano", device="cpu", precision="bf16", num_steps=2)
    assert isinstance(narrow.engine, EagerEngine)
    assert narrow.engine.model.dtype == torch.bfloat16
    one, other = (p.infer(observation(), noise=noise()).normalized for p in (policy, narrow))
    assert 0 < np.abs(one - other).max() < 0.2


def recorded_moments() -> list[Observation]:
    """What nano's cameras see on the way to the object, in each precise task."""
    frames = Frames.load(RECORDED_FRAMES)
    return [
        Observation(dict(zip(CAMERAS, images, strict=True)), state, task.instruction)
        for images, state, task in zip(
            frames.images, frames.states, select(["precise"]), strict=True
        )
    ]


def test_nano_brings_the_scales_of_fp8_and_is_close_to_fp32() -> None:
    wide, narrow, halved = (
        load_policy("nano", device="cpu", precision=each) for each in ("fp32", "fp8", "bf16")
    )
    errors, least = [], []
    for moment in recorded_moments():
        expected, fp8, bf16 = (
            each.infer(moment, noise=noise()).normalized for each in (wide, narrow, halved)
        )
        norm = np.linalg.norm(expected)
        errors.append(np.linalg.norm(fp8 - expected) / norm)
        least.append(np.linalg.norm(bf16 - expected) / norm)
    assert len(errors) == 6
    assert np.median(least) < np.median(errors) < 0.03
    # Where the hand is about to close, a little decides whether it does so an action later.
    assert max(errors) < 0.5
