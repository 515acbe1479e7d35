"""Checks of what a caller hands to `Pi05.sample_actions`: one clear ValueError for each thing that can be wrong."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfpi.config import Pi05Config


@dataclass(frozen=True)
class SampleInputs:
    """The tensors of one call; fields as in `Pi05.sample_actions`."""

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    noise: Tensor
    given: Tensor | None


def check_inputs(inputs: SampleInputs, config: Pi05Config, device: torch.device) -> None:
    """Check the shapes, dtypes, devices and values of `inputs`.

    Raises ValueError naming the argument, what was expected and what came.
    """
    b, n = (*inputs.images.shape, 0, 0)[:2]
    l = (*inputs.tokens.shape, 0, 0)[1]
    size, chunk = config.image_size, (b, config.horizon, config.action_dim)
    _check("images", inputs.images, (b, n, 3, size, size), torch.float32, device)
    _check("image_mask", inputs.image_mask, (b, n), torch.bool, device)
    _check("tokens", inputs.tokens, (b, l), torch.int64, device)
    _check("token_mask", inputs.token_mask, (b, l), torch.bool, device)
    _check("noise", inputs.noise, chunk, torch.float32, device)
    if inputs.given is not None:
        d = (*inputs.given.shape, 0, 0)[1]
        _check(
            "given",
            inputs.given,
            (b, min(d, config.horizon), config.action_dim),
            torch.float32,
            device,
        )
    _check_tokens(inputs.tokens, config.vocab_size)
    _check_prefix(inputs.image_mask, inputs.token_mask)


def check_num_steps(num_steps: int) -> None:
    """Raise ValueError unless `num_steps` is a positive int."""
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps must be an int of at least 1, got {num_steps!r}")


def _check(
    name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, where the model is, got {value.device}")
    if dtype.is_floating_point:
        bad = value.numel() - int(value.isfinite().sum())
        if bad:
            raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values")


def _check_tokens(tokens: Tensor, vocab_size: int) -> None:
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.numel():
        raise ValueError(f"tokens must be in [0, {vocab_size}), got {int(outside[0])}")


def _check_prefix(image_mask: Tensor, token_mask: Tensor) -> None:
    empty = ~(image_mask.any(1) | token_mask.any(1))
    if bool(empty.any()):
        row = int(empty.nonzero()[0])
        raise ValueError(
            "image_mask and token_mask must leave each row a valid camera or token, "
            f"got none in row {row}"
        )
