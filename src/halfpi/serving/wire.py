"""openpi's frames: msgpack with arrays inside, the same bytes as openpi-client (msgpack_numpy.py).

An array is the map {b"__ndarray__": True, b"data": C-order bytes, b"dtype": str, b"shape": list}, a
NumPy scalar {b"__npgeneric__": True, b"data": value, b"dtype": str}.

What is decoded came from a stranger. Only numbers, booleans and text become arrays: there is no
path to pickle. A frame may claim little and cost much (a five-byte header can announce four billion
items), so depth, items and text are limited while decoding, whatever the size of the frame.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

MAX_DEPTH = 8
MAX_ITEMS = 16_384  # entries of all lists and maps of a frame together
MAX_TEXT_BYTES = 65_536  # of one string

_KINDS = "biufSU"
_DTYPE = re.compile(rf"[<>|=][{_KINDS}][1-9]\d{{0,5}}")
_MAX_DIMENSIONS = 8
_ARRAY_KEYS = {b"__ndarray__", b"data", b"dtype", b"shape"}
_SCALAR_KEYS = {b"__npgeneric__", b"data", b"dtype"}


class WireError(ValueError):
    """A frame that is not what openpi's protocol allows, or is over a limit."""


def packb(value: object) -> bytes:
    """`value` as a frame. Raises ValueError on an array of objects, records or complex numbers."""
    packed: bytes = msgpack.packb(value, default=_pack_array)
    return packed


def unpackb(frame: bytes) -> Any:
    """What `frame` holds; arrays are read-only views. Raises WireError that names what is wrong."""
    decoder = _Decoder()
    try:
        value = msgpack.unpackb(
            frame,
            object_hook=decoder.map,
            list_hook=decoder.list,
            max_str_len=MAX_TEXT_BYTES,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except WireError:
        raise
    except ValueError as error:
        raise WireError(f"not a msgpack frame: {str(error) or type(error).__name__}") from error
    _check(value, depth=0)
    return value


def _pack_array(value: object) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"a frame cannot hold a {type(value).__name__}")
    if value.dtype.kind not in _KINDS:
        raise ValueError(f"a frame cannot hold an array of dtype {value.dtype}")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {
        b"__ndarray__": True,
        b"data": value.tobytes(),
        b"dtype": value.dtype.str,
        b"shape": value.shape,
    }


class _Decoder:
    """msgpack's hooks: called for a container once it is read, so innermost first."""

    def __init__(self) -> None:
        self._items = 0

    def list(self, items: list[Any]) -> list[Any]:
        self._count(len(items))
        return items

    def map(self, items: dict[Any, Any]) -> Any:
        self._count(len(items))
        if b"__ndarray__" in items:
            return _array(items)
        if b"__npgeneric__" in items:
            return _scalar(items)
        return items

    def _count(self, items: int) -> None:
        self._items += items
        if self._items > MAX_ITEMS:
            raise WireError(f"a frame may hold at most {MAX_ITEMS} items")


def _array(items: dict[Any, Any]) -> NDArray[Any]:
    if set(items) != _ARRAY_KEYS:
        raise WireError(f"an array has data, dtype and shape, got {_names(items)}")
    dtype, shape, data = _dtype(items[b"dtype"]), _shape(items[b"shape"]), items[b"data"]
    if not isinstance(data, bytes):
        raise WireError(f"the data of an array must be bytes, got {type(data).__name__}")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise WireError(
            f"an array of dtype {dtype.str} and shape {shape} has {expected} bytes, got {len(data)}"
        )
    try:
        return np.ndarray(shape, dtype, buffer=data)
    except ValueError as error:  # a side too long for NumPy, beside one of length 0
        raise WireError(f"an array cannot have shape {shape}: {error}") from error


def _scalar(items: dict[Any, Any]) -> np.generic:
    if set(items) != _SCALAR_KEYS:
        raise WireError(f"a NumPy scalar has data and dtype, got {_names(items)}")
    dtype, data = _dtype(items[b"dtype"]), items[b"data"]
    if not isinstance(data, bool | int | float | str | bytes):
        raise WireError(f"the data of a NumPy scalar must be one value, got {type(data).__name__}")
    try:
        with np.errstate(over="raise"):
            scalar: np.generic = dtype.type(data)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise WireError(f"not a NumPy scalar of dtype {dtype.str}: {error}") from error
    return scalar


def _dtype(name: object) -> np.dtype[Any]:
    if isinstance(name, str) and _DTYPE.fullmatch(name):
        try:
            return np.dtype(name)
        except TypeError:  # such as a float of three bytes
            pass
    raise WireError(f"dtype must be of numbers, booleans or text, got {str(name)[:50]!r}")


def _shape(shape: object) -> tuple[int, ...]:
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(side) is int and side >= 0 for side in shape)
    ):
        raise WireError(f"shape must be at most {_MAX_DIMENSIONS} lengths, got {str(shape)[:50]}")
    return tuple(shape)


def _check(value: object, depth: int) -> None:
    """Refuse what no client sends: deep nesting, and keys that are no text."""
    if depth > MAX_DEPTH:
        raise WireError(f"a frame may be nested at most {MAX_DEPTH} deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise WireError(f"a key must be text, got {str(key)[:50]}")
            _check(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)


def _names(items: dict[Any, Any]) -> str:
    return ", ".join(sorted(str(key)[:50] for key in items))
