"""A server on a free port of the loopback, with a policy that does what a test wants."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import ConnectionClosed

from halfpi.config import Pi05Config, ProcessingConfig, RobotName
from halfpi.engine import EagerEngine, Noise, drawn
from halfpi.model import Pi05
from halfpi.policy import Policy
from halfpi.processing import Processor
from halfpi.processing.pipeline import ModelInputs
from halfpi.serving.config import ServeConfig
from halfpi.serving.server import Server
from halfpi.serving.wire import packb, unpackb
from halfpi.types import StageTimes

HORIZON, ACTION_DIM = 7, 6
TIMES = StageTimes(vision_ms=1.0, prefill_ms=2.0, denoise_ms=4.0)
PROCESSING = ProcessingConfig(
    cameras=("base", "wrist"),
    image_size=28,
    max_prompt_tokens=80,
    robot_action_dim=4,
    state_norm="identity",
    action_norm="identity",
)
_PIXELS = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
OBSERVATION: dict[str, Any] = {
    "observation.images.base": _PIXELS,
    "observation.images.wrist": _PIXELS[::-1],
    "observation.state": np.array([0.5, -0.25], np.float32),
    "task": "go",
}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run tests that are coroutines; none may take long, so that a hang fails."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), timeout=60))
    return True


class ByteTokenizer:
    """A token a byte."""

    bos_id, pad_id, vocab_size = 1, 0, 258

    def encode(self, text: str) -> list[int]:
        return [2 + byte for byte in text.encode()]


class StubEngine:
    """Takes no time; all its actions have the value that `act` returns."""

    defers = False

    def __init__(self, act: Callable[[ModelInputs], float], horizon: int) -> None:
        self.act = act
        self.config = Pi05Config(horizon=horizon, action_dim=ACTION_DIM)

    def run(
        self,
        inputs: ModelInputs,
        noise: Noise,
        *_: object,
    ) -> tuple[torch.Tensor, StageTimes]:
        actions = torch.full(drawn(noise).shape, self.act(inputs))
        return actions, TIMES


class BatchingEngine(StubEngine):
    """Also takes several observations in one pass; `passes` has the size of each."""

    def __init__(self, act: Callable[[ModelInputs], float], horizon: int) -> None:
        super().__init__(act, horizon)
        self.passes: list[int] = []

    def run_many(
        self, inputs: ModelInputs, noise: torch.Tensor, *_: object
    ) -> tuple[torch.Tensor, StageTimes]:
        self.passes.append(len(noise))
        names = [field.name for field in dataclasses.fields(inputs)]
        rows = [
            ModelInputs(**{name: getattr(inputs, name)[i : i + 1] for name in names})
            for i in range(len(noise))
        ]
        return torch.stack([self.run(*row)[0] for row in zip(rows, noise, strict=True)]), TIMES


def stub_policy(
    act: Callable[[ModelInputs], float] = lambda _: 0.0,
    horizon: int = HORIZON,
    robot: RobotName = "none",
    engine: type[StubEngine] = StubEngine,
) -> Policy:
    """A policy whose engine only calls `act`, which may also block or raise."""
    processing = dataclasses.replace(PROCESSING, robot=robot)
    processor = Processor(processing, ACTION_DIM, ByteTokenizer())
    return Policy(processor, cast("EagerEngine", engine(act, horizon)))


class Loopback:
    """What the tests do with servers and clients."""

    observation = OBSERVATION
    policy = staticmethod(stub_policy)
    single, batching = StubEngine, BatchingEngine

    def serve(
        self, factory: Callable[[], Policy] = stub_policy, **config: Any
    ) -> AbstractAsyncContextManager[Server]:
        return Server(factory, ServeConfig(port=0, **config))

    def connect(self, server: Server, **options: Any) -> connect_websocket:
        scheme = "wss" if options.get("ssl") else "ws"
        return connect_websocket(
            f"{scheme}://127.0.0.1:{server.port}", compression=None, max_size=None, **options
        )

    async def ask(self, socket: ClientConnection, **changes: Any) -> Any:
        """One request and its reply: a dictionary, or the text of an error."""
        await socket.send(packb(OBSERVATION | changes))
        return self.read(await socket.recv())

    def read(self, frame: str | bytes) -> Any:
        return frame if isinstance(frame, str) else unpackb(frame)

    async def assert_serves(self, server: Server) -> None:
        """A new client gets its metadata and its actions."""
        async with self.connect(server) as socket:
            assert isinstance(await socket.recv(), bytes)
            reply = await self.ask(socket)
            assert reply["actions"].shape == (HORIZON, 4)

    @asynccontextmanager
    async def unharmed(self, server: Server) -> AsyncIterator[None]:
        """Whatever happens in between, another client is answered, and so is a new one after it."""
        stop, replies = asyncio.Event(), 0

        async def ask_on() -> None:
            nonlocal replies
            async with self.connect(server) as socket:
                await socket.recv()
                while not stop.is_set():
                    assert "actions" in await self.ask(socket)
                    replies += 1
                    await asyncio.sleep(0.005)

        bystander = asyncio.create_task(ask_on())
        try:
            yield
            before = replies
            await self.assert_serves(server)
            await asyncio.sleep(0.05)
            assert replies > before
        finally:
            stop.set()
            await bystander

    async def fault(self, server: Server, **changes: Any) -> str:
        """The error of a request that must fail, after which the connection must be closed."""
        async with self.connect(server) as socket:
            await socket.recv()
            error = await self.ask(socket, **changes)
            await self.assert_closed(socket, 1011)
        assert isinstance(error, str)
        return error

    async def assert_closed(self, socket: ClientConnection, code: int) -> None:
        """The server closes the connection with `code`, after no other frame."""
        with pytest.raises(ConnectionClosed) as caught:
            await socket.recv()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == code

    async def get(self, server: Server, path: str, *headers: str) -> tuple[int, str, str]:
        """Plain HTTP: status, headers, body."""
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        lines = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", *headers, "", ""]
        writer.write("\r\n".join(lines).encode())
        answer = (await reader.read()).decode()
        writer.close()
        head, _, body = answer.partition("\r\n\r\n")
        return int(head.split()[1]), head, body


@pytest.fixture
def loopback() -> Loopback:
    return Loopback()


@pytest.fixture
def tiny_policy(tiny_config: Pi05Config, random_pi05: Callable[..., Pi05]) -> Policy:
    """The real engine and a small model, every weight random."""
    config = dataclasses.replace(
        tiny_config, vocab_size=ByteTokenizer.vocab_size, max_prompt_tokens=80
    )
    processor = Processor(PROCESSING, config.action_dim, ByteTokenizer())
    return Policy(processor, EagerEngine(random_pi05(config)), num_steps=3)
