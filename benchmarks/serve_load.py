"""What serving adds to a call, and how a server bears many robots, over the loopback.

    python benchmarks/serve_load.py [--clients 32] [--seconds 60] [--infer-ms 20] [--record FILE]

The server runs in a process of its own. Its policy is real but for the engine, which sleeps, so
that no number here depends on a model; with --checkpoint the engine is real, too. First one client
asks on and on, as openpi's does: the overhead is its round trip, packing and unpacking included,
less what the server says the call took. Then many clients ask for the given time, and resident
memory is read over its second half, when every buffer has been used. Prints a line for each, then
one JSON line, which --record appends to a file; exits with 1 when a client was starved (less than
half of the median) or disconnected. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as connect_in_thread

from halfpi.config import Pi05Config, ProcessingConfig
from halfpi.engine import EagerEngine
from halfpi.perf.runs import keep_run, place_of_run
from halfpi.policy import Policy, load_policy
from halfpi.processing import Processor
from halfpi.processing.pipeline import ModelInputs
from halfpi.serving.config import ServeConfig
from halfpi.serving.server import Server
from halfpi.serving.wire import packb, unpackb
from halfpi.types import StageTimes

_PIXELS = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
OBSERVATION = {
    "observation/image": _PIXELS[0],
    "observation/wrist_image": _PIXELS[1],
    "observation/state": np.zeros(8, np.float32),
    "prompt": "put the carrot on the plate",
}
OBSERVATION_OF_NANO = {
    "images/scene": _PIXELS[0],
    "images/wrist": _PIXELS[1],
    "state": np.zeros(4, np.float32),
    "prompt": "press the button from above",
}
PROCESSING = ProcessingConfig(
    robot="libero", robot_action_dim=7, state_norm="identity", action_norm="identity"
)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    bos_id, pad_id, vocab_size = 1, 0, 258

    def encode(self, text: str) -> list[int]:
        return [2 + byte for byte in text.encode()]


class Sleeper:
    """An engine that takes its time and does nothing."""

    config = Pi05Config(horizon=50)

    def __init__(self, infer_ms: float) -> None:
        self._infer_ms = infer_ms

    def run(
        self, _inputs: ModelInputs, noise: torch.Tensor, *_: object
    ) -> tuple[torch.Tensor, StageTimes]:
        time.sleep(self._infer_ms / 1000)
        return noise, StageTimes(denoise_ms=self._infer_ms)


@dataclass
class Robot:
    """One client's replies: their round trips, and how the connection ended if it did."""

    round_trips_ms: list[float] = field(default_factory=list)
    lost: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a server over the loopback.")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60, help="of each of the two parts")
    parser.add_argument("--infer-ms", type=float, default=20, help="what the engine takes")
    parser.add_argument("--checkpoint", help="a real policy: nano")
    parser.add_argument("--max-batch", type=int, default=ServeConfig.max_batch)
    parser.add_argument("--batch-wait-ms", type=float, default=ServeConfig.batch_wait_ms)
    parser.add_argument("--record", type=Path, help="append the JSON line to this file")
    args = parser.parse_args()
    config = ServeConfig(port=0, max_batch=args.max_batch, batch_wait_ms=args.batch_wait_ms)
    with _server(config, args.infer_ms, args.checkpoint) as (port, pid):
        observation = OBSERVATION_OF_NANO if args.checkpoint else OBSERVATION
        overhead = _overhead(port, observation, args.seconds)
        robots, memory = asyncio.run(_load(port, pid, observation, args.clients, args.seconds))
    counts = [len(robot.round_trips_ms) for robot in robots]
    lost = [robot.lost for robot in robots if robot.lost]
    starved = sum(bool(count < np.median(counts) / 2) for count in counts)
    everyone = [ms for robot in robots for ms in robot.round_trips_ms]
    record = {
        "benchmark": "serve-load",
        **place_of_run(torch.device("cpu")),
        "policy": args.checkpoint or f"sleeps {args.infer_ms:g} ms",
        "max_batch": args.max_batch if args.checkpoint else 1,
        "batch_wait_ms": args.batch_wait_ms,
        "seconds": args.seconds,
        "overhead_ms": _percentiles(overhead),
        "clients": args.clients,
        "replies": {"least": min(counts), "most": max(counts), "all": sum(counts)},
        "round_trip_ms": {**_percentiles(everyone), "max": max(everyone, default=0.0)},
        "starved": starved,
        "disconnected": len(lost),
        "server_rss_mib": {"half_time": memory[0] / 2**20, "end": memory[1] / 2**20},
    }
    print(f"overhead of a call: p50 {record['overhead_ms']['p50']:.2f} ms over {len(overhead)}")
    print(f"{args.clients} clients: {min(counts)} to {max(counts)} replies each, {starved} starved")
    print(f"lost connections: {len(lost)} {sorted(set(lost))}")
    print(f"memory: {memory[0] / 2**20:.1f} MiB at half time, {memory[1] / 2**20:.1f} at the end")
    print(keep_run(record, args.record))
    return int(bool(lost or starved))


@contextmanager
def _server(
    config: ServeConfig, infer_ms: float, checkpoint: str | None
) -> Iterator[tuple[int, int]]:
    """The port and the process id of a server."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = theirs, config, infer_ms, checkpoint
    process = context.Process(target=_run_server, args=arguments, daemon=True)
    process.start()
    try:
        yield ours.recv(), cast("int", process.pid)
    finally:
        ours.send("stop")
        process.join(10)


def _run_server(
    parent: Connection, config: ServeConfig, infer_ms: float, checkpoint: str | None
) -> None:
    torch.set_num_threads(1)  # more would wait for each other wherever the clients need a core

    def factory() -> Policy:
        if checkpoint is not None:
            return load_policy(checkpoint, device="cpu")
        processor = Processor(PROCESSING, Sleeper.config.action_dim, Bytes())
        return Policy(processor, cast("EagerEngine", Sleeper(infer_ms)))

    async def run() -> None:
        async with Server(factory, config) as server:
            parent.send(server.port)
            await asyncio.to_thread(parent.recv)

    asyncio.run(run())


def _overhead(port: int, observation: Mapping[str, Any], seconds: float) -> list[float]:
    """Milliseconds of each round trip beyond the call itself."""
    overhead: list[float] = []
    with connect_in_thread(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as socket:
        socket.recv()
        end_s = time.perf_counter() + seconds
        while (began_s := time.perf_counter()) < end_s:
            socket.send(packb(observation))
            reply = unpackb(socket.recv(decode=False))
            total_ms = (time.perf_counter() - began_s) * 1000
            overhead.append(total_ms - reply["server_timing"]["infer_ms"])
    return overhead[10:]


async def _load(
    port: int, pid: int, observation: Mapping[str, Any], clients: int, seconds: float
) -> tuple[list[Robot], tuple[int, int]]:
    """Every client's replies, and the server's resident bytes at half time and at the end."""
    robots = [Robot() for _ in range(clients)]
    end_s = time.perf_counter() + seconds
    asking = [asyncio.create_task(_ask_on(port, robot, observation, end_s)) for robot in robots]
    await asyncio.sleep(seconds / 2)
    half_time = _resident_bytes(pid)
    await asyncio.gather(*asking)
    return robots, (half_time, _resident_bytes(pid))


async def _ask_on(port: int, robot: Robot, observation: Mapping[str, Any], end_s: float) -> None:
    try:
        async with connect(
            f"ws://127.0.0.1:{port}", compression=None, max_size=None, open_timeout=60
        ) as socket:
            await socket.recv()
            while (began_s := time.perf_counter()) < end_s:
                await socket.send(packb(observation))
                reply: Any = await socket.recv()
                if isinstance(reply, str):
                    robot.lost = reply
                    return
                robot.round_trips_ms.append((time.perf_counter() - began_s) * 1000)
    except (ConnectionClosed, OSError) as error:
        robot.lost = str(error)


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        raise SystemExit("serve_load: no reply came in time; ask for more --seconds")
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return {"p50": p50, "p90": p90, "p99": p99}


if __name__ == "__main__":
    sys.exit(main())
