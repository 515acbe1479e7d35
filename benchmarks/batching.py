"""Does it pay to compute requests together? Milliseconds an observation, by the size of the pass.

    python benchmarks/batching.py [--checkpoint nano] [--rounds 14] [--threads 2] [--record FILE]

Sizes take turns within a round, so that other work on the machine meets all of them alike. Prints a
line for each size, then one JSON line, which is also appended to FILE.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from halfpi.batching import Call, infer_many
from halfpi.perf.runs import keep_run, place_of_run
from halfpi.policy import load_policy
from halfpi.types import Observation

SIZES = (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time passes of several observations.")
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--rounds", type=int, default=14)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the record to FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = _measure(args.checkpoint, args.rounds)
    each_ms = {
        str(size): {"p50": np.median(ms) / size, "least": min(ms) / size}
        for size, ms in times.items()
    }
    for size, ms in each_ms.items():
        print(f"{size:>2} in a pass: {ms['p50']:.1f} ms each (least {ms['least']:.1f})")
    record = {
        "benchmark": "batching",
        **place_of_run(torch.device("cpu")),
        "policy": args.checkpoint,
        "threads": args.threads,
        "rounds": args.rounds,
        "each_ms": each_ms,
    }
    print(keep_run(record, args.record))


def _measure(checkpoint: str, rounds: int) -> dict[int, list[float]]:
    """Milliseconds of every pass, by size."""
    policy = load_policy(checkpoint, device="cpu")
    random = np.random.default_rng(0)
    size = policy.processor.config.image_size
    images = {
        camera: random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        for camera in policy.processor.config.cameras
    }
    call = Call(Observation(images, np.zeros(4, np.float32), "press the button from above"))
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(rounds):
        for count, ms in times.items():
            began = time.perf_counter()
            infer_many(policy, [call] * count)
            ms.append((time.perf_counter() - began) * 1000)
    return times


if __name__ == "__main__":
    main()
