"""The server with nano itself, in plain torch and on a GPU."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from halfpi.config import Backend, Precision
from halfpi.integrations.openpi import OpenpiPolicy
from halfpi.policy import Policy, load_policy
from halfpi.serving.wire import packb

if TYPE_CHECKING:
    from tests.serving.conftest import Loopback

_RANDOM = np.random.default_rng(0)
_PIXELS = _RANDOM.integers(0, 256, (2, 480, 640, 3), dtype=np.uint8)
OBSERVATION: dict[str, Any] = {
    "images/scene": _PIXELS[0],
    "images/wrist": _PIXELS[1],
    "state": np.zeros(4, np.float32),
    "prompt": "press the button from above",
}


@pytest.mark.parametrize(
    ("backend", "precision"),
    [("eager", "fp32"), pytest.param("triton", "fp8", marks=pytest.mark.gpu)],
)
async def test_a_policy_is_replaced_while_it_answers(
    loopback: Loopback, backend: Backend, precision: Precision
) -> None:
    """On a GPU one thread captures graphs while another replays its own."""

    def factory() -> Policy:
        return load_policy("nano", backend=backend, precision=precision)

    policy = factory()
    config = policy.engine.config
    noise = _RANDOM.standard_normal((config.horizon, config.action_dim), dtype=np.float32)
    request = OBSERVATION | {"halfpi": {"noise": noise, "normalized": True}}
    expected = OpenpiPolicy(policy).infer(request)["normalized"]
    async with loopback.serve(factory) as server, loopback.connect(server) as socket:
        await socket.recv()
        reload, asked = asyncio.create_task(server.reload()), 0
        while not reload.done() or asked < 3:
            await socket.send(packb(request))
            reply = loopback.read(await socket.recv())
            assert np.array_equal(reply["normalized"], expected), reply
            asked += 1
        await reload
