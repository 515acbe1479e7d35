"""A policy in openpi's shape: the same actions, and one clear error for what it cannot take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from halfpi.integrations.openpi import OpenpiPolicy
from halfpi.model import Guidance
from halfpi.policy import Policy
from halfpi.types import Observation

if TYPE_CHECKING:
    from tests.serving.conftest import Loopback

NOISE = np.random.default_rng(1).standard_normal((7, 6)).astype(np.float32)

PULL = {"target": np.zeros((2, 6)), "weights": np.ones(2)}


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
    assert (
        0
        < answer.reply["policy_timing"]["infer_ms"]
        < answer.chunk.times.total_ms
        < answer.infer_ms
    )


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


def test_guidance_over_the_wire_is_that_of_the_policy(
    tiny_policy: Policy, loopback: Loopback
) -> None:
    target = np.full((3, 6), 0.7, np.float32)
    weights = np.array([1, 0.5, 0.25], np.float32)
    extras = {"noise": NOISE, "target": target, "weights": weights, "max_gain": 4}
    reply = OpenpiPolicy(tiny_policy).infer({**loopback.observation, "halfpi": extras})
    padded = torch.nn.functional.pad(torch.from_numpy(target), (0, 0, 0, 4))
    guidance = Guidance(padded, torch.tensor([1, 0.5, 0.25, 0, 0, 0, 0]), 4.0)
    observation = tiny_policy.processor.observation_from_dict(loopback.observation)
    expected = tiny_policy.infer(observation, noise=NOISE, guidance=guidance)
    assert np.array_equal(reply["actions"], expected.actions)
    free = tiny_policy.infer(observation, noise=NOISE)
    assert not np.allclose(free.actions, expected.actions, atol=1e-2)


def test_prompts_are_tokenised_once(tiny_policy: Policy, loopback: Loopback) -> None:
    policy = OpenpiPolicy(tiny_policy)
    request = {**loopback.observation, "halfpi": {"noise": NOISE}}
    first, again = policy.infer(request), policy.infer(request)
    assert policy.lookups() == (1, 1)
    assert np.array_equal(first["actions"], again["actions"])
    policy.infer({**request, "task": "stop"})
    assert policy.lookups() == (0, 1)
    assert policy.lookups() == (0, 0)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ([1], "'halfpi' must be a dictionary, got list"),
        (
            {"step": 3, "nois": 1},
            "'halfpi' has no nois, step: expected steps, noise, given, target",
        ),
        ({"steps": 0}, "'steps' must be an int from 1 to 20, got 0"),
        ({"steps": 21}, "'steps' must be an int from 1 to 20, got 21"),
        ({"steps": True}, "'steps' must be an int from 1 to 20, got True"),
        ({"normalized": 1}, "'normalized' must be true or false, got int"),
        ({"noise": [[0.0]]}, "'noise' must be a float array, got list"),
        ({"given": np.zeros((2, 6), int)}, "'given' must be a float array, got int64 array"),
        ({"given": np.zeros((8, 6))}, r"given must have shape \(0 to 7, 6\), got \(8, 6\)"),
        ({"noise": np.zeros((7, 5))}, r"noise must have shape \(7, 6\), got \(7, 5\)"),
        ({"noise": np.full((7, 6), np.nan)}, "noise must be finite"),
        ({"target": np.zeros((2, 6))}, "guidance needs both 'target' and 'weights'"),
        ({**PULL, "target": np.zeros((8, 6))}, r"'target' must have shape \(1 to 7, 6\), got"),
        ({**PULL, "target": np.zeros(())}, r"'target' must have shape .*, got \(\)"),
        ({**PULL, "target": np.full((2, 6), np.nan)}, "the guidance's target must be finite"),
        ({**PULL, "weights": np.ones(3)}, r"'weights' must have shape \(2,\), got \(3,\)"),
        ({**PULL, "weights": np.array([0, 1.5])}, r"'weights' must be in \[0, 1\], got"),
        ({**PULL, "weights": np.array([0, np.nan])}, r"'weights' must be in \[0, 1\], got"),
        ({**PULL, "max_gain": 0}, "'max_gain' must be a positive number, got 0"),
        ({**PULL, "max_gain": float("nan")}, "'max_gain' must be a positive number, got nan"),
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
