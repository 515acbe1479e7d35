"""Flow matching for π0.5, with training-time real-time chunking.

The model learns the velocity `noise − actions` at `x = t·noise + (1 − t)·actions` (openpi pi0.py).
Time is drawn from Beta(1.5, 1), which favours high noise: there the plan is decided, and there
few-step sampling lives. In a share of the chunks the first d actions are given clean at time 0, as
they are at inference while an earlier chunk is still being executed (training-time RTC, LeRobot
flow_matching.py); they carry no loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from halfpi.model import Pi05

TIME_ALPHA = 1.5
TIME_SCALE, TIME_OFFSET = 0.999, 0.001


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device; shapes as in `Pi05.sample_actions`.

    actions: fp32 (b, h, a), normalised. auxiliary: fp32 (b, targets), see `AuxiliaryHead`.
    """

    images: Tensor
    image_mask: Tensor
    tokens: Tensor
    token_mask: Tensor
    actions: Tensor
    auxiliary: Tensor


@dataclass(frozen=True)
class ChunkingConfig:
    """Training-time real-time chunking: a `share` of chunks has 1 to `longest` actions given."""

    share: float = 0.4
    longest: int = 6


@dataclass(frozen=True)
class Losses:
    """Mean losses of a batch: of the flow, and of the auxiliary head."""

    flow: Tensor
    auxiliary: Tensor


class AuxiliaryHead(torch.nn.Module):
    """Predicts where hand, objects and goal are from the image tokens; thrown away after training.

    Actions say little about what an image shows. Positions, which a simulator knows exactly, teach
    the vision encoder to localise in a fraction of the steps.
    """

    def __init__(self, image_tokens: int, width: int, targets: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(image_tokens * width)
        self.linear = torch.nn.Linear(image_tokens * width, targets)

    def forward(self, image_tokens: Tensor) -> Tensor:
        """Image tokens (b, n·t, d) → (b, targets)."""
        prediction: Tensor = self.linear(self.norm(image_tokens.flatten(1)))
        return prediction


def losses(
    model: Pi05, head: AuxiliaryHead, batch: Batch, copies: int, chunking: ChunkingConfig
) -> Losses:
    """The losses of `batch`, with `copies` draws of noise and time for each observation.

    The prefix does not depend on noise, so more draws cost only passes of the small expert.
    """
    image_tokens = model.vision(batch.images)
    prefix = model.prefill(image_tokens, batch.image_mask, batch.tokens, batch.token_mask)
    actions = batch.actions.repeat_interleave(copies, 0)
    noise = torch.randn_like(actions)
    given = _given(len(actions), actions.shape[1], chunking, actions.device)
    time = sample_time(len(actions), actions.device)[:, None].masked_fill(given, 0.0)
    noisy = torch.lerp(actions, noise, time[..., None])
    velocity = model.velocity(prefix.repeat_interleave(copies), noisy, time)
    error = (velocity.float() - (noise - actions)).square().mean(-1)
    flow = error.masked_fill(given, 0.0).sum() / (~given).sum()
    return Losses(flow, F.smooth_l1_loss(head(image_tokens).float(), batch.auxiliary))


def _given(count: int, horizon: int, chunking: ChunkingConfig, device: torch.device) -> Tensor:
    """Which actions are given clean, bool (count, horizon): the first few in a share of rows."""
    lengths = torch.randint(1, chunking.longest + 1, (count, 1), device=device)
    some = torch.rand((count, 1), device=device) < chunking.share
    return some & (torch.arange(horizon, device=device) < lengths)


def sample_time(count: int, device: torch.device) -> Tensor:
    """Flow times in (0, 1], fp32 (count,); 1 is pure noise."""
    # The distribution function of Beta(a, 1) is t^a, so its inverse turns uniform draws into these.
    draws: Tensor = torch.rand(count, device=device) ** (1 / TIME_ALPHA)
    return draws * TIME_SCALE + TIME_OFFSET
