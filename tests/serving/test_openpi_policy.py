"""A policy in openpi's shape: the same actions, and one clear error for what it cannot take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from halfpi.integrations.openpi import OpenpiPolicy
from halfpi.policy import Policy
from halfpi.types import Observation

if TYPE_CHECKING:
    from tests.serving.conftest import Loopback

NOISE = np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32)


def test_a_dictionary_gives_the_actions_of_its_observation(
    tiny_policy: Policy, loopback: Loopback
) -> None:
    data = loopback.observation
    observation = Observation(
        {"base": data["observation.images.base"], "wrist": data["observation.images.wrist"]},
        data["observation.state"],
        "go",
    )
    reply = OpenpiPolicy(tiny_policy).infer({**data, "halfpi": {"noise": NOISE}})
    chunk = tiny_policy.infer(observation, noise=NOISE)
    assert np.array_equal(reply["actions"], chunk.actions)
    assert reply["actions"].dtype == np.float32
    assert np.ptp(reply["actions"]) > 0.1


def test_a_reply_holds_what_openpi_sends_and_no_more(
    tiny_policy: Policy, loopback: Loopback
) -> None:
    answer = OpenpiPolicy(tiny_policy).answer(loopback.observation)
    assert list(answer.reply) == ["actions", "policy_timing"]
    assert list(answer.reply["policy_timing"]) == ["infer_ms"]
    assert 0 < answer.reply["policy_timing"]["infer_ms"] < answer.times.total_ms < answer.infer_ms


def test_extras_reach_the_policy(tiny_policy: Policy, loopback: Loopback) -> None:
    policy = OpenpiPolicy(tiny_policy)

    def infer(**extras: Any) -> dict[str, Any]:
        return policy.infer({**loopback.observation, "halfpi": {"noise": NOISE, **extras}})

    plain = infer(normalized=True)
    assert plain["normalized"].shape == (7, 6)
    assert np.array_equal(plain["normalized"][:, :4], plain["actions"])  # nothing is normalised
    assert not np.allclose(infer(steps=1)["actions"], plain["actions"], atol=1e-3)
    given = plain["normalized"][:3] + 1
    assert np.allclose(infer(given=given)["actions"][:3], given[:, :4], atol=1e-5)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ([1], "'halfpi' must be a dictionary, got list"),
        ({"step": 3, "nois": 1}, "'halfpi' has no nois, step: expected steps, noise, given, norm"),
        ({"steps": 0}, "'steps' must be an int from 1 to 20, got 0"),
        ({"steps": 21}, "'steps' must be an int from 1 to 20, got 21"),
        ({"steps": True}, "'steps' must be an int from 1 to 20, got True"),
        ({"normalized": 1}, "'normalized' must be true or false, got int"),
        ({"noise": [[0.0]]}, "'noise' must be a float array, got list"),
        ({"given": np.zeros((2, 6), int)}, "'given' must be a float array, got int64 array"),
        ({"given": np.zeros((8, 6))}, r"given must have shape \(0 to 7, 6\), got \(8, 6\)"),
        ({"noise": np.zeros((7, 5))}, r"noise must have shape \(7, 6\), got \(7, 5\)"),
        ({"noise": np.full((7, 6), np.nan)}, "noise must be finite"),
    ],
)
def test_bad_extras(tiny_policy: Policy, loopback: Loopback, extras: Any, message: str) -> None:
    policy = OpenpiPolicy(tiny_policy, max_steps=20)
    with pytest.raises(ValueError, match=message):
        policy.infer({**loopback.observation, "halfpi": extras})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "a" * 10_001}, "the prompt must have at most 10000 characters, got 10001"),
        ({"observation.state": np.zeros(1001)}, "state must have at most 1000 values, got 1001"),
        ({"observation.images.top": np.zeros((2, 2, 3), np.uint8)}, "unknown camera"),
    ],
)
def test_observations_that_are_refused(
    tiny_policy: Policy, loopback: Loopback, changes: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OpenpiPolicy(tiny_policy).infer({**loopback.observation, **changes})


def test_metadata(tiny_policy: Policy) -> None:
    policy = OpenpiPolicy(tiny_policy, metadata={"reset_pose": [0.0, 1.0]})
    assert policy.metadata == {
        "reset_pose": [0.0, 1.0],
        "halfpi": {
            "horizon": 7,
            "action_dim": 6,
            "robot_action_dim": 4,
            "robot": "none",
            "cameras": ["base", "wrist"],
            "steps": 3,
        },
    }
    policy.reset()
