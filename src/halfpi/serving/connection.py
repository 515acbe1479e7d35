"""One robot's connection, with openpi's protocol (websocket_policy_server.py).

The server greets with its metadata. Then every binary frame from the client is a request, and every
request gets one frame, in order: binary with actions, or text with an error. After an error the
connection is closed with 1011, as openpi does; only a request that its own client superseded is not
worth that. openpi's clients wait for each reply and never supersede.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode

from halfpi.integrations.openpi import Answer
from halfpi.serving.dispatcher import Dispatcher
from halfpi.serving.logs import fields
from halfpi.serving.requests import Outcome, Request, RequestError
from halfpi.serving.wire import WireError, packb, unpackb

logger = logging.getLogger(__name__)

# openpi's words; here the frame before holds the error alone.
_CLOSE_REASON = "Internal server error. Traceback included in previous frame."
# Replies that one client may be owed; reading pauses there.
_MAX_OWED = 16


class Connection:
    """Reads requests and writes replies, each in a task, until the client leaves or `drain`.

    number: identifies the client in the queue and in the log.
    """

    def __init__(
        self,
        socket: ServerConnection,
        number: int,
        dispatcher: Dispatcher,
        write_timeout_s: float,
    ) -> None:
        self._socket = socket
        self._number = number
        self._dispatcher = dispatcher
        self._write_timeout_s = write_timeout_s
        self._owed: asyncio.Queue[Request | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_MAX_OWED)
        self._reading: asyncio.Task[None] | None = None
        self._draining = False

    async def run(self) -> None:
        """Serve the client until it leaves, errs, or `drain` was called and it has its replies."""
        reading = self._reading = asyncio.create_task(self._read())
        writing = asyncio.create_task(self._write())
        if self._draining:
            reading.cancel()
        try:
            await asyncio.wait({reading, writing}, return_when=asyncio.FIRST_COMPLETED)
            if self._draining:
                self._owed.put_nowait(None)
                await writing
        finally:
            reading.cancel()
            writing.cancel()
            ends = await asyncio.gather(reading, writing, return_exceptions=True)
            self._dispatcher.forget(self._number)
        for end in ends:
            if isinstance(end, Exception):  # nothing is expected: websockets logs it
                raise end

    def drain(self) -> None:
        """Take no more requests; close once those that came have their replies."""
        self._draining = True
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self) -> None:
        while True:
            await self._room.acquire()
            try:
                frame = await self._socket.recv()
            except ConnectionClosed:
                return
            self._owed.put_nowait(self._request(frame))

    def _request(self, frame: str | bytes) -> Request:
        request = Request(self._number, len(frame))
        try:
            request.observation = _observation(frame)
        except WireError as error:
            self._dispatcher.finish(request, RequestError(Outcome.REFUSED, f"refused: {error}"))
        else:
            self._dispatcher.submit(request)
        return request

    async def _write(self) -> None:
        try:
            await self._send(packb(self._dispatcher.metadata))
            await self._reply()
        except ConnectionClosed:
            return  # the client left
        except TimeoutError:
            logger.warning("client does not read", extra=fields(connection=self._number))
            self._socket.transport.abort()

    async def _reply(self) -> None:
        sent_s, total_ms = time.perf_counter(), None
        while (request := await self._owed.get()) is not None:
            answer = await request.answer
            if isinstance(answer, RequestError):
                await self._send(str(answer))
                self._log(answer)
                if answer.outcome is not Outcome.SUPERSEDED:
                    await self._socket.close(CloseCode.INTERNAL_ERROR, _CLOSE_REASON)
                    return
            else:
                await self._send(packb(_timed(answer, total_ms)))
            self._room.release()
            # As openpi counts: from one reply to the next, the client's own time included.
            total_ms = (time.perf_counter() - sent_s) * 1000
            sent_s = time.perf_counter()
        await self._socket.close(CloseCode.GOING_AWAY)

    async def _send(self, frame: str | bytes) -> None:
        async with asyncio.timeout(self._write_timeout_s):
            await self._socket.send(frame)

    def _log(self, error: RequestError) -> None:
        logger.warning(
            "request failed",
            extra=fields(connection=self._number, outcome=error.outcome, error=str(error)),
        )


def _observation(frame: str | bytes) -> dict[str, Any]:
    if isinstance(frame, str):
        raise WireError("expected a binary frame, got text")
    observation = unpackb(frame)
    if not isinstance(observation, dict):
        raise WireError(f"an observation must be a map, got a {type(observation).__name__}")
    return observation


def _timed(answer: Answer, previous_ms: float | None) -> dict[str, Any]:
    timing = {"infer_ms": answer.infer_ms}
    if previous_ms is not None:
        timing["prev_total_ms"] = previous_ms
    return {**answer.reply, "server_timing": timing}
