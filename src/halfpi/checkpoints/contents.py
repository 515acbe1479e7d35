"""What every format's reader returns, so that nothing after it depends on the format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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


def file_tensors(path: Path) -> list[StoredTensor]:
    """The tensors of a safetensors file. Raises CheckpointError when it is none."""
    file = SafetensorsFile(path)
    return [
        StoredTensor(name, entry.shape, entry.dtype, partial(file.read, name))
        for name, entry in file.entries.items()
    ]


def by_canonical_name(
    stored: Iterable[StoredTensor], canonical_name: Callable[[str], str | None], source: object
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """The tensors under canonical names, and the stored names that have none.

    source: what errors say they are from.
    Raises CheckpointError when two of them claim the same canonical name.
    """
    tensors: dict[str, StoredTensor] = {}
    unknown = []
    for tensor in stored:
        name = canonical_name(tensor.stored_as)
        if name is None:
            unknown.append(tensor.stored_as)
            continue
        if name in tensors:
            raise CheckpointError(
                f"{source} stores {name} twice: as {tensors[name].stored_as} "
                f"and as {tensor.stored_as}"
            )
        tensors[name] = tensor
    return tensors, tuple(unknown)
