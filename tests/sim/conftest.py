"""Environments of Meta-World for tests: made once, closed at the end, skipped without OpenGL."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from halfpi.sim.environment import MetaWorldEnvironment
from halfpi.sim.rendering import RenderingUnavailableError
from halfpi.sim.tasks import TASKS

SIZE = 112
MakeEnvironment = Callable[[str], MetaWorldEnvironment]


@pytest.fixture(scope="session")
def environment_of() -> Iterator[MakeEnvironment]:
    """The environment of a task by its name, shared by all tests: each resets it first."""
    made: dict[str, MetaWorldEnvironment] = {}

    def make(name: str) -> MetaWorldEnvironment:
        if name not in made:
            try:
                made[name] = MetaWorldEnvironment(TASKS[name], SIZE)
            except RenderingUnavailableError as error:
                pytest.skip(str(error))
        return made[name]

    yield make
    for environment in made.values():
        environment.close()


@pytest.fixture
def environment(environment_of: MakeEnvironment) -> MetaWorldEnvironment:
    """A task that policy and expert solve in a few dozen steps."""
    return environment_of("window-close")
