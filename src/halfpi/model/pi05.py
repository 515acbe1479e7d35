"""π0.5: three stages from observation to actions (openpi pi0.py with pi05=True).

vision: cameras to image tokens. prefill: image tokens and prompt to keys and values. denoise: noise
to actions by integrating the expert's velocity from t = 1 (noise) to t = 0 (data). A stage is pure,
checks nothing and lets gradients through; `sample_actions` checks its inputs and runs the three.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfpi.config import Pi05Config
from halfpi.model.gemma import (
    AdaRMSNorm,
    Expert,
    ExpertView,
    GatedMlp,
    KeyValue,
    Prefix,
    PrefixCache,
)
from halfpi.model.guidance import Guidance
from halfpi.model.inputs import check_inputs
from halfpi.model.siglip import Mlp, SelfAttention, Siglip


class Pi05(nn.Module):
    """The policy as a torch module; stages are `vision`, `prefill` and `denoise`.

    `vision` is a submodule: call it with images (b, n, 3, image_size, image_size) in [-1, 1] for
    image tokens (b, n·t, d). Images, actions, noise and velocities are fp32 whatever the working
    dtype (`to_dtype`). A new model is ready to train; to fill it from a checkpoint, build it under
    `torch.device("meta")`, which skips the initialisation.
    """

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.config = config
        width = config.expert_width
        self.vision = Siglip(config)
        self.prefix = Prefix(config)
        self.expert = Expert(config)
        self.action_in = nn.Linear(config.action_dim, width)
        self.action_out = nn.Linear(width, config.action_dim)
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)
        if not self.action_in.weight.is_meta:  # there it does nothing, in seconds
            _initialise(self)

    @property
    def dtype(self) -> torch.dtype:
        """The working dtype; see `to_dtype`."""
        return self.vision.projector.weight.dtype

    def prefill(
        self, image_tokens: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> PrefixCache:
        """Keys and values of the prefix, cameras first, then the prompt.

        image_tokens: (b, n·t, d) from `vision`. image_mask: bool (b, n), False without a camera.
        tokens: int64 (b, l). token_mask: bool (b, l), False where the prompt is padded.
        """
        mask = torch.cat(
            [image_mask.repeat_interleave(self.config.tokens_per_image, 1), token_mask], 1
        )
        cache: PrefixCache = self.prefix(image_tokens, tokens, mask)
        return cache

    def velocity(self, cache: PrefixCache, actions: Tensor, time: Tensor) -> Tensor:
        """The flow's velocity, noise − data, at noisy `actions` (b, h, a) → (b, h, a).

        time: fp32 (b,), or (b, h) when actions differ in their time; 1 is noise, 0 is data.
        """
        condition = self.condition(time if time.ndim == 2 else time[:, None])
        view = self.expert.view(cache, actions.shape[1])
        return self._velocity(view, actions, self.expert.modulations(condition))

    def denoise(
        self,
        cache: PrefixCache,
        noise: Tensor,
        num_steps: int = 10,
        given: Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Integrate `noise` (b, h, a) into actions (b, h, a) by `num_steps` Euler steps.

        given: (b, d, a), the first d ≤ h actions when they are already decided, as in
        training-time real-time chunking (LeRobot flow_matching.py). They stay as they are, and
        every step sees them as data, at time 0.
        guidance: steers the velocity of every step.
        """
        given = noise[:, :0] if given is None else given
        decided = given.shape[1]
        view = self.expert.view(cache, noise.shape[1])
        actions = torch.cat([given, noise[:, decided:]], 1)
        for time, modulations in self._schedule(num_steps, noise, decided):
            velocity = self._velocity(view, actions, modulations)
            if guidance is not None:
                velocity = guidance.steer(velocity, actions, time)
            moved = actions[:, decided:] - velocity[:, decided:] / num_steps
            actions = torch.cat([given, moved], 1)
        return actions

    def sample_actions(
        self,
        images: Tensor,
        image_mask: Tensor,
        tokens: Tensor,
        token_mask: Tensor,
        noise: Tensor,
        num_steps: int = 10,
        given: Tensor | None = None,
    ) -> Tensor:
        """Actions fp32 (b, h, a) for a batch of observations: all three stages, without gradients.

        images: fp32 (b, n, 3, image_size, image_size) in [-1, 1]. image_mask: bool (b, n).
        tokens: int64 or int32 (b, l). token_mask: bool (b, l). noise: fp32 (b, h, a), standard
        normal, any horizon h.
        given: fp32 (b, d, a), see `denoise`.

        Raises ValueError naming the argument whose shape, dtype, device or values are wrong.
        """
        inputs = {
            "images": images,
            "image_mask": image_mask,
            "tokens": tokens,
            "token_mask": token_mask,
            "noise": noise,
        }
        if given is not None:
            inputs["given"] = given
        check_inputs(inputs, self.config, self.action_in.weight.device, num_steps)
        with torch.inference_mode():
            cache = self.prefill(self.vision(images), image_mask, tokens, token_mask)
            return self.denoise(cache, noise, num_steps, given)

    def to_dtype(self, dtype: torch.dtype) -> Self:
        """Set the working dtype, torch.float32 or torch.bfloat16, in place.

        It is the dtype of attention and MLP matrices, token table and projector, and of what
        flows between them. The rest is fp32, much as in openpi's torch model: norms and their
        modulations, patch and position embeddings, time MLP and action projections.

        Raises ValueError for another dtype.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        narrow = {
            parameter
            for module in self.modules()
            if isinstance(module, (SelfAttention, Mlp, KeyValue, GatedMlp, nn.Embedding))
            for parameter in module.parameters()
        }
        narrow.update(self.vision.projector.parameters())
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype if parameter in narrow else torch.float32)
        return self

    def condition(self, time: Tensor) -> Tensor:
        """What modulates the expert at `time` (...) → fp32 (..., d)."""
        config = self.config
        embedded = time_embedding(
            time, config.expert_width, config.time_min_period, config.time_max_period
        )
        return F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(embedded))))

    def _velocity(self, view: ExpertView, actions: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        x = self.action_in(actions).to(self.dtype)
        velocity: Tensor = self.action_out(self.expert(x, modulations, view).float())
        return velocity

    def _schedule(
        self, num_steps: int, noise: Tensor, decided: int
    ) -> Iterator[tuple[float, list[Tensor]]]:
        """The time and the modulations of each step.

        Modulations are (1, 1, 3d), or (1, h, 3d) if the first actions are decided. They depend on
        the schedule alone, so all steps share one product per norm.
        """
        times = schedule_times(num_steps)
        # The same numbers on the device: a CUDA graph cannot hold a copy of them from the host.
        steps = torch.arange(num_steps, dtype=torch.float64, device=noise.device)
        table_times = (1.0 + steps * (-1.0 / num_steps)).float()
        condition = self.condition(F.pad(table_times, (0, 1)) if decided else table_times)
        by_norm = [table[:, None, None] for table in self.expert.modulations(condition)]
        is_decided = torch.arange(noise.shape[1], device=noise.device)[:, None] < decided
        for step in range(num_steps):
            if decided:
                own = [torch.where(is_decided, table[-1], table[step]) for table in by_norm]
            else:
                own = [table[step] for table in by_norm]
            yield times[step], own


def schedule_times(num_steps: int) -> list[float]:
    """The time of each Euler step, from 1 (noise) on (LeRobot flow_matching.py)."""
    return [1.0 + step * (-1.0 / num_steps) for step in range(num_steps)]


def time_embedding(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """Sine and cosine features of `time` (...) at geometric periods → fp32 (..., width).

    Angles reach 1571 rad, so they are float64 as in openpi pi0_pytorch.py.
    """
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = time.double()[..., None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], -1).float()


def _initialise(model: Pi05) -> None:
    """Weights that keep the variance of activations; norms start plain and modulations at zero."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    for module in model.modules():
        if isinstance(module, AdaRMSNorm):
            nn.init.zeros_(module.dense.weight)
    nn.init.normal_(model.vision.position_embed, std=model.config.vision_width**-0.5)
