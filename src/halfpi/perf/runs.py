"""Records of the scripts that measure a control loop and a server; `run_tables` shows them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from halfpi.perf.environment import environment
from halfpi.perf.records import append_line


def place_of_run(device: torch.device) -> dict[str, Any]:
    """The fields of a record that say where a script ran on `device`, and from which commit."""
    place = environment(device)
    return {
        "commit": place.commit,
        "dirty": place.dirty,
        "device": place.device,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }


def keep_run(record: Mapping[str, Any], path: Path | None) -> str:
    """`record` as a line of JSON, which is appended to the file at `path` if there is one."""
    line = json.dumps(record, default=float)
    if path is not None:
        append_line(path, line)
    return line
