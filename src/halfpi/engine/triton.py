"""The engine of halfpi's own kernels: plan once, then copy in, replay, copy out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfpi.config import EngineConfig
from halfpi.engine.eager import Noise, drawn
from halfpi.engine.graphs import Timed
from halfpi.engine.images import runs
from halfpi.engine.plan import make_plan
from halfpi.model import Guidance, Pi05, schedule_times
from halfpi.processing.images import Pictures
from halfpi.processing.pipeline import ModelInputs
from halfpi.quant import Scales
from halfpi.types import StageTimes


class TritonEngine:
    """Runs `model`'s stages as CUDA graphs, one observation a call.

    Prompt, cameras, noise, given actions and guidance are read from device memory, so no call
    captures anything. Cameras that are present are packed into the first blocks of the prefix,
    which keep their image tokens for calls that reuse them. Without a GPU the kernels run wherever
    Triton's interpreter does, which tests use.

    Raises ValueError when the model, the device or the scales do not go with `engine`.
    """

    defers = True

    def __init__(
        self,
        model: Pi05,
        engine: EngineConfig,
        device: torch.device,
        scales: Scales | None = None,
    ) -> None:
        self.config = model.config
        self.engine_config = engine
        self.device = device
        # A thread begins with the first GPU.
        self._on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with self._on_device:
            self.plan = make_plan(model, engine, device, scales)
        self._result = self.plan.result.numpy()
        self._replayed: list[tuple[str, Timed]] = []
        self.forget()

    def forget(self) -> None:
        """Drop what earlier calls left to keep."""
        self._blocks: list[int] = []
        self._prefix_ready = False

    def run(
        self,
        inputs: ModelInputs | None,
        noise: Noise,
        num_steps: int,
        given: Tensor | None = None,
        guidance: Guidance | None = None,
        kept: Collection[int] = (),
    ) -> tuple[Tensor, StageTimes]:
        """As `EagerEngine.run`. Raises ValueError, too, for more than was planned.

        A call whose prompt is at fault has forgotten what others left to keep.
        """
        with self._on_device:
            self._begin(inputs, noise, num_steps, given, kept)
            return self._finish(inputs, noise, num_steps, given, guidance)

    def _begin(
        self,
        inputs: ModelInputs | None,
        noise: Noise,
        num_steps: int,
        given: Tensor | None,
        kept: Collection[int],
    ) -> None:
        """Check what is cheap to check and start vision: all that follows, the device hides."""
        if num_steps not in self.plan.denoise:
            planned = ", ".join(map(str, self.plan.denoise))
            raise ValueError(f"the engine is planned for {planned} Euler steps, got {num_steps}")
        if inputs is None and not self._prefix_ready:
            raise ValueError("there is no prefix to keep: no call came before this one")
        self._check_actions(noise, given)
        self._replayed = []
        if inputs is not None:
            places = self._check_cameras(inputs, kept)
            self._prefix_ready = False
            self._encode(inputs.images, places, kept)

    def _finish(
        self,
        inputs: ModelInputs | None,
        noise: Noise,
        num_steps: int,
        given: Tensor | None,
        guidance: Guidance | None,
    ) -> tuple[Tensor, StageTimes]:
        """The prompt, the actions and the other stages."""
        if inputs is not None:
            self._set_prompt(inputs, len(self._blocks))
        self._set_actions(drawn(noise), num_steps, given, guidance)
        self.plan.staging.upload()
        if inputs is not None:
            count = int(self.plan.staging.host["prefix_count"])
            self._replay("prefill_ms", self._prefill_graph(count))
            self._prefix_ready = True
        self._replay("denoise_ms", self.plan.denoise[num_steps])
        # While the device works: what comes after it is done, a robot waits for.
        actions = torch.empty(self._result.shape)
        copied = actions.numpy()
        times = self._times()
        copied[:] = self._result
        return actions, times

    def _replay(self, stage: str, graph: Timed) -> None:
        """Part of `stage`, a field of `StageTimes`."""
        graph()
        self._replayed.append((stage, graph))

    def _times(self) -> StageTimes:
        """Of the call, for which it waits. What it says of early stages costs no time."""
        times = dict[str, float]()
        for stage, graph in self._replayed:
            times[stage] = times.get(stage, 0.0) + graph.elapsed_ms()
        return StageTimes(**times)

    def stage_graphs(
        self, cameras: int, prompt_tokens: int, num_steps: int
    ) -> Mapping[str, Callable[[], None]]:
        """One replay of each stage in that case, on what the last call left in memory."""
        rows = cameras * self.config.tokens_per_image + prompt_tokens
        return {
            "vision": self.plan.vision[torch.uint8, 0, cameras],
            "prefill": self._prefill_graph(rows),
            "denoise": self.plan.denoise[num_steps],
        }

    def _prefill_graph(self, count: int) -> Timed:
        return next(graph for rows, graph in self.plan.prefill.items() if rows >= count)

    def _check_cameras(self, inputs: ModelInputs, kept: Collection[int]) -> list[int]:
        """The places of the cameras that are there."""
        self._check_images(inputs.images)
        engine = self.engine_config
        places = inputs.places
        if len(places) > engine.max_cameras:
            raise ValueError(
                f"the engine is planned for {engine.max_cameras} cameras, got {len(places)}"
            )
        for place in places:
            if place in kept and place not in self._blocks:
                raise ValueError(
                    f"camera {place} has no image tokens to keep: it was never encoded"
                )
        return places

    def _prompt_tokens(self, inputs: ModelInputs, cameras: int) -> NDArray[np.int64]:
        """The prompt's tokens without padding."""
        tokens: NDArray[np.int64] = inputs.tokens.numpy()[inputs.token_mask.numpy()]
        most, vocabulary = self.engine_config.max_prompt_tokens, self.config.vocab_size
        if len(tokens) > most:
            raise ValueError(f"the engine is planned for {most} prompt tokens, got {len(tokens)}")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
            raise ValueError(f"tokens must be in [0, {vocabulary})")
        if not cameras and not len(tokens):
            raise ValueError("the inputs have neither an image nor a token")
        return tokens

    def _check_images(self, images: Tensor | Pictures) -> None:
        size = self.config.image_size
        layouts = {torch.uint8: (size, size, 3), torch.float32: (3, size, size)}
        if isinstance(images, Tensor):
            if images.shape[:1] + images.shape[2:] != (1, *layouts.get(images.dtype, ())):
                raise ValueError(
                    f"images must be uint8 (1, n, {size}, {size}, 3) or float32 (1, n, 3, {size}, "
                    f"{size}), got {images.dtype} {tuple(images.shape)}"
                )
            return
        for picture in images:
            if picture is None:
                continue
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(
                    "pictures must be uint8 (height, width, 3), "
                    f"got {picture.dtype} {picture.shape}"
                )

    def _check_actions(self, noise: Noise, given: Tensor | None) -> None:
        h, a = self.config.horizon, self.config.action_dim
        if isinstance(noise, Tensor) and noise.shape != (h, a):
            raise ValueError(f"noise must have shape {(h, a)}, got {tuple(noise.shape)}")
        if given is not None and (given.ndim != 2 or len(given) > h or given.shape[1] != a):
            raise ValueError(f"given must have shape (0 to {h}, {a}), got {tuple(given.shape)}")

    def _set_prompt(self, inputs: ModelInputs, cameras: int) -> None:
        try:
            tokens = self._prompt_tokens(inputs, cameras)
        except Exception:
            self.forget()  # the cameras that the call began to encode belong to nothing
            raise
        host = self.plan.staging.host
        images = cameras * self.config.tokens_per_image
        host["tokens"].numpy()[: len(tokens)] = tokens
        host["image_count"].fill_(images)
        host["token_count"].fill_(len(tokens))
        host["prefix_count"].fill_(images + len(tokens))
        host["key_count"].fill_(images + len(tokens) + self.config.horizon)

    @torch.inference_mode()
    def _set_actions(
        self, noise: Tensor, num_steps: int, given: Tensor | None, guidance: Guidance | None
    ) -> None:
        host = self.plan.staging.host
        host["actions"].copy_(noise)
        decided = 0 if given is None else len(given)
        if given is not None:
            host["actions"][:decided] = given
        host["decided"].fill_(decided)
        host["pull"].zero_()
        if guidance is not None:
            host["pull"].copy_(guidance.weights)
            # Rows without weight may hold anything, and anything times zero must be zero.
            host["target"].copy_(guidance.target.nan_to_num(0.0, 0.0, 0.0))
            gains = [guidance.gain(time) for time in schedule_times(num_steps)]
            host["gains"][:num_steps] = torch.tensor(gains)

    def _encode(self, images: Tensor | Pictures, places: list[int], kept: Collection[int]) -> None:
        """Bring the image tokens of the cameras at `places` into the first blocks."""
        self._move_blocks(places, kept)
        fresh = [block for block, place in enumerate(places) if place not in kept]
        self._blocks = places
        if not fresh:
            return
        dtype = self.plan.images.load(images, places, fresh)
        for first, count in runs(fresh):
            self._replay("vision_ms", self.plan.vision[dtype, first, count])

    def _move_blocks(self, places: list[int], kept: Collection[int]) -> None:
        """Move the tokens of cameras that stay to where the present set of cameras puts them."""
        moves = [
            (block, self._blocks.index(place))
            for block, place in enumerate(places)
            if place in kept and self._blocks.index(place) != block
        ]
        if moves:
            rows = self.engine_config.max_cameras * self.config.tokens_per_image
            width = self.plan.embedded.shape[1]
            blocks = self.plan.embedded[:rows].view(-1, self.config.tokens_per_image, width)
            to, source = (list(indices) for indices in zip(*moves, strict=True))
            blocks[to] = blocks[source]
