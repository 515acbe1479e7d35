"""The protocol as openpi's clients know it, and who may speak it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from websockets.exceptions import InvalidMessage, InvalidStatus

from halfpi.integrations.openpi import Answer, OpenpiPolicy
from halfpi.policy import Policy
from halfpi.serving.config import ServeConfig
from halfpi.serving.server import Server
from halfpi.serving.wire import packb, unpackb

if TYPE_CHECKING:
    from tests.serving.conftest import Loopback


async def test_metadata_then_a_reply_for_each_request(
    loopback: Loopback, tiny_policy: Policy
) -> None:
    async with loopback.serve(lambda: tiny_policy) as server, loopback.connect(server) as socket:
        assert await socket.recv() == packb(OpenpiPolicy(tiny_policy).metadata)
        await socket.send(packb(loopback.observation))
        frame = await socket.recv()
        assert isinstance(frame, bytes)
        first = unpackb(frame)
        assert packb(first) == frame
        assert list(first) == ["actions", "policy_timing", "server_timing"]
        assert (first["actions"].shape, first["actions"].dtype) == ((7, 4), np.float32)
        assert list(first["server_timing"]) == ["infer_ms"]
        await asyncio.sleep(0.05)
        second = await loopback.ask(socket)
        assert list(second["server_timing"]) == ["infer_ms", "prev_total_ms"]
        third = await loopback.ask(socket)
        # From reply to reply, so the second's holds the pause.
        assert third["server_timing"]["prev_total_ms"] > 50
        assert third["server_timing"]["infer_ms"] > third["policy_timing"]["infer_ms"] > 0


async def test_the_metadata_of_a_file(loopback: Loopback, tmp_path: Path) -> None:
    path = tmp_path / "metadata.json"
    path.write_text('{"reset_pose": [0, 1.5]}')
    async with (
        loopback.serve(metadata_file=path) as server,
        loopback.connect(server) as socket,
    ):
        metadata = unpackb(await socket.recv(decode=False))
    assert metadata["reset_pose"] == [0, 1.5]
    assert metadata["halfpi"]["horizon"] == 7


async def test_extras_over_the_wire(loopback: Loopback, tiny_policy: Policy) -> None:
    noise = np.ones((7, 6), np.float32)
    extras = {"noise": noise, "steps": 2, "normalized": True}
    async with loopback.serve(lambda: tiny_policy) as server, loopback.connect(server) as socket:
        await socket.recv()
        reply = await loopback.ask(socket, halfpi=extras)
    assert list(reply) == ["actions", "normalized", "policy_timing", "server_timing"]
    expected = OpenpiPolicy(tiny_policy).infer({**loopback.observation, "halfpi": extras})
    assert np.array_equal(reply["normalized"], expected["normalized"])


async def test_a_watcher_is_shown_every_answer(loopback: Loopback) -> None:
    seen: list[tuple[int, Answer]] = []

    def watch(robot: int, answer: Answer) -> None:
        seen.append((robot, answer))

    async with Server(loopback.policy, ServeConfig(port=0), watch) as server:
        for _ in range(2):
            await loopback.assert_serves(server)
        await loopback.fault(server, **{"observation.state": np.array([np.nan])})
    assert [robot for robot, _ in seen] == [1, 2]
    assert set(seen[0][1].observation.images) == {"base", "wrist"}
    assert seen[0][1].chunk.times.denoise_ms == 4


async def test_plain_http(loopback: Loopback) -> None:
    async with loopback.serve() as server:
        status, _, body = await loopback.get(server, "/healthz")
        assert (status, body) == (200, "OK\n")
        status, _, body = await loopback.get(server, "/")
        assert status == 426


async def test_metrics(loopback: Loopback) -> None:
    async with loopback.serve() as server:
        async with loopback.connect(server) as socket:
            await socket.recv()
            for _ in range(3):
                await loopback.ask(socket)
            status, head, text = await loopback.get(server, "/metrics")
            assert "halfpi_connections 1.0" in text
            await loopback.ask(socket, **{"observation.state": np.zeros((1, 1))})
        _, _, later = await loopback.get(server, "/metrics")
    assert status == 200
    assert "Content-Type: text/plain; version=" in head
    assert 'halfpi_requests_total{outcome="answered"} 3.0' in text
    assert 'halfpi_requests_total{outcome="superseded"} 0.0' in text
    for stage, seconds in {"vision": 0.003, "prefill": 0.006, "denoise": 0.012}.items():
        assert f'halfpi_stage_seconds_sum{{stage="{stage}"}} {seconds}' in text
    assert 'halfpi_stage_seconds_bucket{le="0.002",stage="vision"} 3.0' in text
    assert "halfpi_queue_wait_seconds_count 3.0" in text
    assert "halfpi_queue_depth 0.0" in text
    assert "halfpi_policy_hangs 0.0" in text
    assert 'halfpi_requests_total{outcome="refused"} 1.0' in later
    assert 'halfpi_closed_connections_total{code="1011"} 1.0' in later


@pytest.mark.parametrize("header", [None, "Api-Key wrong", "Bearer right-1", "Api-Key", "right-1"])
async def test_a_wrong_key(loopback: Loopback, tmp_path: Path, header: str | None) -> None:
    path = tmp_path / "keys"
    path.write_text("right-1\n\n right-2 \n")
    headers = {} if header is None else {"Authorization": header}
    async with loopback.serve(api_key_file=path) as server:
        with pytest.raises(InvalidStatus, match="HTTP 401"):
            async with loopback.connect(server, additional_headers=headers):
                pass
        assert (await loopback.get(server, "/metrics"))[0] == 401
        assert (await loopback.get(server, "/healthz"))[0] == 200
        for key in ("right-1", "right-2"):
            headers = {"Authorization": f"Api-Key {key}"}
            async with loopback.connect(server, additional_headers=headers) as socket:
                await socket.recv()
                assert "actions" in await loopback.ask(socket)
        right = await loopback.get(server, "/metrics", "Authorization: Api-Key right-2")
        assert 'halfpi_refused_connections_total{status="401"} 2.0' in right[2]


async def test_keys_are_in_no_log(
    loopback: Loopback, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys"
    path.write_text("the-secret")
    caplog.set_level(logging.DEBUG)
    headers = {"Authorization": "Api-Key the-secret"}
    async with loopback.serve(api_key_file=path) as server:
        socket = await loopback.connect(server, additional_headers=headers)
        await socket.recv()
        await loopback.ask(socket)
        await socket.close()
    ours = [record for record in caplog.records if record.name.startswith("halfpi")]
    assert [record.getMessage() for record in ours][:2] == ["listening", "connection opened"]
    assert not any("the-secret" in str(vars(record)) for record in ours)


async def test_a_web_page_may_not_connect(loopback: Loopback) -> None:
    async with loopback.serve() as server:
        with pytest.raises(InvalidStatus, match="HTTP 403"):
            async with loopback.connect(server, origin="https://example.org"):
                pass


async def test_tls(loopback: Loopback, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    trust = ssl.create_default_context(cafile=certificate)
    async with loopback.serve(tls_cert=certificate, tls_key=key) as server:
        async with loopback.connect(server, ssl=trust) as socket:
            await socket.recv()
            assert "actions" in await loopback.ask(socket)
        with pytest.raises(InvalidMessage):
            async with loopback.connect(server):
                pass


async def test_connections_are_limited(loopback: Loopback) -> None:
    async with loopback.serve(max_connections=2) as server:
        first, second = await loopback.connect(server), await loopback.connect(server)
        with pytest.raises(InvalidStatus, match="HTTP 503"):
            await loopback.connect(server)
        await second.close()
        await loopback.assert_serves(server)
        text = (await loopback.get(server, "/metrics"))[2]
        assert 'halfpi_refused_connections_total{status="503"} 1.0' in text
        await first.close()


async def test_clients_are_independent(loopback: Loopback) -> None:
    def act(inputs: Any) -> float:
        return float(inputs.tokens[0, 7])  # the first letter of the instruction

    async with loopback.serve(lambda: loopback.policy(act)) as server:

        async def episode(letter: str) -> None:
            async with loopback.connect(server) as socket:
                await socket.recv()
                for _ in range(10):
                    reply = await loopback.ask(socket, task=letter)
                    assert np.all(reply["actions"] == 2 + ord(letter))

        await asyncio.gather(*(episode(letter) for letter in "abcdefgh"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"port": 70_000}, "ServeConfig.port must be from 0 to 65535, got 70000"),
        ({"deadline_s": 0}, "ServeConfig.deadline_s must be positive, got 0"),
        ({"max_connections": -1}, "ServeConfig.max_connections must be positive, got -1"),
        ({"max_queued_bytes": 5}, "max_queued_bytes must be at least max_frame_bytes, .*, got 5"),
        ({"tls_cert": Path("cert.pem")}, "TLS needs both tls_cert and tls_key"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ServeConfig(), **changes)


@pytest.mark.parametrize(
    ("setting", "text", "message"),
    [
        ("api_key_file", None, "API keys .* cannot be read: .*No such file"),
        ("api_key_file", "\n \n", "API keys .* holds none: expected one a line"),
        ("metadata_file", None, "metadata .* cannot be read: .*No such file"),
        ("metadata_file", "{", "metadata .* cannot be read: Expecting property name"),
        ("metadata_file", json.dumps([1]), r"metadata .* must be a JSON object, got \[1\]"),
    ],
)
def test_bad_files(
    loopback: Loopback, tmp_path: Path, setting: str, text: str | None, message: str
) -> None:
    path = tmp_path / "file"
    if text is not None:
        path.write_text(text)
    settings: Any = {setting: path}
    with pytest.raises(ValueError, match=message):
        Server(loopback.policy, ServeConfig(**settings))


def test_bad_certificate(loopback: Loopback, tmp_path: Path) -> None:
    path = tmp_path / "cert.pem"
    path.write_text("nothing")
    with pytest.raises(ValueError, match=r"no TLS with .*cert\.pem and .*cert\.pem: "):
        Server(loopback.policy, ServeConfig(tls_cert=path, tls_key=path))


async def test_the_policy_cannot_be_built(loopback: Loopback) -> None:
    def broken() -> Policy:
        raise ValueError("no such checkpoint")

    with pytest.raises(ValueError, match="no such checkpoint"):
        async with loopback.serve(broken):
            pass
