"""A policy of ours in place of openpi's own: in the real ActionChunkBroker and websocket server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import socket, sys, threading

sys.path.append(sys.argv[1])  # openpi's packages, behind all others: NumPy is not theirs

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from openpi_server import WebsocketPolicyServer

from halfpi import load_policy
from halfpi.integrations.openpi import OpenpiPolicy

policy = OpenpiPolicy(load_policy("nano", num_steps=2), metadata={"reset_pose": [0.0]})
image = np.random.default_rng(0).integers(0, 256, (84, 84, 3), dtype=np.uint8)
noise = np.random.default_rng(1).standard_normal((16, 4)).astype(np.float32)
observation = {
    "images/scene": image,
    "images/wrist": image[::-1],
    "state": np.array([0.0, 0.6, 0.2, 1.0], np.float32),
    "prompt": "open the drawer",
    "halfpi": {"noise": noise},
}
expected = policy.infer(observation)["actions"]
assert expected.shape == (16, 4) and np.ptp(expected) > 0.1

broker = ActionChunkBroker(policy, 5)
for step in range(12):
    assert np.array_equal(broker.infer(observation)["actions"], expected[step % 5]), step
broker.reset()
assert np.array_equal(broker.infer(observation)["actions"], expected[0])

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
server = WebsocketPolicyServer(policy, "127.0.0.1", port, policy.metadata)
threading.Thread(target=server.serve_forever, daemon=True).start()
for _ in range(100):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
        break
    except ConnectionRefusedError:
        threading.Event().wait(0.05)
client = WebsocketClientPolicy("127.0.0.1", port)
metadata = client.get_server_metadata()
assert metadata["reset_pose"] == [0.0] and metadata["halfpi"]["cameras"] == ["scene", "wrist"]
reply = client.infer(observation)
assert np.array_equal(reply["actions"], expected)
assert set(reply) == {"actions", "policy_timing", "server_timing"}
print("ok")
"""


def test_in_openpis_broker_and_server(openpi_python: str) -> None:
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run(
        [openpi_python, "-c", where], capture_output=True, text=True, check=True
    ).stdout.strip()
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, packages],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.stdout == "ok\n", child.stderr
