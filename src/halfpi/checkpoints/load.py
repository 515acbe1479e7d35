"""A checkpoint as a model."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch

from halfpi.checkpoints.checkpoint import Checkpoint, open_checkpoint
from halfpi.checkpoints.strict import meta_model
from halfpi.config import Pi05Config
from halfpi.model import Pi05

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(
    checkpoint: Checkpoint | str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    **options: Any,
) -> Pi05:
    """The model of a checkpoint, which may be open already, ready for inference.

    dtype: "float32" or "bfloat16", the working dtype of `Pi05.to_dtype`.
    options: of `open_checkpoint`, when `checkpoint` is a path.

    Memory peaks at the model and one more tensor; no parameter is ever initialised. What
    `open_checkpoint` assumes of horizon and processing is not warned of.

    Raises CheckpointError as `open_checkpoint` and `Checkpoint.tensors` do; ValueError for another
    dtype and for options of a checkpoint that is open already.
    """
    with warnings.catch_warnings():
        # They are of the horizon and of processing, which the model itself does not use.
        warnings.simplefilter("ignore", UserWarning)
        opened = opened_checkpoint(checkpoint, options)
    model = meta_model_in(opened.config, dtype)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    state = {
        name: tensor.to(device=device, dtype=dtypes[name]) for name, tensor in opened.tensors()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()


def opened_checkpoint(
    checkpoint: Checkpoint | str | os.PathLike[str], options: dict[str, Any]
) -> Checkpoint:
    """`checkpoint`, opened if it is a path. Raises ValueError for options of an open one."""
    if not isinstance(checkpoint, Checkpoint):
        return open_checkpoint(checkpoint, **options)
    if options:
        raise ValueError(f"pass {', '.join(options)} to open_checkpoint")
    return checkpoint


def meta_model_in(config: Pi05Config, dtype: str) -> Pi05:
    """A model without memory in working dtype `dtype`. Raises ValueError for an unknown one."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return meta_model(config).to_dtype(DTYPES[dtype])
