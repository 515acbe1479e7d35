"""Requests, how they end, and the queue in which they wait for the policy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Any

from halfpi.integrations.openpi import Answer

_MAX_MESSAGE_CHARACTERS = 2_000


class Outcome(StrEnum):
    """How a request ended."""

    ANSWERED = "answered"
    REFUSED = "refused"  # the frame or the observation is wrong
    SUPERSEDED = "superseded"  # the client sent a newer observation before this one's turn
    EXPIRED = "expired"  # past its deadline
    OVERLOADED = "overloaded"  # too many bytes wait
    FAILED = "failed"  # the policy raised
    ABANDONED = "abandoned"  # the client left


class RequestError(Exception):
    """What a client is told instead of actions; its text is cut to a readable length."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message[:_MAX_MESSAGE_CHARACTERS])
        self.outcome = outcome


@dataclass(eq=False)
class Request:
    """One observation of one client, and the answer that it waits for.

    client: any number that is the client's own. size_bytes: of its frame. arrived_s: on the clock
    of time.perf_counter. answer: set exactly once, and never to an exception.
    """

    client: int
    size_bytes: int
    observation: Mapping[str, Any] = field(default_factory=dict)
    arrived_s: float = field(default_factory=time.perf_counter)
    answer: asyncio.Future[Answer | RequestError] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    def finish(self, answer: Answer | RequestError) -> None:
        """Answer, unless that was done before; the observation is let go."""
        self.observation = {}
        if not self.answer.done():
            self.answer.set_result(answer)


class FairQueue:
    """Waiting requests: at most one of each client, served in turn.

    A newer request takes the place of the client's older one, so a robot is answered on what it
    saw last, and sending more often gains no turns. All methods run on one event loop.
    """

    def __init__(self, max_bytes: int) -> None:
        self._waiting: dict[int, Request] = {}  # in order of turns
        self._max_bytes = max_bytes
        self._nonempty = asyncio.Event()
        self._enough = asyncio.Event()
        self._wanted = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, request: Request) -> Request | None:
        """Let `request` wait; returns the one that it supersedes.

        Raises RequestError if too many bytes would wait.
        """
        older = self._waiting.get(request.client)
        size_bytes = self.size_bytes + request.size_bytes - (older.size_bytes if older else 0)
        if size_bytes > self._max_bytes:
            raise RequestError(
                Outcome.OVERLOADED,
                f"overloaded: {self.size_bytes} bytes of observations wait for the policy",
            )
        self._waiting[request.client] = request
        self.size_bytes = size_bytes
        self._nonempty.set()
        if len(self._waiting) >= self._wanted:
            self._enough.set()
        return older

    def remove(self, request: Request) -> None:
        """Take `request` out if it still waits."""
        if self._waiting.get(request.client) is request:
            del self._waiting[request.client]
            self.size_bytes -= request.size_bytes
            if not self._waiting:
                self._nonempty.clear()

    def waiting(self, client: int) -> Request | None:
        """The request of `client` that waits."""
        return self._waiting.get(client)

    async def get(self, most: int = 1, patience_s: float = 0.0) -> list[Request]:
        """The requests whose turn it is, one to `most`, taken out; waits for the first of them.

        patience_s: how long to wait for the others.
        """
        while True:
            await self._nonempty.wait()
            if len(self._waiting) < most and patience_s > 0:
                await self._wait_for(most, patience_s)
            requests = list(islice(self._waiting.values(), most))
            for request in requests:
                self.remove(request)
            if requests:  # those that waited may have left meanwhile
                return requests

    async def _wait_for(self, count: int, patience_s: float) -> None:
        self._wanted = count
        self._enough.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._enough.wait()
