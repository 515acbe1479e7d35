"""Reuse on the eager engine: off it changes nothing, and a hit is what would be computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from halfpi.config import Pi05Config, ProcessingConfig
from halfpi.engine import EagerEngine
from halfpi.model import Guidance, Pi05
from halfpi.policy import Policy
from halfpi.processing.pipeline import Processor
from halfpi.runtime import (
    Asynchronous,
    ControlLoop,
    GuidedRtc,
    ReuseConfig,
    ReusingPolicy,
    Scheduler,
    TrainedRtc,
    VirtualClock,
)
from halfpi.types import Keep, Observation

CAMERAS = ("scene", "wrist")
# Between a camera encoded alone and both together, whose products are summed in another order. One
# grey level more in a picture's corner moves the actions a hundred times as far.
ROUNDING = 1e-4
PICTURE = np.random.default_rng(7).integers(0, 256, (40, 56, 3), np.uint8)


class WordTokenizer:
    """A word is the sum of its bytes."""

    bos_id, pad_id, vocab_size = 1, 0, 96

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return [2 + sum(word.encode()) % 94 for word in text.split()]


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture
def policy(
    random_pi05: Callable[..., Pi05], tiny_config: Pi05Config, tokenizer: WordTokenizer
) -> Policy:
    processing = ProcessingConfig(
        cameras=CAMERAS, image_size=28, robot_action_dim=4, max_prompt_tokens=12
    )
    processor = Processor(processing, tiny_config.action_dim, tokenizer)
    return Policy(processor, EagerEngine(random_pi05()), num_steps=3)


def observation(
    scene: int = 0, wrist: int = 0, state: float = 0.1, prompt: str = "lift"
) -> Observation:
    """Pictures are `PICTURE`, brighter by `scene` and `wrist` in one corner."""
    images = {}
    for camera, change in zip(CAMERAS, (scene, wrist), strict=True):
        images[camera] = PICTURE // 2
        images[camera][:20, :28] += np.uint8(change)
    return Observation(images, np.array([state, -state], np.float32), prompt)


NOISE = np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32)


def infer(policy: Policy | ReusingPolicy, seen: Observation) -> NDArray[np.float32]:
    return policy.infer(seen, noise=NOISE).normalized


def varied() -> Iterator[Observation]:
    for step in range(6):
        yield observation(scene=20 * step, wrist=10 * step, state=0.1 * step)


def test_without_reuse_actions_are_those_of_plain_calls_to_the_bit(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig())
    plain = [policy.infer(seen).actions for seen in varied()]
    policy.reseed(0)
    same = [reusing.infer(seen).actions for seen in varied()]
    for ours, theirs in zip(same, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert reusing.reports == {}


def test_a_camera_that_has_not_changed_gives_what_encoding_it_again_gives(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(camera_change=0.0, always_encode=("wrist",)))
    infer(reusing, observation())
    seen = observation(wrist=90, state=0.4)
    hit = infer(reusing, seen)
    np.testing.assert_allclose(hit, infer(policy, seen), atol=ROUNDING)
    report = reusing.reports["camera scene"]
    assert (report.hits, report.misses, report.age) == (1, 1, 1)
    assert set(reusing.reports) == {"camera scene"}


def test_a_kept_camera_is_not_looked_at(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(camera_change=0.2, always_encode=("wrist",)))
    infer(reusing, observation())
    kept = infer(reusing, observation(scene=40, wrist=90))  # a change of 40 / 255
    np.testing.assert_allclose(kept, infer(policy, observation(wrist=90)), atol=ROUNDING)


def test_change_is_counted_from_what_was_encoded_not_from_the_last_picture(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(camera_change=0.2, always_encode=("wrist",)))
    for scene in (0, 30, 60, 90, 120):  # each a change of 0.12
        last = infer(reusing, observation(scene=scene))
    report = reusing.reports["camera scene"]
    assert (report.misses, report.hits) == (3, 2)
    np.testing.assert_array_equal(last, infer(policy, observation(scene=120)))


def test_the_wrist_camera_is_always_encoded(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(camera_change=1.0, always_encode=("wrist",)))
    infer(reusing, observation())
    fresh = infer(reusing, observation(scene=120, wrist=120))
    np.testing.assert_allclose(fresh, infer(policy, observation(wrist=120)), atol=ROUNDING)


def test_image_tokens_age_no_further_than_allowed(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(camera_change=1.0, max_age=2))
    for _ in range(7):
        infer(reusing, observation())
    for camera in CAMERAS:
        report = reusing.reports[f"camera {camera}"]
        assert (report.misses, report.hits, report.max_age) == (3, 4, 2)


def test_image_tokens_also_age_in_calls_that_keep_the_prefix(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(camera_change=1.0, max_age=4, prefix_calls=2))
    for _ in range(9):
        infer(reusing, observation())
    # Prefixes are computed in calls 0, 2, 4, 6 and 8; in call 6 the tokens would be 6 calls old.
    report = reusing.reports["camera scene"]
    assert (report.misses, report.hits, report.max_age) == (2, 3, 4)


def test_a_camera_may_come_and_go(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(camera_change=0.0, always_encode=("wrist",)))
    both = observation()
    alone = Observation({"wrist": both.images["wrist"]}, both.state, both.prompt)
    infer(reusing, both)
    np.testing.assert_array_equal(infer(reusing, alone), infer(policy, alone))
    np.testing.assert_allclose(infer(reusing, both), infer(policy, both), atol=ROUNDING)


def test_a_prefix_serves_as_many_calls_as_asked(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(prefix_calls=3))
    seen = [observation(scene=40 * step, state=0.1 * step) for step in range(4)]
    actions = [infer(reusing, each) for each in seen]
    for kept in actions[1:3]:
        np.testing.assert_array_equal(kept, actions[0])  # the same prefix and noise
    np.testing.assert_array_equal(actions[3], infer(policy, seen[3]))
    report = reusing.reports["prefix"]
    assert (report.hits, report.misses, report.max_age) == (2, 2, 2)


def test_a_kept_prefix_equals_computing_the_same_frame_again(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(prefix_calls=2))
    infer(reusing, observation())
    chunk = reusing.infer(observation(), noise=-NOISE)
    again = policy.infer(observation(), noise=-NOISE)
    np.testing.assert_array_equal(chunk.normalized, again.normalized)
    assert chunk.times.vision_ms == chunk.times.prefill_ms == 0 < chunk.times.denoise_ms


def test_actions_of_a_kept_prefix_are_relative_to_the_state_it_has_seen(policy: Policy) -> None:
    config = dataclasses.replace(policy.processor.config, delta_mask=(True,))
    policy.processor = Processor(config, policy.processor.action_dim, policy.processor.tokenizer)
    reusing = ReusingPolicy(policy, ReuseConfig(prefix_calls=2))
    chunks = [reusing.infer(observation(state=state)) for state in (0.25, 0.5, 0.75)]
    assert [chunk.age for chunk in chunks] == [0, 1, 0]
    offsets = [chunk.actions[:, 0] - chunk.normalized[:, 0] for chunk in chunks]
    np.testing.assert_allclose(np.stack(offsets)[:, 0], [0.25, 0.25, 0.75], atol=1e-6)


def test_a_call_that_is_told_of_the_plan_computes_its_prefix(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(prefix_calls=5))
    guidance = Guidance(torch.zeros(7, 6), torch.zeros(7))
    infer(reusing, observation())
    assert reusing.infer(observation(scene=9), given=NOISE[:1]).age == 0
    assert reusing.infer(observation(scene=9), guidance=guidance).age == 0
    assert reusing.reports["prefix"].hits == 0


@pytest.mark.parametrize("change", ["prompt", "cameras", "reset", "failure"])
def test_a_prefix_is_not_kept_beyond(policy: Policy, change: str) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(prefix_calls=5))
    infer(reusing, observation())
    seen = observation(scene=100)
    if change == "prompt":
        seen = observation(prompt="push")
    elif change == "cameras":
        seen = Observation({"wrist": seen.images["wrist"]}, seen.state, seen.prompt)
    elif change == "reset":
        reusing.reset()
    else:
        with pytest.raises(ValueError, match="noise must have shape"):
            reusing.infer(seen, noise=NOISE[1:])
    np.testing.assert_array_equal(infer(reusing, seen), infer(policy, seen))


def test_prompt_tokens_are_looked_up(policy: Policy, tokenizer: WordTokenizer) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(prompt_tokens=True))
    actions = [infer(reusing, observation(state=state)) for state in (0.1, 0.9, 0.1)]
    assert len(tokenizer.texts) == 2
    np.testing.assert_array_equal(actions[0], actions[2])
    report = reusing.reports["prompt"]
    assert (report.hits, report.misses) == (1, 2)
    assert policy.processor.tokenizer is tokenizer


def test_saved_milliseconds_are_those_of_a_miss_less_the_deciding(policy: Policy) -> None:
    report = ReusingPolicy(policy, ReuseConfig(prefix_calls=2)).reports["prefix"]
    report.miss(10.0)
    report.miss(20.0, overhead_ms=1.0)
    report.hit(age=1, overhead_ms=2.0)
    report.hit(age=2)
    assert report.saved_ms == pytest.approx(2 * 15 - 3)
    assert repr(report) == "ReuseReport(hits=2, misses=2, age=2, max_age=2, saved_ms=27.0)"


def test_reuse_saves_time(policy: Policy) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(prefix_calls=4))
    for _ in range(12):
        infer(reusing, observation())
    assert reusing.reports["prefix"].saved_ms > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"camera_change": 1.5}, r"camera_change must be in \[0, 1\], got 1.5"),
        ({"max_age": 0}, "max_age must be at least 1, got 0"),
        ({"prefix_calls": 0}, "prefix_calls must be at least 1, got 0"),
        ({"always_encode": ("hand",)}, "always_encode has camera 'hand': expected one of"),
    ],
)
def test_bad_settings_are_refused(policy: Policy, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReusingPolicy(policy, ReuseConfig(**settings))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (Keep(prefix=True), "there is no prefix to keep: no call came before this one"),
        (Keep(frozenset({"scene"})), "camera 0 has no image tokens to keep: it was never encoded"),
        (Keep(frozenset({"hand"})), "cannot keep camera 'hand': expected one of"),
    ],
)
def test_nothing_can_be_kept_that_is_not_there(policy: Policy, keep: Keep, message: str) -> None:
    policy.infer(observation())
    policy.reset()
    with pytest.raises(ValueError, match=message):
        policy.infer(observation(), keep=keep)


@pytest.mark.parametrize(
    ("target", "weights", "message"),
    [
        (torch.zeros(7, 5), torch.zeros(7), r"target must have shape \(7, 6\), got \(7, 5\)"),
        (torch.zeros(7, 6), torch.zeros(6), r"weights must have shape \(7,\), got \(6,\)"),
        (torch.zeros(7, 6) / 0, torch.zeros(7), "target must be finite"),
    ],
)
def test_a_guidance_that_does_not_fit_is_refused(
    policy: Policy, target: torch.Tensor, weights: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        policy.infer(observation(), guidance=Guidance(target, weights))


class StillRobot:
    def __init__(self) -> None:
        self.actions: list[NDArray[np.float32]] = []

    def reset(self) -> None:
        pass

    def observe(self) -> Observation:
        return observation(scene=len(self.actions) % 100)

    def act(self, action: NDArray[np.float32]) -> None:
        self.actions.append(action)


@pytest.mark.parametrize(
    "scheduler", [Asynchronous(4), GuidedRtc(4, execution_horizon=5), TrainedRtc(4, 3)]
)
def test_a_loop_runs_the_real_policy_with_reuse(policy: Policy, scheduler: Scheduler) -> None:
    reusing = ReusingPolicy(policy, ReuseConfig(camera_change=0.1, prefix_calls=2))
    robot = StillRobot()
    clock = VirtualClock(iter([0.2] * 100))
    report = ControlLoop(reusing, robot, 10.0, scheduler, clock=clock).run(40)
    assert report.failed_calls == report.held_ticks == 0
    assert len(robot.actions) == 38
    assert all(action.shape == (4,) for action in robot.actions)


def test_given_actions_continue_the_plan_without_a_seam(policy: Policy) -> None:
    robot = StillRobot()
    clock = VirtualClock(iter([0.2] * 100))
    loop = ControlLoop(policy, robot, 10.0, TrainedRtc(4, 3), clock=clock)
    chunks = []
    infer = policy.infer

    def spy(*args: Any, **kwargs: Any) -> Any:
        chunks.append(infer(*args, **kwargs))
        return chunks[-1]

    policy.infer = spy  # type: ignore[method-assign]
    loop.run(20)
    # From the third call on the delay is known: two actions, which both chunks share.
    for before, after in pairwise(chunks[1:]):
        overlap = after.actions[:2]
        assert any(np.array_equal(overlap, before.actions[i : i + 2]) for i in range(1, 6))
