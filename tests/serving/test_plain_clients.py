"""What a client that knows nothing of halfpi's own fields gets, byte for byte as it always was."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection

from halfpi.processing.images import to_model
from halfpi.serving.wire import packb, unpackb

if TYPE_CHECKING:
    from tests.serving.conftest import Loopback

# Made by the server before it batched, cached prompts, or took guidance.
GOLDEN = json.loads((Path(__file__).parent / "golden_plain.json").read_text())
LETTERS = "abcd"


def act(inputs: Any) -> float:
    """Something of every input."""
    prompt = (inputs.tokens * inputs.token_mask).sum() % 7
    return float(prompt) + round(float(to_model(inputs.images).mean()), 2)


def untimed(frame: str | bytes) -> str:
    """The frame in hexadecimal, its times replaced by 0, whose place they keep; text as it is."""
    if isinstance(frame, str):
        return frame
    reply = unpackb(frame)
    for name in ("policy_timing", "server_timing"):
        reply[name] = dict.fromkeys(reply[name], 0.0)
    return packb(reply).hex()


async def conversation(socket: ClientConnection, loopback: Loopback, letter: str) -> list[str]:
    """Metadata, three replies, and an error."""
    metadata = await socket.recv()
    assert isinstance(metadata, bytes)
    frames = [metadata.hex()]
    for _ in range(3):
        await socket.send(packb({**loopback.observation, "task": letter}))
        frames.append(untimed(await socket.recv()))
    await socket.send(packb({**loopback.observation, "observation.state": np.array([np.nan])}))
    frames.append(untimed(await socket.recv()))
    await loopback.assert_closed(socket, 1011)
    return frames


@pytest.mark.parametrize("batching", [False, True])
@pytest.mark.parametrize("clients", [1, 4])
async def test_frames_are_the_same_as_ever(
    loopback: Loopback, clients: int, batching: bool
) -> None:
    engine = loopback.batching if batching else loopback.single
    async with loopback.serve(lambda: loopback.policy(act, engine=engine)) as server:
        sockets = [await loopback.connect(server) for _ in range(clients)]
        pairs = zip(sockets, LETTERS, strict=False)
        talks = await asyncio.gather(*(conversation(s, loopback, letter) for s, letter in pairs))
    assert dict(zip(LETTERS, talks, strict=False)) == {
        letter: GOLDEN[letter] for letter in LETTERS[:clients]
    }
