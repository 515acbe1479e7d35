"""The queue: one request a client, in turn, the newest first, and not without end."""

from __future__ import annotations

import asyncio

import pytest

from halfpi.serving.requests import FairQueue, Outcome, Request, RequestError


async def test_clients_take_turns_however_often_they_ask() -> None:
    queue = FairQueue(1000)
    served = []
    for client in (1, 1, 2, 1, 3, 1):
        queue.put(Request(client, 1))
    for _ in range(7):
        [request] = await queue.get()
        served.append(request.client)
        queue.put(Request(request.client, 1))
    assert served == [1, 2, 3, 1, 2, 3, 1]


async def test_the_newest_observation_takes_the_place_of_the_older() -> None:
    queue = FairQueue(1000)
    older, other, newer = Request(1, 10), Request(2, 1), Request(1, 30)
    assert queue.put(older) is None
    assert queue.put(other) is None
    assert queue.put(newer) is older
    assert (len(queue), queue.size_bytes) == (2, 31)
    assert await queue.get() == [newer]
    assert await queue.get() == [other]
    assert (len(queue), queue.size_bytes) == (0, 0)


async def test_bytes_are_limited() -> None:
    queue = FairQueue(100)
    queue.put(Request(1, 60))
    with pytest.raises(RequestError, match="overloaded: 60 bytes of observations") as caught:
        queue.put(Request(2, 41))
    assert caught.value.outcome is Outcome.OVERLOADED
    queue.put(Request(1, 100))  # takes the place of its own 60
    assert queue.size_bytes == 100


async def test_a_request_is_removed_only_while_it_waits() -> None:
    queue = FairQueue(100)
    older, newer = Request(1, 10), Request(1, 20)
    queue.put(older)
    queue.put(newer)
    queue.remove(older)
    assert queue.waiting(1) is newer
    queue.remove(newer)
    assert queue.waiting(1) is None
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.get(), 0.01)


async def test_an_answer_is_final_and_lets_the_observation_go() -> None:
    request = Request(1, 1, {"state": 1})
    first = RequestError(Outcome.EXPIRED, "x" * 5000)
    request.finish(first)
    request.finish(RequestError(Outcome.FAILED, "late"))
    assert request.answer.result() is first
    assert len(str(first)) == 2000
    assert request.observation == {}
