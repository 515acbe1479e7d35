"""Opening a checkpoint of any format: detect, check completely, then stream canonical tensors."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from halfpi.checkpoints.contents import Contents, FormatName, StoredTensor
from halfpi.checkpoints.errors import CheckpointError, listing
from halfpi.checkpoints.halfpi_files import METADATA, WEIGHTS, read_halfpi
from halfpi.checkpoints.json_files import read_json
from halfpi.checkpoints.lerobot import read_lerobot
from halfpi.checkpoints.openpi_orbax import read_openpi_orbax
from halfpi.checkpoints.openpi_torch import read_openpi_torch
from halfpi.checkpoints.processing_fields import build_processing
from halfpi.checkpoints.sizes import derive_config
from halfpi.checkpoints.strict import reject_pi0, select_tensors
from halfpi.config import Pi05Config, ProcessingConfig
from halfpi.processing import TOKENIZER_FILES

T = TypeVar("T")

# A thread by itself brings no more than 2.5 GB/s, and hashes 1.5.
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class CheckpointSummary:
    """What a checkpoint is, for people to read.

    parameters and dtypes: how many parameters each part of the model, and each stored dtype, has.
    stored_bytes: of the tensors in use. unused: stored names of known tensors that inference never
    needs.
    assumptions: what the files left open and how it was taken.
    """

    path: Path
    format: FormatName
    tensors: int
    parameters: Mapping[str, int]
    dtypes: Mapping[str, int]
    stored_bytes: int
    config: Pi05Config
    processing: ProcessingConfig
    tokenizer_path: Path | None
    unused: tuple[str, ...]
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: names, shapes and dtypes of its tensors are checked, none is read yet."""

    path: Path
    format: FormatName
    config: Pi05Config
    processing: ProcessingConfig
    tokenizer_path: Path | None
    unused: tuple[str, ...]
    assumptions: tuple[str, ...]
    stored: Mapping[str, StoredTensor] = field(repr=False)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of `Pi05(config).state_dict()` once, as stored, read when it is asked for.

        Raises CheckpointError that names a tensor which cannot be read, or has NaN or infinite
        values.
        """
        for name, stored in self.stored.items():
            yield name, self._checked(name, stored.read())

    def each(self, work: Callable[[str, Tensor], T]) -> dict[str, T]:
        """What `work` makes of each tensor, by name.

        Several threads read and work at a time, each on a tensor, where the format allows it.
        Raises CheckpointError as `tensors` does, and what `work` raises.
        """

        def read_and_work(name: str) -> T:
            return work(name, self._checked(name, self.stored[name].read()))

        pool = ThreadPoolExecutor(1 if self.format == "openpi-orbax" else _THREADS)
        try:
            return dict(zip(self.stored, pool.map(read_and_work, self.stored), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        # The extremes of a tensor with NaN are NaN; unlike isfinite this needs no second tensor.
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            raise CheckpointError(f"{self.path}: {name} has NaN or infinite values")
        return tensor

    def describe(self) -> CheckpointSummary:
        """The checkpoint in figures, without reading a tensor."""
        parameters: Counter[str] = Counter()
        dtypes: Counter[str] = Counter()
        stored_bytes = 0
        for name, stored in self.stored.items():
            count = torch.Size(stored.shape).numel()
            parameters[_part(name)] += count
            dtypes[str(stored.dtype).removeprefix("torch.")] += count
            stored_bytes += count * stored.dtype.itemsize
        return CheckpointSummary(
            path=self.path,
            format=self.format,
            tensors=len(self.stored),
            parameters=dict(parameters),
            dtypes=dict(dtypes),
            stored_bytes=stored_bytes,
            config=self.config,
            processing=self.processing,
            tokenizer_path=self.tokenizer_path,
            unused=self.unused,
            assumptions=self.assumptions,
        )


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    asset_id: str | None = None,
    processing_overrides: Mapping[str, object] | None = None,
    **config_overrides: object,
) -> Checkpoint:
    """Open the checkpoint in the directory `path`, of whichever format it is.

    asset_id: whose statistics to take when an openpi checkpoint has several robots'.
    processing_overrides: fields of `ProcessingConfig`; config_overrides: fields of `Pi05Config`.
    Both win over what the files state. What neither says is assumed, with a warning that names the
    option.

    Raises CheckpointError when no format fits, for π0, for files that are broken or contradict each
    other or an override, and for every missing, unexpected or misshapen tensor and wrong dtype.
    """
    contents = _read(Path(path), asset_id)
    reject_pi0(contents.tensors, contents.root)
    shapes = {name: tensor.shape for name, tensor in contents.tensors.items()}
    config = derive_config(shapes, contents.stated, config_overrides)
    tensors, unused = select_tensors(contents.tensors, contents.unknown, config, contents.root)
    processing_overrides = processing_overrides or {}
    processing = build_processing(config, contents.processing, processing_overrides)
    settled = {*config_overrides, *processing_overrides}
    assumptions = tuple(
        assumption.text for assumption in contents.assumptions if not assumption.options & settled
    )
    for text in assumptions:
        warnings.warn(f"{path}: {text}", UserWarning, stacklevel=2)
    return Checkpoint(
        path=contents.root,
        format=contents.format,
        config=config,
        processing=processing,
        tokenizer_path=_find_tokenizer(contents.root),
        unused=unused,
        assumptions=assumptions,
        stored=tensors,
    )


def _read(path: Path, asset_id: str | None) -> Contents:
    """The contents of `path` in the first format that it looks like; openpi too prefers torch."""
    if (path / METADATA).is_file():
        return read_halfpi(path)
    if (path / WEIGHTS).is_file():
        return read_lerobot(path) if _is_lerobot(path) else read_openpi_torch(path, asset_id)
    if (path / "params" / "_METADATA").is_file():
        return read_openpi_orbax(path, path / "params", asset_id)
    if (path / "_METADATA").is_file():
        root = path.parent if path.absolute().name == "params" else path
        return read_openpi_orbax(root, path, asset_id)
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {kind}; a checkpoint is a directory")
    found = listing(sorted(entry.name for entry in path.iterdir())) or "nothing"
    raise CheckpointError(
        f"{path} is no checkpoint: expected {METADATA} (halfpi), {WEIGHTS} (openpi torch, LeRobot) "
        f"or params/_METADATA (openpi JAX), found {found}"
    )


def _is_lerobot(path: Path) -> bool:
    """Openpi's config.json has no policy type, and openpi saves no processors."""
    if (path / "policy_preprocessor.json").is_file():
        return True
    return (path / "config.json").is_file() and "type" in read_json(path / "config.json")


def _find_tokenizer(root: Path) -> Path | None:
    candidates = (root / name for name in TOKENIZER_FILES)
    return next((path for path in candidates if path.is_file()), None)


def _part(name: str) -> str:
    return name.split(".")[0] if name.startswith(("vision.", "prefix.", "expert.")) else "action"
