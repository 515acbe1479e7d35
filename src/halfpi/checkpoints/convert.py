"""Any checkpoint into halfpi's own format, tensor by tensor."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from halfpi.checkpoints.checkpoint import Checkpoint
from halfpi.checkpoints.errors import CheckpointError
from halfpi.checkpoints.halfpi_files import METADATA, WEIGHTS, write_metadata
from halfpi.checkpoints.load import meta_model_in, opened_checkpoint
from halfpi.checkpoints.safetensors_io import SafetensorsWriter


def convert(
    source: Checkpoint | str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write the checkpoint `source` as the new directory `target`, and return its path.

    dtype: "float32" or "bfloat16", with the exceptions of `Pi05.to_dtype`; None: as stored.
    overwrite: replace `target` if it is a halfpi checkpoint.
    options: of `open_checkpoint`, when `source` is a path.

    One tensor is in memory at a time, and `target` appears complete or not at all.

    Raises CheckpointError as `open_checkpoint` and `Checkpoint.tensors` do, when `target` exists,
    and when it cannot be written; ValueError for another dtype and for options of a checkpoint
    that is open already.
    """
    target = Path(target).absolute()
    _check_target(target, overwrite)
    opened = opened_checkpoint(source, options)
    dtypes = _target_dtypes(opened, dtype)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        _check_space(target.parent, opened, dtypes)
        partial.mkdir()
        try:
            _write(opened, partial, dtypes)
            _move(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(f"cannot write {target}: {target.parent} is no directory")
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists; pass overwrite=True to replace it")
    if not (target / METADATA).is_file():
        raise CheckpointError(f"{target} is no halfpi checkpoint and is not replaced")


def _target_dtypes(opened: Checkpoint, dtype: str | None) -> dict[str, torch.dtype]:
    if dtype is None:
        return {name: stored.dtype for name, stored in opened.stored.items()}
    model = meta_model_in(opened.config, dtype)
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


def _check_space(parent: Path, opened: Checkpoint, dtypes: dict[str, torch.dtype]) -> None:
    needed = sum(
        torch.Size(stored.shape).numel() * dtypes[name].itemsize
        for name, stored in opened.stored.items()
    )
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(f"{parent} has {free} bytes free, the checkpoint needs {needed}")


def _write(opened: Checkpoint, directory: Path, dtypes: dict[str, torch.dtype]) -> None:
    announced = {name: (dtypes[name], stored.shape) for name, stored in opened.stored.items()}
    with SafetensorsWriter(directory / WEIGHTS, announced) as writer:
        for name, tensor in opened.tensors():
            writer.write(name, tensor.to(dtypes[name]))
    write_metadata(directory, opened.config, opened.processing)
    if opened.tokenizer_path is not None:
        suffix = opened.tokenizer_path.suffix
        shutil.copyfile(opened.tokenizer_path, directory / f"tokenizer{suffix}")


def _move(partial: Path, target: Path) -> None:
    """Put `partial` in the place of `target`; what was there goes last."""
    old = target.with_name(f"{partial.name}-old")
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
