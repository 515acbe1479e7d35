"""A checkpoint, or a model of another framework, as a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from halfpi.checkpoints.checkpoint import Checkpoint, open_checkpoint
from halfpi.checkpoints.contents import StoredTensor
from halfpi.checkpoints.sizes import derive_config
from halfpi.checkpoints.strict import meta_model, reject_pi0, select_tensors
from halfpi.checkpoints.torch_names import torch_tensors
from halfpi.config import Pi05Config
from halfpi.model import Pi05

_Work = Callable[[str, Tensor], Tensor]
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

    Memory peaks at the model and a tensor for each thread; no parameter is ever initialised. What
    `open_checkpoint` assumes of horizon and processing is not warned of.

    Raises CheckpointError as `open_checkpoint` and `Checkpoint.tensors` do; ValueError for another
    dtype and for options of a checkpoint that is open already.
    """
    with warnings.catch_warnings():
        # They are of the horizon and of processing, which the model itself does not use.
        warnings.simplefilter("ignore", UserWarning)
        opened = opened_checkpoint(checkpoint, options)
    return _filled(opened.config, dtype, device, opened.each)


def model_of_module(module: nn.Module, *, dtype: str = "float32", **stated: int | float) -> Pi05:
    """The model of a π0.5 that is loaded in openpi or LeRobot, ready for inference.

    module: openpi's PI0Pytorch, or PI05Pytorch, the `model` of LeRobot's policy.
    dtype: as in `load_model`. stated: the fields of `Pi05Config` that shapes do not tell.

    The model stays on the module's device. Tensors that have the right dtype already are shared
    with the module; the others are copied.

    Raises CheckpointError for π0, for every missing, unexpected or misshapen tensor and for what
    contradicts a shape; ValueError for another dtype.
    """
    source = type(module).__name__
    stored = [
        StoredTensor(name, tuple(tensor.shape), tensor.dtype, tensor.detach)
        for name, tensor in module.state_dict().items()
    ]
    tensors, unknown = torch_tensors(stored, source)
    reject_pi0(tensors, source)
    config = derive_config({name: tensor.shape for name, tensor in tensors.items()}, stated, {})
    needed, _ = select_tensors(tensors, unknown, config, source)

    def each(work: _Work) -> dict[str, Tensor]:
        return {name: work(name, tensor.read()) for name, tensor in needed.items()}

    return _filled(config, dtype, None, each)


def _filled(
    config: Pi05Config,
    dtype: str,
    device: torch.device | str | None,
    each: Callable[[_Work], dict[str, Tensor]],
) -> Pi05:
    """A model of what `each` gives, as `Checkpoint.each`; on `device` or, if None, where it is."""
    model = meta_model_in(config, dtype)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    state = each(lambda name, tensor: tensor.to(device=device, dtype=dtypes[name]))
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
