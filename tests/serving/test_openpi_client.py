"""The real openpi-client, in an environment of its own, against a server of ours."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tests.serving.conftest import Loopback

ROOT = Path(__file__).parents[2]


async def run(*command: str) -> str:
    """What a script prints; its failure is the test's."""
    child = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await child.communicate()
    assert child.returncode == 0, err.decode()
    return out.decode()


async def test_the_golden_frames_are_those_of_the_client(openpi_python: str) -> None:
    script = """
import json, sys
from openpi_client import msgpack_numpy
for name, frame in json.load(open(sys.argv[1])).items():
    assert msgpack_numpy.packb(msgpack_numpy.unpackb(bytes.fromhex(frame))).hex() == frame, name
    print(name)
"""
    golden = Path(__file__).parent / "golden_frames.json"
    assert (await run(openpi_python, "-c", script, str(golden))).split() == list(
        json.loads(golden.read_text())
    )


CHUNKS = """
import sys
import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy = WebsocketClientPolicy("127.0.0.1", int(sys.argv[1]))
observation = policy.get_server_metadata()["observation"]
observation["observation.state"] = np.array(observation["observation.state"], np.float32)
for camera in ("base", "wrist"):
    image = np.array(observation["observation.images." + camera], np.uint8)
    observation["observation.images." + camera] = image
chunk = policy.infer(observation)
assert set(chunk) == {"actions", "policy_timing", "server_timing"}, chunk.keys()
assert chunk["actions"].shape == (7, 4) and chunk["actions"].dtype == np.float32
assert chunk["actions"].std() > 0.01
broker = ActionChunkBroker(policy, 5)
for episode in range(2):
    broker.reset()
    for step in range(12):
        result = broker.infer(observation)
        assert np.array_equal(result["actions"], chunk["actions"][step % 5]), (episode, step)
        assert result["server_timing"]["prev_total_ms"] > 0
print("ok")
"""


async def test_chunks_through_the_broker(
    openpi_python: str, loopback: Loopback, tiny_policy: Any, tmp_path: Path
) -> None:
    as_lists = {
        key: value.tolist() if isinstance(value, np.ndarray) else value
        for key, value in loopback.observation.items()
    }
    # The same noise each time, so that every chunk is the same.
    noise = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)
    infer = tiny_policy.infer
    tiny_policy.infer = lambda observation, **options: infer(
        observation, **{**options, "noise": noise}
    )
    metadata = tmp_path / "metadata.json"
    metadata.write_text(json.dumps({"observation": as_lists}))
    async with loopback.serve(lambda: tiny_policy, metadata_file=metadata) as server:
        assert await run(openpi_python, "-c", CHUNKS, str(server.port)) == "ok\n"


FAULTS = """
import sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosedError, InvalidStatus

port, key = int(sys.argv[1]), "right"
try:
    WebsocketClientPolicy("127.0.0.1", port, api_key="wrong")
except InvalidStatus as error:
    print(error)
policy = WebsocketClientPolicy("ws://127.0.0.1", port, api_key=key)
image = np.zeros((28, 28, 3), np.uint8)
observation = {"observation.images.base": image, "task": "go"}
observation["observation.state"] = np.array([np.nan])
try:
    policy.infer(observation)
except RuntimeError as error:
    print(error)
try:
    policy.infer(observation)
except ConnectionClosedError as error:
    print(error.rcvd.code, error.rcvd.reason)
observation["observation.state"] = np.array([0.5])
print(WebsocketClientPolicy("127.0.0.1", port, api_key=key).infer(observation)["actions"].shape)
"""


async def test_errors_as_the_client_shows_them(
    openpi_python: str, loopback: Loopback, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("right\n")
    async with loopback.serve(api_key_file=keys) as server:
        lines = (await run(openpi_python, "-c", FAULTS, str(server.port))).splitlines()
    assert lines == [
        "server rejected WebSocket connection: HTTP 401",
        "Error in inference server:",
        "refused: state must be finite, got [nan]",
        "1011 Internal server error. Traceback included in previous frame.",
        "(7, 4)",
    ]


async def test_the_example_runs_episodes(openpi_python: str, loopback: Loopback) -> None:
    seen = []

    def act(inputs: Any) -> float:
        seen.append(inputs.tokens)
        return 0.5

    async with loopback.serve(lambda: loopback.policy(act, robot="metaworld")) as server:
        printed = await run(
            openpi_python, str(ROOT / "examples" / "openpi_robot.py"),
            "--port", str(server.port), "--episodes", "2", "--steps", "12", "--execute", "5",
        )  # fmt: skip
    assert printed.count("13 steps in") == 2  # its runtime counts a step when it is over
    assert printed.count("last action [0.5, 0.5, 0.5, 0.5]") == 2
    assert len(seen) == 6  # three calls an episode
