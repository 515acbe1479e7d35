"""`infer_many` gives what `infer` gives, whatever its calls ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from halfpi.batching import Call, can_batch, infer_many
from halfpi.model import Guidance
from halfpi.policy import Policy
from halfpi.types import ActionChunk, Observation

if TYPE_CHECKING:
    from tests.serving.conftest import Loopback

RANDOM = np.random.default_rng(3)


def floats(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return RANDOM.standard_normal(shape).astype(np.float32)


def guidance(max_gain: float) -> Guidance:
    return Guidance(torch.from_numpy(floats(7, 6)), torch.linspace(1, 0, 7), max_gain)


def test_calls_of_every_kind(tiny_policy: Policy, loopback: Loopback) -> None:
    observation = tiny_policy.processor.observation_from_dict(loopback.observation)
    calls = [
        Call(observation, floats(7, 6)),
        Call(observation, floats(7, 6), given=floats(2, 6)),
        Call(observation, floats(7, 6), guidance=guidance(5.0)),
        Call(observation, floats(7, 6), given=floats(2, 6), num_steps=3),
        Call(observation, floats(7, 6), guidance=guidance(5.0)),
        Call(observation, floats(7, 6), guidance=guidance(2.0)),
        Call(observation, floats(7, 6), num_steps=1),
    ]
    assert can_batch(tiny_policy)
    for call, chunk in zip(calls, infer_many(tiny_policy, calls), strict=True):
        assert isinstance(chunk, ActionChunk)
        expected = tiny_policy.infer(
            observation,
            noise=call.noise,
            given=call.given,
            guidance=call.guidance,
            num_steps=call.num_steps,
        )
        np.testing.assert_allclose(chunk.actions, expected.actions, rtol=0, atol=1e-5)
        np.testing.assert_allclose(chunk.normalized, expected.normalized, rtol=0, atol=1e-5)
        assert min(chunk.times.vision_ms, chunk.times.denoise_ms, chunk.times.processing_ms) > 0


def test_noise_is_drawn_as_calls_draw_it(tiny_policy: Policy, loopback: Loopback) -> None:
    observation = tiny_policy.processor.observation_from_dict(loopback.observation)
    tiny_policy.reseed(5)
    together = infer_many(tiny_policy, [Call(observation)] * 3)
    tiny_policy.reseed(5)
    for chunk in together:
        assert isinstance(chunk, ActionChunk)
        expected = tiny_policy.infer(observation).actions
        np.testing.assert_allclose(chunk.actions, expected, rtol=0, atol=1e-5)


def test_an_error_is_its_calls_own(tiny_policy: Policy, loopback: Loopback) -> None:
    good = tiny_policy.processor.observation_from_dict(loopback.observation)
    bad = Observation(good.images, np.array([np.nan, 0], np.float32), "go")
    calls = [Call(bad), Call(good), Call(good, given=floats(9, 6))]
    first, second, third = infer_many(tiny_policy, calls)
    assert "state must be finite" in str(first)
    assert isinstance(second, ActionChunk)
    assert "given must have shape" in str(third)
    assert isinstance(first, ValueError)
    assert isinstance(third, ValueError)
    assert infer_many(tiny_policy, []) == []
