"""What every format's reader returns, so that nothing after it depends on the format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from halfpi.checkpoints.errors import CheckpointError
from halfpi.checkpoints.safetensors_io import SafetensorsFile

FormatName = Literal["halfpi", "lerobot", "openpi-torch", "openpi-orbax"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor not yet read, of known shape and dtype; `stored_as` is its name in the files."""

    stored_as: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Assumption:
    """Something the files do not say, what is taken instead, and the options that settle it."""

    text: str
    options: frozenset[str]


@dataclass(frozen=True)
class Contents:
    """A checkpoint as its format stores it.

    tensors: canonical name → tensor, those that share a stored array side by side; some may be
    unused.
    unknown: stored names that no rule of the format knows.
    stated: fields of `Pi05Config` that the files state. processing: likewise of `ProcessingConfig`.
    """

    format: FormatName
    root: Path
    tensors: Mapping[str, StoredTensor]
    unknown: tuple[str, ...]
    stated: Mapping[str, int | float]
    processing: Mapping[str, Any]
    assumptions: tuple[Assumption, ...] = field(default=())


def stored_tensors(
    path: Path, canonical_name: Callable[[str], str | None]
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors of a safetensors file under canonical names, and the stored names that have none.

    Raises CheckpointError when two stored tensors claim the same canonical name.
    """
    file = SafetensorsFile(path)
    tensors: dict[str, StoredTensor] = {}
    unknown = []
    for stored_as, entry in file.entries.items():
        name = canonical_name(stored_as)
        if name is None:
            unknown.append(stored_as)
            continue
        if name in tensors:
            raise CheckpointError(
                f"{path} stores {name} twice: as {tensors[name].stored_as} and as {stored_as}"
            )
        read = partial(file.read, stored_as)
        tensors[name] = StoredTensor(stored_as, entry.shape, entry.dtype, read)
    return tensors, tuple(unknown)
