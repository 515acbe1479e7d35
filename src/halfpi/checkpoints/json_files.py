"""JSON that somebody else wrote: every surprise is a `CheckpointError` that names file and key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

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
    """`data[key]`, which must be a `kind`; an int passes as float, a bool never as a number."""
    value = data.get(key)
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        got = "nothing" if key not in data else repr(value)[:80]
        raise CheckpointError(f"{where}: {key!r} must be of type {kind.__name__}, got {got}")
    return kind(value) if kind is float else value  # type: ignore[call-arg, return-value]
