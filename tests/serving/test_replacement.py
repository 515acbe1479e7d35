"""Replacing the policy: when asked to, and when it hangs. What is broken never gets to serve."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from halfpi.policy import Policy
from halfpi.serving.dispatcher import ReloadError
from halfpi.serving.wire import packb

if TYPE_CHECKING:
    from tests.serving.conftest import Loopback


class Versions:
    """A factory whose nth policy acts as the nth of `acts`; an exception is raised instead."""

    def __init__(self, loopback: Loopback, *acts: Callable[[Any], float] | Exception) -> None:
        self._loopback, self._acts = loopback, list(acts)
        self.built = 0

    def __call__(self) -> Policy:
        act = self._acts[self.built]
        self.built += 1
        if isinstance(act, Exception):
            raise act
        return self._loopback.policy(act)


def constant(value: float) -> Callable[[Any], float]:
    return lambda _: value


def hang(release: Event) -> Callable[[Any], float]:
    def act(_: object) -> float:
        assert release.wait(30)
        return 0.0

    return act


def value(reply: Any) -> float:
    return float(np.unique(reply["actions"]).item())


async def test_a_reload_drops_no_connection(loopback: Loopback) -> None:
    versions = Versions(loopback, constant(1), constant(2))
    async with loopback.serve(versions) as server, loopback.connect(server) as socket:
        await socket.recv()
        assert value(await loopback.ask(socket)) == 1
        await server.reload()
        assert value(await loopback.ask(socket)) == 2
        assert 'halfpi_reloads_total{outcome="done"} 1.0' in server.metrics.text()


async def test_calls_go_on_while_a_policy_loads(loopback: Loopback) -> None:
    load = Event()
    policies = iter([constant(1), constant(2)])

    def slow_factory() -> Policy:
        act = next(policies)
        if act(None) == 2:
            assert load.wait(30)
        return loopback.policy(act)

    async with loopback.serve(slow_factory) as server, loopback.connect(server) as socket:
        await socket.recv()
        reload = asyncio.create_task(server.reload())
        for _ in range(20):
            assert value(await loopback.ask(socket)) == 1
        load.set()
        await reload
        assert value(await loopback.ask(socket)) == 2


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ValueError("model.safetensors: header is damaged"), "ValueError: model.safetensors: head"),
        (MemoryError("no room for the weights"), "MemoryError: no room for the weights"),
        (constant(float("nan")), "actions must be finite"),
    ],
)
async def test_a_broken_checkpoint_never_serves(
    loopback: Loopback, broken: Any, message: str
) -> None:
    versions = Versions(loopback, constant(1), broken, constant(3))
    async with loopback.serve(versions) as server, loopback.unharmed(server):
        socket = await loopback.connect(server)
        await socket.recv()
        assert value(await loopback.ask(socket)) == 1
        with pytest.raises(ReloadError, match=message):
            await server.reload()
        assert value(await loopback.ask(socket)) == 1
        assert 'halfpi_reloads_total{outcome="failed"} 1.0' in server.metrics.text()
        await server.reload()
        assert value(await loopback.ask(socket)) == 3
        await socket.close()


async def test_a_policy_for_another_robot_never_serves(loopback: Loopback) -> None:
    policies = [loopback.policy(), loopback.policy(horizon=3)]
    async with loopback.serve(lambda: policies.pop(0)) as server:
        await loopback.assert_serves(server)
        message = r"actions have shape \(3, 4\), but clients are used to \(7, 4\)"
        with pytest.raises(ReloadError, match=message):
            await server.reload()
        await loopback.assert_serves(server)


async def test_a_policy_that_hangs_is_replaced(loopback: Loopback) -> None:
    release = Event()
    versions = Versions(loopback, hang(release), constant(2))
    async with loopback.serve(versions, deadline_s=1) as server:
        began = time.perf_counter()
        async with loopback.connect(server) as other:
            await other.recv()
            offender = asyncio.create_task(loopback.fault(server))
            await asyncio.sleep(0.5)
            reply = asyncio.create_task(loopback.ask(other))
            assert await offender == "deadline of 1 s exceeded in the policy"
            assert 1 <= time.perf_counter() - began < 3
            assert value(await reply) == 2  # it waited, and its deadline had not come
        await loopback.assert_serves(server)
        assert versions.built == 2
        assert (await loopback.get(server, "/healthz"))[0] == 200
        release.set()


async def test_a_policy_that_recovers_is_kept(loopback: Loopback) -> None:
    release = Event()
    act = hang(release)
    versions = Versions(loopback, act, *[ValueError("the disk is gone")] * 20)
    async with loopback.serve(versions, deadline_s=0.2) as server:
        assert "in the policy" in await loopback.fault(server)
        assert "waiting for the policy" in await loopback.fault(server)
        assert (await loopback.get(server, "/healthz"))[::2] == (503, "the policy hangs\n")
        assert "halfpi_policy_hangs 1.0" in server.metrics.text()
        release.set()
        await loopback.assert_serves(server)
        assert (await loopback.get(server, "/healthz"))[0] == 200
        assert versions.built > 1


async def test_policies_that_hang_do_not_pile_up(loopback: Loopback) -> None:
    release = Event()
    versions = Versions(loopback, hang(release), hang(release), constant(3))
    async with loopback.serve(versions, deadline_s=0.1) as server:
        for _ in range(6):
            assert "deadline of 0.1 s exceeded" in await loopback.fault(server)
        assert versions.built == 2
        release.set()
        await asyncio.sleep(0.05)
        await loopback.assert_serves(server)


async def test_a_late_answer_is_nobodys(loopback: Loopback) -> None:
    release = Event()
    calls = 0

    def act(_: object) -> float:
        nonlocal calls
        calls += 1
        if calls == 1:
            assert release.wait(30)
        return float(calls)

    versions = Versions(loopback, act, ValueError("the disk is gone"))
    async with loopback.serve(versions, deadline_s=0.5) as server:
        assert "in the policy" in await loopback.fault(server)
        async with loopback.connect(server) as socket:
            await socket.recv()
            await socket.send(packb(loopback.observation))
            await asyncio.sleep(0.05)
            release.set()
            assert value(loopback.read(await socket.recv())) == 2
