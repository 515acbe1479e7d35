"""Launches that were measured, by GPU: `tuned/sm_90.json`, written by benchmarks/tune.py.

Sizes that were measured are those of π0.5. Rows vary at run time, with cameras and the prompt: the
entry with the nearest number of rows serves, if that is within a factor of eight. Everything else
falls back to a kernel's own default.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from halfpi import kernels
from halfpi.kernels.spec import Case, Device

# Sizes that decide between entries; all but these must be the same.
_ROWS = ("b", "m", "s", "t")
_FARTHEST = 3  # octaves: the expert's 50 queries want other launches than the prefix's 968
_KEPT = (*_ROWS, "d", "k", "kv", "n", "q", "width")


@dataclass(frozen=True)
class Entry:
    """The fastest `launch` of a kernel at `sizes`: its knobs, and how long it took on `device`."""

    kernel: str
    sizes: Mapping[str, int]
    dtype: str
    out_dtype: str
    launch: Mapping[str, Any]
    microseconds: float
    device: str
    date: str

    def distance(self, kernel: str, case: Case) -> float:
        """How far `case` is in rows, in octaves; infinite if too far or if more differs."""
        dtypes = (str(case.dtype), str(case.out_dtype))
        if (self.kernel, self.dtype, self.out_dtype) != (kernel, *dtypes):
            return math.inf
        same = all(case.sizes[name] == self.sizes[name] for name in self.sizes if name not in _ROWS)
        rows = [
            abs(math.log2(case[name] / self.sizes[name])) for name in self.sizes if name in _ROWS
        ]
        return sum(rows) if same and max(rows, default=0) <= _FARTHEST else math.inf


def kept_sizes(case: Case) -> dict[str, int]:
    """The sizes of `case` that an entry of it has."""
    return {name: size for name, size in case.sizes.items() if name in _KEPT}


def best(
    kernel: str,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    device: Device,
) -> Any:
    """The launch to use for `kernel` (the name of its spec) at `sizes`, in the spec's own words.

    Its type is that of the kernel's `launch`. Raises KeyError for a name that no kernel has.
    """
    case = Case(kernel, sizes, dtype, out_dtype)
    candidates = kernels.specs()[kernel].candidates(case, device)
    default = candidates[0]
    near = min(entries(device.capability), key=lambda one: one.distance(kernel, case), default=None)
    if near is None or math.isinf(near.distance(kernel, case)):
        return default
    launch = type(default)(**near.launch)
    return launch if launch.is_general or launch in candidates else default


@functools.cache
def entries(capability: int) -> tuple[Entry, ...]:
    """All that was measured on GPUs of `capability`."""
    table = resources.files(kernels) / "tuned" / f"sm_{capability}.json"
    if not table.is_file():
        return ()
    return tuple(Entry(**fields) for fields in json.loads(table.read_text()))
