"""A server as a process of its own, on a checkpoint: its signals, its log, its end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from halfpi.checkpoints.save import save_model
from halfpi.config import Pi05Config, ProcessingConfig
from halfpi.model import Pi05
from halfpi.serving.wire import packb, unpackb

if TYPE_CHECKING:
    from tests.serving.conftest import Loopback

SRC = Path(__file__).parents[2] / "src"
SERVE = """
import sys
from halfpi.policy import load_policy
from halfpi.serving.config import ServeConfig
from halfpi.serving.server import run_server
run_server(lambda: load_policy(sys.argv[1], device="cpu", num_steps=2), ServeConfig(port=0))
"""


class Process:
    """A server in its own process; `event` reads its log up to the next such event."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        self.child = child
        self.log: list[dict[str, Any]] = []
        self.port = 0

    async def event(self, name: str) -> dict[str, Any]:
        assert self.child.stderr is not None
        while line := await self.child.stderr.readline():
            self.log.append(json.loads(line))
            if self.log[-1]["event"] == name:
                return self.log[-1]
        raise AssertionError(f"the server ended before {name!r}: {self.log}")


@asynccontextmanager
async def serving(checkpoint: Path) -> AsyncIterator[Process]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, str(checkpoint),
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        process = Process(child)
        process.port = (await process.event("listening"))["port"]
        yield process
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_config: Pi05Config, random_pi05: Callable[..., Pi05]) -> Path:
    """A small policy in halfpi's format, with a tokenizer of single bytes."""
    alphabet = ["<pad>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = dataclasses.replace(tiny_config, vocab_size=258, max_prompt_tokens=80)
    processing = ProcessingConfig(
        cameras=("base", "wrist"),
        image_size=28,
        max_prompt_tokens=80,
        robot_action_dim=4,
        state_norm="identity",
        action_norm="identity",
    )
    return save_model(
        random_pi05(config), processing, tmp_path / "policy", tokenizer=tmp_path / "tokenizer.json"
    )


async def test_hangup_reloads_and_a_broken_checkpoint_is_reported(
    checkpoint: Path, loopback: Loopback, random_pi05: Callable[..., Pi05], tmp_path: Path
) -> None:
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    request = packb({**loopback.observation, "halfpi": {"noise": np.ones((7, 6), np.float32)}})
    async with (
        serving(checkpoint) as process,
        connect(f"ws://127.0.0.1:{process.port}") as socket,
    ):
        await socket.recv()

        async def ask() -> Any:
            await socket.send(request)
            return unpackb(await socket.recv(decode=False))["actions"]

        before = await ask()
        weights.write_bytes(whole[: len(whole) // 2])
        process.child.send_signal(signal.SIGHUP)
        failed = await process.event("reload failed, the policy stays")
        assert str(weights) in failed["error"]
        assert np.array_equal(await ask(), before)
        # One weight of the last tensor differs.
        weights.write_bytes(whole[:-4] + np.float32(2.0).tobytes())
        process.child.send_signal(signal.SIGHUP)
        await process.event("policy replaced")
        assert not np.array_equal(await ask(), before)
        process.child.send_signal(signal.SIGTERM)
        assert await process.child.wait() == 0


async def test_a_term_signal_under_load(checkpoint: Path, loopback: Loopback) -> None:
    async def robot(port: int) -> tuple[int, int]:
        replies = 0
        async with connect(f"ws://127.0.0.1:{port}") as socket:
            await socket.recv()
            try:
                while True:
                    reply = await loopback.ask(socket)
                    assert "actions" in reply
                    replies += 1
            except ConnectionClosed as closed:
                return replies, closed.rcvd.code if closed.rcvd else 1006

    async with serving(checkpoint) as process:
        robots = [asyncio.create_task(robot(process.port)) for _ in range(6)]
        for _ in robots:
            await process.event("connection opened")
        await asyncio.sleep(0.5)
        process.child.send_signal(signal.SIGTERM)
        results = await asyncio.gather(*robots)
        await process.event("stopped")
        assert await process.child.wait() == 0
    assert {code for _, code in results} == {1001}
    assert min(replies for replies, _ in results) > 0
    assert max(replies for replies, _ in results) - min(replies for replies, _ in results) <= 2
    events = [line["event"] for line in process.log]
    assert events.count("connection closed") == 6
    assert events.index("draining") > events.index("listening")
    assert {line["level"] for line in process.log} == {"info"}
