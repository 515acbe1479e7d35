"""Whatever one client does, it gets one clear error, and the others keep their service."""

from __future__ import annotations

import asyncio
import socket as sockets
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from halfpi.serving.server import Server
from halfpi.serving.wire import packb

if TYPE_CHECKING:
    from tests.serving.conftest import Loopback

MASK = b"\0\0\0\0"
OBJECTS = {b"__ndarray__": True, b"data": b"\x80\x04N.", b"dtype": "|O", b"shape": [1]}


@asynccontextmanager
async def by_hand(
    server: Server,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that speaks websocket without its library; the metadata is read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
        )
        assert b"101 Switching Protocols" in await reader.readuntil(b"\r\n\r\n")
        kind, length = await reader.readexactly(2)
        assert kind == 0x82
        assert length < 126
        await reader.readexactly(length)
        yield reader, writer
    finally:
        writer.transport.abort()


def closed_with(tail: bytes) -> int:
    """The code of a close frame, the first thing that the server sends."""
    assert tail[0] == 0x88
    code: int = struct.unpack("!H", tail[2:4])[0]
    return code


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def test_a_client_is_killed_during_its_request(loopback: Loopback) -> None:
    def act(_: object) -> float:
        time.sleep(0.02)
        return 0.0

    async with loopback.serve(lambda: loopback.policy(act)) as server, loopback.unharmed(server):
        for _ in range(5):
            socket = await loopback.connect(server)
            await socket.recv()
            for _ in range(3):
                await socket.send(packb(loopback.observation))
            socket.transport.abort()
            await socket.wait_closed()


async def test_half_a_frame(loopback: Loopback) -> None:
    async with (
        loopback.serve(ping_interval_s=0.1, ping_timeout_s=0.1) as server,
        loopback.unharmed(server),
        by_hand(server) as (reader, writer),
    ):
        writer.write(b"\x82\xfe" + struct.pack("!H", 1000) + MASK + b"x" * 500)
        began = time.perf_counter()
        tail = await reader.read()  # to the end: the server hangs up
        assert time.perf_counter() - began < 5
        assert tail[0] == 0x89  # a ping, which was not answered


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"\x85\xa1a" + b"\xc1" * 1000, "refused: not a msgpack frame"),
        (b"\xc1", "refused: not a msgpack frame: FormatError"),
        (packb([1, 2]), "refused: an observation must be a map, got a list"),
        ("hello", "refused: expected a binary frame, got text"),
        (
            msgpack.packb({"image": OBJECTS}),
            "refused: dtype must be of numbers, booleans or text, got '|O'",
        ),
    ],
)
async def test_garbage_in_a_frame(loopback: Loopback, frame: str | bytes, message: str) -> None:
    async with loopback.serve() as server, loopback.unharmed(server):
        socket = await loopback.connect(server)
        await socket.recv()
        await socket.send(frame)
        assert message in await socket.recv(decode=True)
        await loopback.assert_closed(socket, 1011)


async def test_garbage_on_the_connection(loopback: Loopback) -> None:
    async with (
        loopback.serve() as server,
        loopback.unharmed(server),
        by_hand(server) as (reader, writer),
    ):
        writer.write(b"\xff" * 100)
        assert closed_with(await reader.read()) == 1002


async def test_garbage_instead_of_a_handshake(loopback: Loopback) -> None:
    async with loopback.serve() as server, loopback.unharmed(server):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"\0garbage\r\n\r\n")
        assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("length", [2**30, 32 * 2**20 + 1])
async def test_a_frame_that_claims_a_gigabyte(loopback: Loopback, length: int) -> None:
    async with (
        loopback.serve() as server,
        loopback.unharmed(server),
        by_hand(server) as (reader, writer),
    ):
        writer.write(b"\x82\xff" + struct.pack("!Q", length) + MASK)
        assert closed_with(await reader.read()) == 1009


async def test_fragments_count_together(loopback: Loopback) -> None:
    async with loopback.serve(max_frame_bytes=10_000) as server, loopback.unharmed(server):
        socket = await loopback.connect(server)
        await socket.recv()
        with suppress(ConnectionClosed):  # it may be closed before all was sent
            await socket.send([b"x" * 900] * 12)
        await loopback.assert_closed(socket, 1009)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation.state": np.array([np.nan, 0])}, "refused: state must be finite"),
        (
            {"observation.images.base": np.full((4, 4, 3), np.nan, np.float32)},
            "refused: camera base: a float image must be in [0, 1], got values from nan",
        ),
        ({"observation.images.top": np.zeros((4, 4, 3), np.uint8)}, "refused: unknown camera"),
        ({"halfpi": {"prompt_id": 1}}, "refused: 'halfpi' has no prompt_id"),
        ({"halfpi": {"steps": 10**9}}, "refused: 'steps' must be an int from 1 to 100"),
    ],
)
async def test_a_bad_observation(loopback: Loopback, changes: dict[str, Any], message: str) -> None:
    async with loopback.serve() as server, loopback.unharmed(server):
        assert message in await loopback.fault(server, **changes)


async def test_the_state_under_a_wrong_key(loopback: Loopback) -> None:
    data = dict(loopback.observation)
    data["observation/state"] = data.pop("observation.state")
    async with loopback.serve() as server, loopback.unharmed(server):
        socket = await loopback.connect(server)
        await socket.recv()
        await socket.send(packb(data))
        assert "observation.state" in await socket.recv(decode=True)
        await loopback.assert_closed(socket, 1011)


async def test_a_wrong_api_key(loopback: Loopback, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("right\n")
    right = {"Authorization": "Api-Key right"}
    async with (
        loopback.serve(api_key_file=keys) as server,
        loopback.connect(server, additional_headers=right) as other,
    ):
        await other.recv()
        with pytest.raises(InvalidStatus, match="HTTP 401"):
            await loopback.connect(server, additional_headers={"Authorization": "Api-Key no"})
        assert "actions" in await loopback.ask(other)


async def test_the_policy_raises(loopback: Loopback, caplog: pytest.LogCaptureFixture) -> None:
    def act(inputs: Any) -> float:
        if not inputs.image_mask.all():
            raise RuntimeError("boom")
        return 0.0

    async with loopback.serve(lambda: loopback.policy(act)) as server, loopback.unharmed(server):
        socket = await loopback.connect(server)
        await socket.recv()
        data = dict(loopback.observation)
        del data["observation.images.wrist"]
        await socket.send(packb(data))
        assert await socket.recv() == "the policy failed: RuntimeError: boom"
        await loopback.assert_closed(socket, 1011)
    assert [r.exc_info is not None for r in caplog.records if r.message == "policy failed"] == [
        True
    ]


async def test_actions_that_are_not_finite_reach_no_robot(loopback: Loopback) -> None:
    async with loopback.serve(lambda: loopback.policy(lambda _: float("nan"))) as server:
        assert "actions must be finite" in await loopback.fault(server)


class Gate:
    """A policy's `act` that waits where a test tells it to."""

    def __init__(self) -> None:
        self.entered, self.open = Event(), Event()
        self.calls = 0

    def __call__(self, _: object) -> float:
        self.calls += 1
        self.entered.set()
        assert self.open.wait(30)
        return float(self.calls)


async def test_the_newest_observation_wins(loopback: Loopback) -> None:
    gate = Gate()
    async with (
        loopback.serve(lambda: loopback.policy(gate)) as server,
        loopback.connect(server) as socket,
    ):
        await socket.recv()
        await socket.send(packb(loopback.observation))
        await asyncio.to_thread(gate.entered.wait)
        for _ in range(3):
            await socket.send(packb(loopback.observation))
        await asyncio.sleep(0.05)
        gate.open.set()
        replies = [loopback.read(await socket.recv()) for _ in range(4)]
        superseded = "superseded: a newer observation came before this one's turn"
        assert replies[1:3] == [superseded, superseded]
        # Only two calls were made, and the connection lives on.
        assert [np.unique(replies[i]["actions"]).tolist() for i in (0, 3)] == [[1], [2]]
        assert "actions" in await loopback.ask(socket)


async def test_a_flood_of_requests_costs_its_sender_only(loopback: Loopback) -> None:
    def act(_: object) -> float:
        time.sleep(0.002)
        return 0.0

    async def drown(socket: ClientConnection) -> None:
        frame = packb(loopback.observation)
        while True:
            await socket.send(frame)

    async with loopback.serve(lambda: loopback.policy(act)) as server, loopback.unharmed(server):
        socket = await loopback.connect(server)
        flood = asyncio.create_task(drown(socket))
        await asyncio.sleep(0.3)
        flood.cancel()
        socket.transport.abort()
        await socket.wait_closed()


async def test_too_many_bytes_wait(loopback: Loopback) -> None:
    gate = Gate()
    frame = packb(loopback.observation)
    limits = {"max_frame_bytes": len(frame), "max_queued_bytes": len(frame)}
    async with loopback.serve(lambda: loopback.policy(gate), **limits) as server:
        clients = [await loopback.connect(server) for _ in range(3)]
        for client in clients:
            await client.recv()
        await clients[0].send(frame)
        await asyncio.to_thread(gate.entered.wait)
        await clients[1].send(frame)
        await asyncio.sleep(0.05)
        await clients[2].send(frame)
        error = await clients[2].recv()
        assert error == f"overloaded: {len(frame)} bytes of observations wait for the policy"
        gate.open.set()
        for client in clients[:2]:
            assert "actions" in loopback.read(await client.recv())
        await loopback.assert_serves(server)


async def test_a_client_that_does_not_read(loopback: Loopback) -> None:
    def factory() -> Any:
        return loopback.policy(horizon=200_000)  # replies of megabytes

    async with loopback.serve(factory, write_timeout_s=0.2) as server:
        async with by_hand(server) as (_, writer):
            writer.get_extra_info("socket").setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
            writer.transport.pause_reading()  # type: ignore[attr-defined]  # every transport has it
            frame = packb(loopback.observation)
            header = b"\x82\xfe" + struct.pack("!H", len(frame)) + MASK
            await until(lambda: "halfpi_connections 1.0" in server.metrics.text())
            while "halfpi_connections 1.0" in server.metrics.text():
                writer.write(header + frame)
                await asyncio.sleep(0.02)
        async with loopback.connect(server) as socket:
            await socket.recv()
            assert (await loopback.ask(socket))["actions"].shape == (200_000, 4)


async def test_a_drain_answers_what_was_asked(loopback: Loopback) -> None:
    gate = Gate()
    server = await loopback.serve(lambda: loopback.policy(gate)).__aenter__()
    clients = [await loopback.connect(server) for _ in range(4)]
    for client in clients:
        await client.recv()
    for client in clients[:3]:
        await client.send(packb(loopback.observation))
    await until(lambda: "halfpi_queue_depth 2.0" in server.metrics.text())
    port = server.port
    drain = asyncio.create_task(server.__aexit__(None, None, None))
    await loopback.assert_closed(clients[3], 1001)  # it waits for nothing
    with pytest.raises(OSError, match="Connect call failed"):
        await asyncio.open_connection("127.0.0.1", port)
    with suppress(ConnectionClosed):
        await clients[0].send(packb(loopback.observation))  # too late
    gate.open.set()
    for client in clients[:3]:
        assert "actions" in loopback.read(await client.recv())
        await loopback.assert_closed(client, 1001)
    await drain
    assert gate.calls == 3


async def test_a_drain_does_not_wait_for_a_policy_that_hangs(loopback: Loopback) -> None:
    gate = Gate()
    server = await loopback.serve(lambda: loopback.policy(gate), deadline_s=0.3).__aenter__()
    client = await loopback.connect(server)
    await client.recv()
    await client.send(packb(loopback.observation))
    await asyncio.to_thread(gate.entered.wait)
    await asyncio.wait_for(server.__aexit__(None, None, None), 5)
    assert await client.recv() == "deadline of 0.3 s exceeded in the policy"
    await loopback.assert_closed(client, 1011)
    gate.open.set()
