"""The training loop: AdamW with warm-up and cool-down, averaged weights, resumable."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfpi.config import Pi05Config
from halfpi.files import atomic_write
from halfpi.model import Pi05
from halfpi.model.pi05 import time_embedding
from halfpi.training.data import Batches
from halfpi.training.loss import AuxiliaryHead, Batch, ChunkingConfig, losses


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    A run that is resumed with more `steps` goes on as if it had been asked for them at first,
    unless it had begun to cool down.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    noises_per_frame: int = 4
    weight_decay: float = 0.02
    warmup_steps: int = 300
    cooldown_share: float = 0.25
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    chunking: ChunkingConfig = dataclasses.field(default_factory=ChunkingConfig)
    auxiliary_weight: float = 0.3
    checkpoint_every: int = 200


@dataclass(frozen=True)
class Progress:
    """One report of a running training; losses are means since the report before."""

    step: int
    flow_loss: float
    auxiliary_loss: float
    steps_per_second: float


class Trainer:
    """Holds what changes while training; `averaged` is the model to use afterwards.

    number_tokens: the token of each state bin. start: a model of `model_config` to go on from, in
    place of random weights.
    """

    def __init__(
        self,
        model_config: Pi05Config,
        config: TrainConfig,
        batches: Batches,
        number_tokens: Mapping[int, int],
        start: Pi05 | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self._config = config
        self._batches = batches
        if start is None:
            start = Pi05(model_config)
            _initialise_numbers(start.prefix.embed.weight, number_tokens)
        self.model = start.to(batches.device).requires_grad_(True)
        self.averaged = copy.deepcopy(self.model)
        tokens = batches.cameras * model_config.tokens_per_image
        self._head = AuxiliaryHead(tokens, model_config.prefix_width, batches.located)
        self._head.to(batches.device)
        self._optimizer = _optimizer(self.model, self._head, config)
        self.step = 0

    def train(self, checkpoint: Path, seconds: float | None = None) -> Iterator[Progress]:
        """Train to the configured step, or for `seconds`, saving to `checkpoint` as it goes.

        Raises RuntimeError when the loss is no longer finite; what was saved before stays.
        """
        config, began = self._config, time.monotonic()
        sums = torch.zeros(2, device=self._batches.device)
        since, last = began, self.step
        for batch in self._batches.steps(self.step, config.steps, config.batch_size, config.seed):
            sums += self._train_step(batch)
            now = time.monotonic()
            over = seconds is not None and now - began > seconds
            if self.step % config.checkpoint_every == 0 or over or self.step == config.steps:
                count = self.step - last
                flow, auxiliary = (sums / count).tolist()
                if not math.isfinite(flow + auxiliary):
                    raise RuntimeError(f"the loss became {flow} before step {self.step}")
                self.save(checkpoint)
                yield Progress(self.step, flow, auxiliary, count / (now - since))
                since, last = now, self.step
                sums.zero_()
            if over:
                break

    def _train_step(self, batch: Batch) -> Tensor:
        """One update; returns the two losses (2,), on the device."""
        config = self._config
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_factor(self.step, config)
        with torch.autocast(self._batches.device.type, torch.bfloat16):
            result = losses(self.model, self._head, batch, config.noises_per_frame, config.chunking)
        self._optimizer.zero_grad()
        torch.autograd.backward(result.flow + config.auxiliary_weight * result.auxiliary)
        nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_clip)
        self._optimizer.step()
        self._update_average()
        self.step += 1
        return torch.stack([result.flow.detach(), result.auxiliary.detach()])

    @torch.no_grad()
    def _update_average(self) -> None:
        # Early on the average forgets faster, or it would remember the initial weights.
        decay = min(self._config.ema_decay, (1 + self.step) / (10 + self.step))
        averaged: list[Tensor] = [*self.averaged.parameters()]
        current: list[Tensor] = [*self.model.parameters()]
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def save(self, path: Path) -> None:
        """Write everything that `resume` needs; the file appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"step": self.step, "train_config": self._identity(), **self._state()}
        with atomic_write(path) as temporary:
            torch.save(state, temporary)

    def resume(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises ValueError if the file is not such a checkpoint or of another model or training
        configuration.
        """
        try:
            saved: dict[str, Any] = torch.load(
                path, map_location=self._batches.device, weights_only=True
            )
            before = saved["train_config"]
        except Exception as error:
            raise ValueError(f"{path} is not a training checkpoint: {error!r}") from error
        now = self._identity()
        if before != now:
            changed = {k: (before.get(k), v) for k, v in now.items() if before.get(k) != v}
            raise ValueError(f"{path} was trained with other settings (then, now): {changed}")
        self.step = saved["step"]
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "head": self._head,
            "averaged": self.averaged,
            "optimizer": self._optimizer,
        }

    def _state(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share; the schedule may grow."""
        growing = ("steps", "cooldown_share", "checkpoint_every")
        train = {k: v for k, v in dataclasses.asdict(self._config).items() if k not in growing}
        return {**train, "model": dataclasses.asdict(self.model.config)}


def _initialise_numbers(table: Tensor, number_tokens: Mapping[int, int]) -> None:
    """Start the tokens of state bins as sines of their value: neighbours begin alike."""
    for number, token in number_tokens.items():
        wave = time_embedding(torch.tensor(number / 256), table.shape[1], 0.03, 4.0)
        with torch.no_grad():
            table[token] = wave * (2 / table.shape[1]) ** 0.5


def rate_factor(step: int, config: TrainConfig) -> float:
    """The learning rate as a share of the highest: linear warm-up, constant, linear cool-down."""
    warm = min(1.0, (step + 1) / config.warmup_steps)
    left = (config.steps - step) / max(1.0, config.cooldown_share * config.steps)
    return min(warm, left, 1.0)


def _optimizer(model: Pi05, head: AuxiliaryHead, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [*model.parameters(), *head.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
