"""What tests of engines share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from tests.conftest import TINY, build_pi05

from halfpi.engine import Engine
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


EngineCall = tuple[ModelInputs, torch.Tensor, int]
_CALLS_OF_A_CAPTURE = 10


def assert_calls_equal_fresh_captures(
    make: Callable[[], Engine], calls: Sequence[EngineCall]
) -> None:
    """1 000 of `calls` in any order through one engine have the bits of engines just made."""
    fresh = []
    for first in range(0, len(calls), _CALLS_OF_A_CAPTURE):
        other = make()
        fresh += [other.run(*call)[0] for call in calls[first : first + _CALLS_OF_A_CAPTURE]]
        del other
    engine, rng = make(), random.Random(0)
    for _ in range(1000):
        number = rng.randrange(len(calls))
        assert torch.equal(engine.run(*calls[number])[0], fresh[number]), number
