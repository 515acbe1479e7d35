"""The stages in plain torch on any device: the baseline of other engines, and what a CPU runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from halfpi.model import Guidance, Pi05, PrefixCache
from halfpi.processing.images import to_model
from halfpi.processing.pipeline import ModelInputs
from halfpi.types import StageTimes

# Of a call, or what draws it, which may wait until the device has work.
Noise = Tensor | Callable[[], Tensor]


def drawn(noise: Noise) -> Tensor:
    """`noise`, drawn if it is not yet."""
    return noise() if callable(noise) else noise


class EagerEngine:
    """Runs `model` stage by stage, one observation a call, and times each stage.

    `vision`, `prefill` and `denoise` are the stages of the model, as they run here. The engine
    remembers each camera's image tokens and the prefix, for calls that keep them.
    """

    defers = False

    def __init__(self, model: Pi05, compiled: Callable[[Any], Any] = lambda stage: stage) -> None:
        """`compiled` makes a faster function of each stage, such as `torch.compile`."""
        self.model = model
        self.config = model.config
        self.device = model.action_in.weight.device
        self.vision: Callable[[Tensor], Tensor] = compiled(model.vision)
        self.prefill: Callable[..., PrefixCache] = compiled(model.prefill)
        self.denoise: Callable[..., Tensor] = compiled(model.denoise)
        self.forget()

    def forget(self) -> None:
        """Drop what earlier calls left to keep."""
        self._tokens: dict[int, Tensor] = {}
        self._cache: PrefixCache | None = None

    @torch.inference_mode()
    def run(
        self,
        inputs: ModelInputs | None,
        noise: Noise,
        num_steps: int,
        given: Tensor | None = None,
        guidance: Guidance | None = None,
        kept: Collection[int] = (),
    ) -> tuple[Tensor, StageTimes]:
        """Actions fp32 (h, a) on the CPU, and the milliseconds of each stage.

        inputs: of batch size 1; None denoises on the prefix of the call before.
        noise: fp32 (h, a), or what draws it. given: fp32 (d, a), already decided actions.
        guidance: of h actions.
        kept: places of cameras whose images are not read: their tokens are those encoded last.
        Masked cameras and prompt padding are left out: they change nothing but the cost.

        Raises ValueError if there is nothing to keep.
        """
        times = dict[str, float]()
        if inputs is not None:
            self._cache = self._prefix(inputs, kept, times)
        if self._cache is None:
            raise ValueError("there is no prefix to keep: no call came before this one")
        given = None if given is None else given[None]
        start = drawn(noise)[None]
        actions = self._denoised(self._cache, start, num_steps, given, guidance, times)
        return actions[0], StageTimes(**times)

    @torch.inference_mode()
    def run_many(
        self,
        inputs: ModelInputs,
        noise: Tensor,
        num_steps: int,
        given: Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, StageTimes]:
        """Actions fp32 (b, h, a) on the CPU for b observations in one pass, and its milliseconds.

        inputs: of batch size b. noise: fp32 (b, h, a). given: fp32 (b, d, a). guidance: of b
        chunks. Each row is what `run` gives for it alone, up to rounding; nothing is kept.
        Cameras that no row has, and padding beyond the longest prompt, are left out.
        """
        times = dict[str, float]()
        places = inputs.image_mask.any(0)
        length = int(inputs.token_mask.sum(1).max())
        with self._timed("vision_ms", times):
            image_tokens = self.vision(to_model(inputs.prepared[:, places].to(self.device)))
        image_mask = inputs.image_mask[:, places].to(self.device)
        cache = self._prefilled(image_tokens, image_mask, inputs, length, times)
        return self._denoised(cache, noise, num_steps, given, guidance, times), StageTimes(**times)

    def _prefix(
        self, inputs: ModelInputs, kept: Collection[int], times: dict[str, float]
    ) -> PrefixCache:
        places = inputs.places
        length = int(inputs.token_mask.sum())
        with self._timed("vision_ms", times):
            image_tokens = self._image_tokens(inputs.prepared, places, kept)
        image_mask = torch.ones((1, len(places)), dtype=torch.bool, device=self.device)
        return self._prefilled(image_tokens, image_mask, inputs, length, times)

    def _prefilled(
        self,
        image_tokens: Tensor,
        image_mask: Tensor,
        inputs: ModelInputs,
        length: int,
        times: dict[str, float],
    ) -> PrefixCache:
        """The prefix of images and of the first `length` tokens of the prompts."""
        with self._timed("prefill_ms", times):
            return self.prefill(
                image_tokens,
                image_mask,
                inputs.tokens[:, :length].to(self.device),
                inputs.token_mask[:, :length].to(self.device),
            )

    def _denoised(
        self,
        cache: PrefixCache,
        noise: Tensor,
        num_steps: int,
        given: Tensor | None,
        guidance: Guidance | None,
        times: dict[str, float],
    ) -> Tensor:
        """Actions (b, h, a) on the CPU, of everything else with a batch dimension."""
        with self._timed("denoise_ms", times):
            return self.denoise(
                cache,
                noise.to(self.device),
                num_steps,
                None if given is None else given.to(self.device),
                None if guidance is None else guidance.to(self.device),
            ).cpu()

    def _image_tokens(self, images: Tensor, places: list[int], kept: Collection[int]) -> Tensor:
        """Tokens (1, n·t, d) of the cameras at `places`, encoded anew unless `kept`."""
        fresh = [place for place in places if place not in kept]
        for place in set(places).difference(fresh, self._tokens):
            raise ValueError(f"camera {place} has no image tokens to keep: it was never encoded")
        if fresh:
            encoded = self.vision(to_model(images[:, fresh].to(self.device)))
            shape = (1, len(fresh), self.config.tokens_per_image, self.config.prefix_width)
            self._tokens.update(zip(fresh, encoded.view(shape).unbind(1), strict=True))
        return torch.cat([self._tokens[place] for place in places], 1)

    @contextmanager
    def _timed(self, name: str, times: dict[str, float]) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        times[name] = (time.perf_counter() - began) * 1000
