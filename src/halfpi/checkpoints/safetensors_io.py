"""Safetensors files one tensor at a time, in both directions.

A file is a little-endian u64 header length, a JSON header and the tensors' bytes. The safetensors
library maps a file into memory, where pages once touched count as resident, and writes only what is
all in memory; plain reads and writes at offsets keep the peak at one tensor however large the file.
Headers are checked completely before any tensor is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from halfpi.checkpoints.errors import CheckpointError, listing

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is in its file; `begin` and `end` are absolute byte offsets."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A safetensors file whose header has been checked; tensors are read on demand.

    Raises CheckpointError for a file that is truncated, padded, overlapping or otherwise not
    safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                header, start = _read_header(file, size, path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        header.pop("__metadata__", None)
        self.entries: Mapping[str, TensorEntry] = {
            name: _parse_entry(name, entry, start, path) for name, entry in header.items()
        }
        _check_layout(self.entries, start, size, path)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        try:
            with self.path.open("rb") as file:
                file.seek(entry.begin)
                got = file.readinto(_bytes_of(tensor))
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error
        if got != entry.end - entry.begin:
            raise CheckpointError(f"{self.path} became shorter while {name} was read")
        return tensor


class SafetensorsWriter:
    """Writes a safetensors file whose tensors arrive one by one, in any order.

    tensors: name → (dtype, shape) of all that will be written. Leaving the `with` block without an
    error before each was written raises ValueError.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        header, self._entries = _lay_out(tensors)
        self._pending = set(self._entries)
        self._file = path.open("wb")
        self._file.write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._pending:
            raise ValueError(f"tensors never written: {listing(sorted(self._pending))}")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write `tensor` under `name`, with the dtype and shape that were announced."""
        entry = self._entries[name]
        if (tensor.dtype, tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(
                f"{name} was announced as {entry.dtype} {entry.shape}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
        self._pending.remove(name)
        self._file.seek(entry.begin)
        self._file.write(_bytes_of(tensor.contiguous()))


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _lay_out(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[bytes, dict[str, TensorEntry]]:
    # Wide dtypes first, so that every tensor is aligned to its own item size.
    names = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    header: dict[str, Any] = {}
    offset = 0
    for name in names:
        dtype, shape = tensors[name]
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    entries = {
        name: TensorEntry(*tensors[name], *(start + at for at in header[name]["data_offsets"]))
        for name in names
    }
    return len(text).to_bytes(8, "little") + text, entries


def _read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header, and the offset of the first tensor."""
    if size < 8:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes, not even a header's length"
        )
    length = int.from_bytes(file.read(8), "little")
    if length > _MAX_HEADER_BYTES or 8 + length > size:
        raise CheckpointError(
            f"{path} is truncated or not safetensors: "
            f"its header should be {length} bytes long, the file has {size}"
        )
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a corrupt header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a corrupt header: not a JSON object")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{listing(twice)} stored twice")
    return members


def _parse_entry(name: str, entry: object, start: int, path: Path) -> TensorEntry:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            pass
        case _:
            raise CheckpointError(f"{path} has a corrupt header: {name} is {str(entry)[:120]}")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has the unknown dtype {dtype!r}")
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{path} has a corrupt header: {name} of {dtype} {tuple(shape)} "
            f"needs {expected} bytes, its offsets span {end - begin}"
        )
    return TensorEntry(_DTYPES[dtype], tuple(shape), start + begin, start + end)


def _check_layout(entries: Mapping[str, TensorEntry], start: int, size: int, path: Path) -> None:
    """Tensors must fill the rest of the file without holes or overlaps."""
    reached = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            raise CheckpointError(
                f"{path} has a corrupt header: {name} begins at byte {entry.begin}, "
                f"the tensor before it ends at {reached}"
            )
        reached = entry.end
    if reached != size:
        kind = "is truncated" if size < reached else "has trailing bytes"
        raise CheckpointError(f"{path} {kind}: its header describes {reached} bytes, it has {size}")
