"""Robots that wait at the same time share a pass, and nothing else."""

from __future__ import annotations

import asyncio
import time
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection

from halfpi.integrations.openpi import Answer, OpenpiPolicy
from halfpi.policy import Policy
from halfpi.serving.requests import FairQueue, Request
from halfpi.serving.wire import packb

if TYPE_CHECKING:
    from tests.serving.conftest import Loopback


def letter(inputs: Any) -> float:
    """The first letter of the instruction."""
    return float(inputs.tokens[0, 7])


class Crowd:
    """Clients whose requests wait together: the first of them is held in the policy meanwhile."""

    def __init__(self, loopback: Loopback, act: Any = letter, engine: Any = None) -> None:
        self.loopback, self.act = loopback, act
        self.entered, self.open = Event(), Event()
        self.policy = loopback.policy(self._act, engine=engine or loopback.batching)

    @property
    def passes(self) -> list[int]:
        engine: Any = self.policy.engine
        passes: list[int] = engine.passes
        return passes

    def _act(self, inputs: Any) -> float:
        self.entered.set()
        assert self.open.wait(30)
        return float(self.act(inputs))

    async def replies(self, server: Any, *changes: dict[str, Any]) -> list[Any]:
        """What each of `changes` gets that came while another request was computed."""
        sockets = [await self.loopback.connect(server) for _ in range(len(changes) + 1)]
        for socket in sockets:
            await socket.recv()
        await sockets[0].send(packb(self.loopback.observation))
        await asyncio.to_thread(self.entered.wait)
        for socket, change in zip(sockets[1:], changes, strict=True):
            await socket.send(packb({**self.loopback.observation, **change}))
        while f"halfpi_queue_depth {len(changes)}.0" not in server.metrics.text():
            await asyncio.sleep(0.005)
        self.open.set()
        return await asyncio.gather(*map(self._reply, sockets[1:]))

    async def _reply(self, socket: ClientConnection) -> Any:
        reply = self.loopback.read(await socket.recv())
        await socket.close()
        return reply


async def test_those_that_wait_are_computed_together(loopback: Loopback) -> None:
    crowd = Crowd(loopback)
    async with loopback.serve(lambda: crowd.policy, max_batch=4) as server:
        replies = await crowd.replies(server, *({"task": name} for name in "abcdef"))
        text = server.metrics.text()
    assert crowd.passes == [4, 2]
    for name, reply in zip("abcdef", replies, strict=True):
        assert np.all(reply["actions"] == 2 + ord(name))
        assert reply["policy_timing"]["infer_ms"] == 7
    assert 'halfpi_batch_size_bucket{le="1.0"} 1.0' in text
    assert 'halfpi_batch_size_bucket{le="4.0"} 3.0' in text
    assert "halfpi_batch_size_sum 7.0" in text
    assert 'halfpi_prompt_lookups_total{outcome="hit"} 0.0' in text
    assert 'halfpi_prompt_lookups_total{outcome="miss"} 7.0' in text


@pytest.mark.parametrize("max_batch", [1, 8])
async def test_servers_that_may_not_and_engines_that_cannot_take_one_at_a_time(
    loopback: Loopback, max_batch: int
) -> None:
    crowd = Crowd(loopback, engine=loopback.batching if max_batch == 1 else loopback.single)
    async with loopback.serve(lambda: crowd.policy, max_batch=max_batch) as server:
        replies = await crowd.replies(server, {"task": "a"}, {"task": "b"})
        assert "halfpi_batch_size_sum 3.0" in server.metrics.text()
        assert "halfpi_batch_size_count 3.0" in server.metrics.text()
    assert [reply["actions"][0, 0] for reply in replies] == [2 + ord("a"), 2 + ord("b")]


async def test_a_bad_request_harms_nobody_in_its_pass(loopback: Loopback) -> None:
    crowd = Crowd(loopback)
    nan = {"observation.state": np.array([np.nan])}
    async with loopback.serve(lambda: crowd.policy) as server:
        replies = await crowd.replies(server, {"task": "a"}, nan, {"task": "b"})
    assert crowd.passes == [2]
    assert replies[1] == "refused: state must be finite, got [nan]"
    assert [replies[i]["actions"][0, 0] for i in (0, 2)] == [2 + ord("a"), 2 + ord("b")]


async def test_a_failure_is_that_of_the_one_who_causes_it(loopback: Loopback) -> None:
    def act(inputs: Any) -> float:
        if letter(inputs) == 2 + ord("x"):
            raise RuntimeError("boom")
        return float("nan") if letter(inputs) == 2 + ord("n") else 1.0

    crowd = Crowd(loopback, act)
    async with loopback.serve(lambda: crowd.policy) as server:
        replies = await crowd.replies(server, *({"task": name} for name in "axnb"))
        await loopback.assert_serves(server)
    assert replies[1] == "the policy failed: RuntimeError: boom"
    assert replies[2] == "refused: actions must be finite, got NaN or infinite values"
    assert all(np.all(replies[i]["actions"] == 1) for i in (0, 3))


def test_a_pass_gives_what_calls_give(tiny_policy: Policy, loopback: Loopback) -> None:
    noises = np.random.default_rng(2).standard_normal((3, 7, 6)).astype(np.float32)
    alone = {k: v for k, v in loopback.observation.items() if not k.endswith("wrist")}
    requests = [
        {**loopback.observation, "task": "a"},
        {**loopback.observation, "task": "a longer instruction"},
        {**alone, "task": "bc"},
    ]
    requests = [
        {**request, "halfpi": {"noise": noise, "normalized": True}}
        for request, noise in zip(requests, noises, strict=True)
    ]
    policy = OpenpiPolicy(tiny_policy)
    for together, request in zip(policy.answer_many(requests), requests, strict=True):
        assert isinstance(together, Answer)
        for name in ("actions", "normalized"):
            expected = policy.infer(request)[name]
            np.testing.assert_allclose(together.reply[name], expected, rtol=0, atol=1e-5)


async def test_the_queue_waits_for_others_but_not_for_long() -> None:
    queue = FairQueue(100)
    first, second = Request(1, 1), Request(2, 1)
    queue.put(first)
    began = time.perf_counter()
    assert await queue.get(2, patience_s=0.05) == [first]
    assert time.perf_counter() - began >= 0.05
    queue.put(first)
    getting = asyncio.create_task(queue.get(2, patience_s=30))
    await asyncio.sleep(0.01)
    queue.put(second)
    assert await asyncio.wait_for(getting, 1) == [first, second]
    # The only one leaves meanwhile.
    queue.put(first)
    getting = asyncio.create_task(queue.get(2, patience_s=0.05))
    await asyncio.sleep(0.01)
    queue.remove(first)
    await asyncio.sleep(0.1)
    queue.put(second)
    assert await asyncio.wait_for(getting, 1) == [second]
