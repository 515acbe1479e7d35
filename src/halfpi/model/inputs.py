"""Checks of what a caller hands to `Pi05.sample_actions`: one clear ValueError per mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from halfpi.config import Pi05Config

Shape = tuple[int | str, ...]


def check_inputs(
    inputs: Mapping[str, Tensor], config: Pi05Config, device: torch.device, num_steps: int
) -> None:
    """Check the arguments of `Pi05.sample_actions`; `inputs` holds its tensors by name.

    Raises ValueError naming the argument, what was expected and what came.
    """
    sizes: dict[str, int] = {}
    for name, (shape, *dtypes) in _layouts(config).items():
        if name in inputs:
            _check_layout(name, inputs[name], dtypes, device)
            _check_shape(name, inputs[name], shape, sizes)
    if sizes["h"] == 0:
        raise ValueError("noise must hold at least one action, got a horizon of 0")
    if sizes.get("d", 0) > sizes["h"]:
        raise ValueError(f"given must have at most {sizes['h']} actions, got {sizes['d']}")
    _check_values(inputs, config.vocab_size)
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an int of at least 1, got {num_steps!r}")


def _layouts(config: Pi05Config) -> dict[str, tuple[Shape, *tuple[torch.dtype, ...]]]:
    """Shape and allowed dtypes of each tensor; a letter is the same size wherever it appears."""
    size, action = config.image_size, config.action_dim
    return {
        "images": (("b", "n", 3, size, size), torch.float32),
        "image_mask": (("b", "n"), torch.bool),
        "tokens": (("b", "l"), torch.int64, torch.int32),
        "token_mask": (("b", "l"), torch.bool),
        "noise": (("b", "h", action), torch.float32),
        "given": (("b", "d", action), torch.float32),
    }


def _check_layout(
    name: str, value: Tensor, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise ValueError(f"{name} must be {dtypes[0]}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on the model's device {device}, got {value.device}")


def _check_shape(name: str, value: Tensor, shape: Shape, sizes: dict[str, int]) -> None:
    """Compare with `shape`; a letter that is not yet in `sizes` takes the size that came."""
    expected = tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in shape)
    same = len(expected) == value.ndim and all(
        isinstance(dim, str) or dim == came for dim, came in zip(expected, value.shape, strict=True)
    )
    if not same:
        text = ", ".join(map(str, expected))
        raise ValueError(f"{name} must have shape ({text}), got {tuple(value.shape)}")
    sizes.update(
        (dim, came) for dim, came in zip(shape, value.shape, strict=True) if isinstance(dim, str)
    )


def _check_values(inputs: Mapping[str, Tensor], vocab_size: int) -> None:
    for name, value in inputs.items():
        bad = value.numel() - int(value.isfinite().sum())
        if bad:
            raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values")
    tokens = inputs["tokens"]
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.numel():
        raise ValueError(f"tokens must be in [0, {vocab_size}), got {int(outside[0])}")
    empty = ~(inputs["image_mask"].any(1) | inputs["token_mask"].any(1))
    if bool(empty.any()):
        raise ValueError(
            "image_mask and token_mask must leave every row a valid token, "
            f"got none in row {int(empty.nonzero()[0])}"
        )
