"""Arrays of an orbax checkpoint (OCDBT and zarr), read with tensorstore and without JAX."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfpi.checkpoints.errors import CheckpointError
from halfpi.checkpoints.json_files import member, read_json

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class StoredArray:
    """An array of the tree; `slab_bytes` is the size of the layers that share a chunk, decoded."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    slab_bytes: int


class OrbaxTree:
    """The arrays below `params` by "/"-joined path, without the `value` leaf that training appends.

    Raises CheckpointError for a directory that is no readable OCDBT checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        metadata = read_json(directory / "_METADATA")
        if not (directory / "manifest.ocdbt").is_file():
            raise CheckpointError(f"{directory} has no manifest.ocdbt; only OCDBT is supported")
        self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        # Orbax says whether it left out chunks of zeros; where it did not, a hole is a lost chunk.
        self._may_have_holes = not metadata.get("store_array_data_equal_to_fill_value", False)
        self._group = ""
        self._stores: dict[str, Any] = {}
        keys = _leaf_keys(directory, metadata)
        futures = {path: tensorstore.open(self._spec(key)) for path, key in keys.items()}
        self.arrays: Mapping[str, StoredArray] = {
            path: self._describe(keys[path], future) for path, future in futures.items()
        }

    def read(self, path: str, index: tuple[int, ...], group: str) -> Tensor:
        """The array at `path`, or the part of it at `index` of its first axes.

        A chunk may span many layers, so the chunks decoded last stay in memory until another
        `group` of arrays is read: finish one group before the next.
        """
        if group != self._group:
            self._group, self._stores = group, {}
        array = self.arrays[path]
        if path not in self._stores:
            limit = array.slab_bytes + 2**20 if index else 0
            context = tensorstore.Context({"cache_pool": {"total_bytes_limit": limit}})
            opened = tensorstore.open(self._spec(array.key), context=context)
            self._stores[path] = self._result(opened, array.key)
        return _to_torch(self._result(self._stores[path][index].read(), array.key))

    def _spec(self, key: str) -> dict[str, Any]:
        return {
            "driver": self._driver,
            "kvstore": {
                "driver": "ocdbt",
                "base": f"file://{self.directory.resolve()}/",
                "path": f"{key}/",
            },
            "fill_missing_data_reads": self._may_have_holes,
            "recheck_cached_data": False,
            "open": True,
        }

    def _describe(self, key: str, future: Any) -> StoredArray:
        store = self._result(future, key)
        dtype = _DTYPES.get(store.dtype.name)
        if dtype is None:
            raise CheckpointError(f"{self.directory}: {key} has the dtype {store.dtype.name}")
        shape = tuple(store.shape)
        rows = store.chunk_layout.read_chunk.shape[:1] + shape[1:]
        return StoredArray(key, shape, dtype, math.prod(rows) * dtype.itemsize)

    def _result(self, future: Any, key: str) -> Any:
        try:
            return future.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.directory}: {key} cannot be read: {error}") from error


def _leaf_keys(directory: Path, metadata: Mapping[str, Any]) -> dict[str, str]:
    """Path of each leaf → its key in the store."""
    keys: dict[str, str] = {}
    for leaf in member(metadata, "tree_metadata", dict, directory / "_METADATA").values():
        match leaf:
            case {"key_metadata": [*parts]} if all(
                isinstance(part, dict) and isinstance(part.get("key"), str) for part in parts
            ):
                names = [part["key"] for part in parts]
            case _:
                raise CheckpointError(f"{directory / '_METADATA'} has a leaf {str(leaf)[:80]}")
        path = "/".join(names).removeprefix("params/").removesuffix("/value")
        if path in keys:
            raise CheckpointError(f"{directory} stores {path} twice")
        keys[path] = ".".join(names)
    return keys


def _to_torch(array: NDArray[Any]) -> Tensor:
    if array.dtype.name == "bfloat16":  # an extension of numpy's, by ml_dtypes, that torch rejects
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
