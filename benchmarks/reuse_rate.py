"""How many actions a second are there, by how many calls share a prefix?

    python benchmarks/reuse_rate.py [--precision fp8] [--steps 5] [--executed 4] [--record FILE]

Inference runs without a pause on the full size with random weights, as `ReusingPolicy` would in a
loop, and `executed` actions of each chunk count. Settings take turns, so that other work and the
clock of the GPU meet all of them alike. What a setting does to success is in docs/study.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
import torch

from halfpi.config import PRESETS
from halfpi.perf.cases import standard_case
from halfpi.perf.engines import engine_config, make_subject
from halfpi.perf.runs import keep_run, place_of_run
from halfpi.perf.synthetic import random_model, random_observations, random_policy
from halfpi.runtime import ReuseConfig, ReusingPolicy

PREFIX_CALLS = (1, 2, 3)
CALLS = 6  # of a setting before it is another's turn: whole rounds of each


def main() -> None:
    parser = argparse.ArgumentParser(description="Rates of actions with and without a kept prefix.")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="fp8")
    parser.add_argument("--steps", type=int, default=5, help="Euler steps of a call")
    parser.add_argument("--executed", type=int, default=4, help="actions executed of a chunk")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the record to FILE")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = _measure(device, args.precision, args.steps, args.rounds)
    rates = {
        str(calls): args.executed * CALLS / float(np.median(each))
        for calls, each in seconds.items()
    }
    for calls, rate in rates.items():
        print(f"{calls} calls a prefix: {rate:.0f} actions/s, {rate / rates['1']:.2f} ×")
    record = {
        "benchmark": "reuse-rate",
        **place_of_run(device),
        "precision": args.precision,
        "steps": args.steps,
        "executed": args.executed,
        "rounds": args.rounds,
        "actions_per_second": rates,
    }
    print(keep_run(record, args.record))


def _measure(
    device: torch.device, precision: str, steps: int, rounds: int
) -> dict[int, list[float]]:
    """Seconds of CALLS calls, of every round, by calls a prefix."""
    case = dataclasses.replace(standard_case(precision), steps=steps)
    model = random_model(PRESETS[case.model], device=device, dtype="bfloat16")
    policy = random_policy(make_subject(model, case, engine_config(case, "triton")).engine, case)
    # A prefix serves as long as the prompt stays: one prompt, new pictures.
    frames = random_observations(model.config, case, CALLS)
    frames = [dataclasses.replace(frame, prompt=frames[0].prompt) for frame in frames]
    seconds: dict[int, list[float]] = {calls: [] for calls in PREFIX_CALLS}
    for _ in range(rounds):
        for calls, taken in seconds.items():
            reusing = ReusingPolicy(policy, ReuseConfig(prefix_calls=calls))
            began = time.perf_counter()
            for frame in frames:
                reusing.infer(frame)
            taken.append(time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
