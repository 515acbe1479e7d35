"""A model in memory as a checkpoint of halfpi's own format."""

from __future__ import annotations

import os
from pathlib import Path

from halfpi.checkpoints.checkpoint import Checkpoint
from halfpi.checkpoints.contents import StoredTensor
from halfpi.checkpoints.convert import convert
from halfpi.config import ProcessingConfig
from halfpi.model import Pi05


def save_model(
    model: Pi05,
    processing: ProcessingConfig,
    target: str | os.PathLike[str],
    *,
    tokenizer: Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `model` with its processing as the directory `target`, and return its path.

    tokenizer: a tokenizer.json or .model to copy beside the weights. dtype and overwrite as in
    `convert`, which this is; so are its errors.
    """
    stored = {
        name: StoredTensor(name, tuple(tensor.shape), tensor.dtype, tensor.detach().cpu)
        for name, tensor in model.state_dict().items()
    }
    opened = Checkpoint(
        path=Path(target),
        format="halfpi",
        config=model.config,
        processing=processing,
        tokenizer_path=tokenizer,
        unused=(),
        assumptions=(),
        stored=stored,
    )
    return convert(opened, target, dtype=dtype, overwrite=overwrite)
