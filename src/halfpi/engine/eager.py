"""The stages in plain torch on any device: the baseline of other engines, and what a CPU runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from halfpi.model import Pi05
from halfpi.processing.pipeline import ModelInputs
from halfpi.types import StageTimes


class EagerEngine:
    """Runs `model` stage by stage, one observation a call, and times each stage."""

    def __init__(self, model: Pi05) -> None:
        self.model = model
        self.config = model.config
        self.device = model.action_in.weight.device

    @torch.inference_mode()
    def run(
        self, inputs: ModelInputs, noise: Tensor, num_steps: int, given: Tensor | None = None
    ) -> tuple[Tensor, StageTimes]:
        """Actions fp32 (h, a) on the CPU, and the milliseconds of each stage.

        inputs: of batch size 1. noise: fp32 (h, a). given: fp32 (d, a), already decided actions.
        Masked cameras and prompt padding are left out: they change nothing but the cost.
        """
        model, times = self.model, dict[str, float]()
        images, tokens, token_mask = _valid(inputs)
        with self._timed("vision_ms", times):
            image_tokens = model.vision(images.to(self.device))
        with self._timed("prefill_ms", times):
            image_mask = torch.ones(images.shape[:2], dtype=torch.bool, device=self.device)
            cache = model.prefill(
                image_tokens, image_mask, tokens.to(self.device), token_mask.to(self.device)
            )
        with self._timed("denoise_ms", times):
            batch_given = None if given is None else given[None].to(self.device)
            actions = model.denoise(cache, noise[None].to(self.device), num_steps, batch_given)[
                0
            ].cpu()
        return actions, StageTimes(**times)

    @contextmanager
    def _timed(self, name: str, times: dict[str, float]) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        times[name] = (time.perf_counter() - began) * 1000


def _valid(inputs: ModelInputs) -> tuple[Tensor, Tensor, Tensor]:
    """The images that are there, and the prompt without its padding."""
    length = int(inputs.token_mask.sum())
    return (
        inputs.images[:, inputs.image_mask[0]],
        inputs.tokens[:, :length],
        inputs.token_mask[:, :length],
    )
