"""JSON that somebody else wrote: every surprise is a `CheckpointError` that names file and key."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from halfpi.checkpoints.errors import CheckpointError

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises CheckpointError when it cannot be read or is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def member(data: Mapping[str, Any], key: str, kind: type[T], where: object) -> T:
    """`data[key]`, which must be a `kind`; an int passes as float, NaN and infinity do not."""
    value = data.get(key)
    if not (is_number(value) if kind is float else _is_a(kind, value)):
        got = "nothing" if key not in data else repr(value)[:80]
        raise CheckpointError(f"{where}: {key!r} must be of type {kind.__name__}, got {got}")
    return cast("T", value)


def is_number(value: object) -> bool:
    """Whether `value` is an int or a float that is finite as a float; a bool is not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max


def _is_a(kind: type, value: object) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
