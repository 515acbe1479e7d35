"""Devices whose limits are known: devices.toml, typed. An unknown device has no floor."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Literal

_FILE = Path(__file__).parent / "devices.toml"


class NoFloorError(ValueError):
    """No floor can be computed: the device, or its rate in a precision, is not in devices.toml."""


@dataclass(frozen=True)
class Limit:
    """A limit of a device, and where its value is from."""

    value: float
    kind: Literal["measured", "quoted"]
    source: str


@dataclass(frozen=True)
class Device:
    """Dense tensor-core rates with fp32 accumulation, memory bandwidth, and the size of the L2.

    names: what torch calls it.
    """

    names: tuple[str, ...]
    bf16_tflops: Limit
    fp8_tflops: Limit
    bandwidth_tbs: Limit
    l2_mb: Limit


@cache
def devices() -> dict[str, Device]:
    """All known devices by short name."""
    limits = [field.name for field in fields(Device) if field.name != "names"]
    return {
        name: Device(tuple(entry["names"]), **{key: Limit(**entry[key]) for key in limits})
        for name, entry in tomllib.loads(_FILE.read_text(encoding="utf-8")).items()
    }


def find_device(name: str) -> Device:
    """The device that torch, or devices.toml, calls `name`. Raises NoFloorError if none is."""
    for short, device in devices().items():
        if name in (short, *device.names):
            return device
    raise NoFloorError(f"no floor is known on {name!r}; devices.toml has {', '.join(devices())}")
