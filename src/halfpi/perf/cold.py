"""Timing a process from its start to its first actions, which is what a robot waits for.

Random weights are saved as a checkpoint, which the operating system has in memory then. Fresh
processes load it: the first with an empty cache of kernels, the second with what that one compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from halfpi.checkpoints import open_checkpoint, save_model
from halfpi.config import Backend, Pi05Config
from halfpi.perf.bench import measured_record
from halfpi.perf.cases import Case, weights_dtype
from halfpi.perf.engines import random_scales
from halfpi.perf.records import Record
from halfpi.perf.synthetic import random_model, random_observations, random_processing
from halfpi.perf.timing import percentiles
from halfpi.policy import NANO, load_policy
from halfpi.quant import save_scales

_CACHES = ("empty", "full")
# Where Triton, torch.compile, the driver and halfpi keep what they compile.
_CACHE_VARIABLES = (
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
    "XDG_CACHE_HOME",
)


def bench_cold(
    config: Pi05Config, case: Case, backend: Backend, device: torch.device, *, repeats: int
) -> Record:
    """Time the start of a process, `repeats` times for each state of the cache.

    Times are called "empty" and "full". Their parts, medians in seconds: "import_s" until halfpi is
    imported, "load_s" of `load_policy`, and "call_s" of the first `Policy.infer`.
    The record's peak memory is of these processes.
    Raises ValueError for a longer prompt than the model reads, and if a process ends early.
    """
    if case.prompt_tokens > config.max_prompt_tokens:
        raise ValueError(
            f"prompt_tokens must be at most {config.max_prompt_tokens}, got {case.prompt_tokens}"
        )
    with TemporaryDirectory(prefix="halfpi-cold-") as directory:
        checkpoint = Path(directory) / "checkpoint"
        _save_random(config, case, device, checkpoint)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the processes need the room
        starts: dict[str, list[_Start]] = {state: [] for state in _CACHES}
        for repeat in range(repeats):
            caches = Path(directory) / f"caches-{repeat}"
            for state in _CACHES:
                starts[state].append(_start(checkpoint, case, backend, device, caches))
    return measured_record(
        "cold",
        backend,
        case,
        device,
        {
            state: percentiles([1000 * sum(one.seconds.values()) for one in own])
            for state, own in starts.items()
        },
        peak_bytes=max(one.peak_bytes for own in starts.values() for one in own) or None,
        numbers={
            f"{part} {state}": float(np.median([one.seconds[part] for one in own]))
            for state, own in starts.items()
            for part in own[0].seconds
        },
    )


@dataclass(frozen=True)
class _Start:
    """Seconds by part, and the most device memory in use, 0 on a CPU."""

    seconds: dict[str, float]
    peak_bytes: int


def _save_random(config: Pi05Config, case: Case, device: torch.device, target: Path) -> None:
    """A checkpoint that `load_policy` takes, with scales if the case is fp8."""
    model = random_model(config, device=device, dtype=weights_dtype(case.precision))
    processing = random_processing(config, case)
    save_model(model, processing, target, tokenizer=NANO / "tokenizer.json")
    if case.precision == "fp8":
        save_scales(random_scales(model, case), open_checkpoint(target))


def _start(
    checkpoint: Path, case: Case, backend: Backend, device: torch.device, caches: Path
) -> _Start:
    """One process, with `caches` as an earlier one left them."""
    caches.mkdir(exist_ok=True)
    arguments = {
        "checkpoint": str(checkpoint),
        "case": asdict(case),
        "backend": backend,
        "device": str(device),
        "began": time.time(),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "halfpi.perf.cold", json.dumps(arguments)],
        env=os.environ | {name: str(caches / name.lower()) for name in _CACHE_VARIABLES},
        stdout=subprocess.PIPE,
        check=False,
    )
    if ended.returncode != 0:
        raise ValueError(f"the process that was started ended with status {ended.returncode}")
    return _Start(**json.loads(ended.stdout.splitlines()[-1]))


def main(argument: str) -> None:
    """What is timed: load, answer once, and print how long that took, as a `_Start`."""
    imported = time.time()
    start: dict[str, Any] = json.loads(argument)
    case = Case(**start["case"])
    policy = load_policy(
        start["checkpoint"],
        device=start["device"],
        precision=case.precision,  # type: ignore[arg-type]  # checked by EngineConfig
        backend=start["backend"],
        num_steps=case.steps,
    )
    loaded = time.time()
    (observation,) = random_observations(policy.engine.config, case, 1)
    policy.infer(observation)
    seconds = {
        "import_s": imported - start["began"],
        "load_s": loaded - imported,
        "call_s": time.time() - loaded,
    }
    on_gpu = policy.engine.device.type == "cuda"
    peak_bytes = torch.cuda.max_memory_allocated(policy.engine.device) if on_gpu else 0
    print(json.dumps(asdict(_Start(seconds, peak_bytes))))  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
