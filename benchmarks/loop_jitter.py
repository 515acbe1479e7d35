"""Does the control loop keep its ticks while a policy computes beside it, and sometimes stalls?

    python benchmarks/loop_jitter.py [--seconds 60] [--rate-hz 100] [--priority 10] [--record FILE]

The policy multiplies matrices for 45 ms, about every tenth call for up to 300 ms more, so that it
competes with the loop for the interpreter and the cores as a real one does. Prints the goals (p99
tick error at most 2 ms, no missed tick, every stall visible as a slow call) and what was measured,
then one JSON line, which is also appended to FILE; exits with 1 when a goal is missed. Where the
cores have other work, ask for a real-time priority.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfpi.model import Guidance
from halfpi.perf.runs import keep_run
from halfpi.runtime import Asynchronous, ControlLoop, LoopReport, RealClock, save_run
from halfpi.types import ActionChunk, Observation

CALL_MS, STALL_MS, STALL_SHARE = 45.0, 300.0, 0.1
HORIZON, THRESHOLD = 50, 25
GOAL_MS = 2.0


class BusyPolicy:
    """Computes for as long as it is told to; `stalls_ms` has an entry for each call."""

    horizon = HORIZON

    def __init__(self) -> None:
        self.stalls_ms: list[float] = []
        self._random = np.random.default_rng(0)
        self._matrix = torch.rand(256, 256)

    def reset(self) -> None:
        """Nothing to forget."""

    def infer(
        self,
        observation: Observation,
        *,
        given: NDArray[np.float32] | None = None,
        guidance: Guidance | None = None,
    ) -> ActionChunk:
        """Still actions, after a while."""
        del observation, given, guidance
        stalls = self._random.random() < STALL_SHARE
        self.stalls_ms.append(self._random.uniform(0.1, 1.0) * STALL_MS if stalls else 0.0)
        end = time.monotonic() + (CALL_MS + self.stalls_ms[-1]) / 1000
        while time.monotonic() < end:
            torch.mm(self._matrix, self._matrix)
        actions = np.zeros((HORIZON, 7), np.float32)
        return ActionChunk(actions, actions)

    def rebase(
        self, normalized: NDArray[np.float32], was: Observation, now: Observation
    ) -> NDArray[np.float32]:
        """Actions are absolute."""
        del was, now
        return normalized


class IdleRobot:
    """Accepts every action."""

    def __init__(self) -> None:
        frame = np.zeros((224, 224, 3), np.uint8)
        self._observation = Observation({"base": frame, "wrist": frame}, np.zeros(7, np.float32))

    def reset(self) -> None:
        """Nothing to do."""

    def observe(self) -> Observation:
        """The same picture always."""
        return self._observation

    def act(self, action: NDArray[np.float32]) -> None:
        """Nothing to move."""


def main() -> int:
    """Run, compare with the goals, report."""
    parser = argparse.ArgumentParser(description="Measure the jitter of the control loop.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rate-hz", type=float, default=100.0)
    parser.add_argument("--priority", type=int, help="of the loop's thread; see RealClock")
    parser.add_argument("--run", type=Path, metavar="FILE", help="write the run, for halfpi report")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the record to FILE")
    args = parser.parse_args()
    policy = BusyPolicy()
    clock = RealClock(args.priority)
    loop = ControlLoop(policy, IdleRobot(), args.rate_hz, Asynchronous(THRESHOLD), clock=clock)
    report = loop.run(max_ticks=round(args.seconds * args.rate_hz))
    if args.run is not None:
        save_run(report, args.run)
    record = _record(report, policy, {"seconds": args.seconds, "priority": args.priority})
    result = record["result"]
    invisible = result["stalls_injected"] - result["stalls_visible"]
    print(f"goal      p99 tick error {GOAL_MS} ms, 0 missed ticks, 0 invisible stalls")
    print(
        f"measured  p99 tick error {result['tick_error_p99_ms']:.2f} ms "
        f"(p50 {result['tick_error_p50_ms']:.2f}, max {result['tick_error_max_ms']:.2f}), "
        f"{result['missed_ticks']} missed ticks, {invisible} invisible stalls"
    )
    print(keep_run(record, args.record))
    reached = result["tick_error_p99_ms"] <= GOAL_MS and not result["missed_ticks"]
    return int(not reached or invisible > 0)


def _record(report: LoopReport, policy: BusyPolicy, case: dict[str, Any]) -> dict[str, Any]:
    # A call that ended after the last tick is not in the report.
    pairs = list(zip(policy.stalls_ms, report.calls, strict=False))
    stalled = [(stall_ms, call.latency_ms) for stall_ms, call in pairs if stall_ms]
    return {
        "schema": "halfpi.loop_jitter/1",
        "kind": "measured",
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "device": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "case": {
            **case,
            "call_ms": CALL_MS,
            "stall_ms": STALL_MS,
            "horizon": HORIZON,
            "threshold": THRESHOLD,
        },
        "result": {
            **report.summary(),
            "stalls_injected": len(stalled),
            "stalls_visible": sum(latency >= CALL_MS + stall for stall, latency in stalled),
        },
    }


def _git(*arguments: str) -> str:
    root = Path(__file__).parent
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
