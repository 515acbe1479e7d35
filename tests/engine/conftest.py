"""What tests of engines share."""

from __future__ import annotations

import torch
from tests.conftest import TINY, build_pi05

from halfpi.model import Pi05
from halfpi.processing.pipeline import ModelInputs


def random_model() -> Pi05:
    """A small model for inference whose every weight is random."""
    return build_pi05().requires_grad_(False).eval()


def inputs_with(
    cameras: list[bool], length: int, seed: int = 0, *, uint8: bool = False
) -> ModelInputs:
    """Random inputs of two cameras and a prompt of `length` tokens, padded."""
    generator = torch.Generator().manual_seed(seed)
    size = TINY.image_size
    images = torch.rand((1, 2, 3, size, size), generator=generator) * 2 - 1
    if uint8:
        images = torch.randint(256, (1, 2, size, size, 3), generator=generator, dtype=torch.uint8)
    return ModelInputs(
        images=images,
        image_mask=torch.tensor([cameras]),
        tokens=torch.randint(TINY.vocab_size, (1, 12), generator=generator),
        token_mask=torch.arange(12)[None] < length,
    )


def noise(seed: int = 1) -> torch.Tensor:
    """Noise of a chunk."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((TINY.horizon, TINY.action_dim), generator=generator)
