"""An episode is its seed's; asking the expert changes nothing; experts solve their tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from tests.sim.conftest import SIZE, MakeEnvironment

from halfpi.sim.environment import ACTION_DIM, MAX_STEPS, STATE_DIM, MetaWorldEnvironment
from halfpi.sim.rendering import CAMERAS

Moment = list[NDArray[Any]]


def moment(environment: MetaWorldEnvironment) -> Moment:
    """Everything that can be seen of the present."""
    observation = environment.observe()
    images = [observation.images[name] for name in CAMERAS]
    return [environment.full_state.copy(), observation.state, *images]


def play(environment: MetaWorldEnvironment, seed: int, steps: int) -> list[Moment]:
    """The first and the last moment of an episode of random actions."""
    generator = np.random.default_rng(seed)
    environment.reset(seed)
    first = moment(environment)
    for _ in range(steps):
        environment.act(generator.uniform(-1, 1, ACTION_DIM).astype(np.float32))
    return [first, moment(environment)]


def assert_same(first: Moment, second: Moment) -> None:
    for one, other in zip(first, second, strict=True):
        assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["window-close", "push", "door-open"])
def test_a_seed_gives_the_same_episode_bit_for_bit_after_others(
    environment_of: MakeEnvironment, name: str
) -> None:
    environment = environment_of(name)
    before = play(environment, 5, 20)
    play(environment, 6, 35)
    environment.expert_chunk(16)
    for one, other in zip(before, play(environment, 5, 20), strict=True):
        assert_same(one, other)


def test_seeds_give_different_scenes(environment: MetaWorldEnvironment) -> None:
    starts = [play(environment, seed, 0)[0] for seed in (1, 2)]
    assert (starts[0][0] != starts[1][0]).any()
    assert (starts[0][2] != starts[1][2]).any()


def test_an_observation_is_what_the_policy_expects(environment: MetaWorldEnvironment) -> None:
    environment.reset(0)
    observation = environment.observe()
    assert [*observation.images] == [*CAMERAS]
    for image in observation.images.values():
        assert image.shape == (SIZE, SIZE, 3)
        assert image.dtype == np.uint8
        assert image.std() > 10  # something is in view
    assert observation.state.shape == (STATE_DIM,)
    assert observation.state.dtype == np.float32
    assert observation.prompt == environment.task.instruction
    assert environment.observe("dance").prompt == "dance"


def test_an_observation_does_not_change_when_the_scene_does(
    environment: MetaWorldEnvironment,
) -> None:
    environment.reset(0)
    before = moment(environment)
    kept = [value.copy() for value in before]
    for _ in range(15):
        environment.act(environment.expert_action())
    moment(environment)
    assert_same(before, kept)


@pytest.mark.parametrize("name", ["window-close", "push", "hammer", "assembly"])
def test_the_expert_chunk_leaves_the_simulation_as_it_was(
    environment_of: MakeEnvironment, name: str
) -> None:
    environment = environment_of(name)

    def episode(ask: bool) -> list[Moment]:
        environment.reset(3)
        moments = []
        for step in range(60):
            if ask and step % 7 == 0:
                environment.expert_chunk(16)
            environment.act(environment.expert_action())
            if step % 20 == 19:
                moments.append(moment(environment))
        return moments

    for plain, asked in zip(episode(False), episode(True), strict=True):
        assert_same(plain, asked)


def test_the_expert_chunk_is_what_the_expert_then_does(environment: MetaWorldEnvironment) -> None:
    environment.reset(4)
    for _ in range(9):
        environment.act(environment.expert_action())
    chunk = environment.expert_chunk(16)
    assert chunk.shape == (16, ACTION_DIM)
    assert chunk.dtype == np.float32
    assert np.abs(chunk).max() <= 1
    for action in chunk:
        assert_array_equal(environment.expert_action(), action)
        environment.act(action)


def test_actions_are_clipped(environment: MetaWorldEnvironment) -> None:
    states = []
    for size in (1.0, 50.0):
        environment.reset(0)
        for _ in range(5):
            environment.act(np.full(ACTION_DIM, size))
        states.append(environment.full_state.copy())
    assert_array_equal(states[0], states[1])


@pytest.mark.parametrize(
    "name",
    ["window-close", "drawer-open", "faucet-open", "door-close", "push", "button-press-topdown"],
)
def test_the_expert_solves_easy_seeds(environment_of: MakeEnvironment, name: str) -> None:
    environment = environment_of(name)
    for seed in (0, 1):
        environment.reset(seed)
        assert any(environment.act(environment.expert_action()) for _ in range(MAX_STEPS)), seed
