"""The denoise stage as a chain of kernels: noise to actions, all steps of a schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfpi.config import Pi05Config
from halfpi.engine.operations import Operations, Pending
from halfpi.engine.packing import ExpertLayer, ExpertWeights
from halfpi.engine.prefill import Cache
from halfpi.model import Pi05, schedule_times


@dataclass(frozen=True)
class DenoiseInputs:
    """What a call brings, in device memory, and where it leaves the actions.

    actions: fp32 (h, a), noise, which need not outlive the stage. decided: int32 (1,), how many of
    them are given. prefix_count, key_count: int32 (1,), valid prefix tokens, and those with the h
    actions. target: fp32 (h, a), pull: fp32 (h,), gains: fp32 (most steps,), of guidance. result:
    fp32 (h, a), in memory of the host that the device can write.
    """

    actions: Tensor
    decided: Tensor
    prefix_count: Tensor
    key_count: Tensor
    target: Tensor
    pull: Tensor
    gains: Tensor
    result: Tensor


@torch.inference_mode()
def modulation_table(model: Pi05, num_steps: int, device: torch.device) -> Tensor:
    """All modulations of a schedule, fp32 (steps + 1, 2·depth + 1, 3d); the last row is time 0."""
    times = torch.tensor([*schedule_times(num_steps), 0.0])
    condition = model.condition(times.to(model.action_in.weight.device))
    return torch.stack(model.expert.modulations(condition), 1).to(device)


class DenoiseStage:
    """The expert, integrated over a schedule."""

    def __init__(
        self,
        config: Pi05Config,
        weights: ExpertWeights,
        operations: Operations,
        cache: Cache,
        inputs: DenoiseInputs,
    ) -> None:
        """Allocate. Buffers that matrices read have the dtype of those."""
        self._config = config
        self._weights = weights
        self._ops = operations
        self._cache = cache
        self._inputs = inputs
        device, rows = inputs.actions.device, inputs.actions.shape[0]
        width, dtype = config.expert_width, cache.keys.dtype
        layer = weights.layers[0]
        heads = (rows, config.q_heads, config.head_dim)
        self._residual = torch.empty(rows, width, device=device)
        self._final = torch.empty(rows, width, device=device)
        self._normed = layer.qkv.input_buffer(rows)
        self._query = torch.empty(heads, dtype=dtype, device=device)
        self._mixed = layer.out.input_buffer(rows).view(heads)
        self._hidden = layer.down.input_buffer(rows)

    def enqueue(self, modulations: Tensor) -> None:
        """All steps of the schedule whose `modulation_table` this is."""
        times = schedule_times(modulations.shape[0] - 1)
        for step, time in enumerate(times):
            # Two rows: this step's, and that of the actions that are given.
            own = modulations[step :: len(times) - step]
            self._step(step, time, 1 / len(times), own)
        self._inputs.result.copy_(self._inputs.actions, non_blocking=True)

    def _step(self, step: int, time: float, size: float, modulations: Tensor) -> None:
        ops, inputs, weights = self._ops, self._inputs, self._weights
        ops.linear(inputs.actions, weights.action_in, self._residual)
        gated = None
        for index, layer in enumerate(weights.layers):
            gated = self._layer(index, _at(layer, step), modulations, gated)
        last = modulations[:, -1]
        ops.ada_rms_norm(self._residual, last, self._final, None, inputs.decided, gated)
        ops.euler(
            self._final,
            weight=weights.action_out.weight,
            bias=weights.action_out.bias,
            actions=inputs.actions,
            target=inputs.target,
            pull=inputs.pull,
            gain=inputs.gains[step : step + 1],
            decided=inputs.decided,
            time=time,
            step=size,
        )

    def _layer(
        self,
        index: int,
        layer: ExpertLayer,
        modulations: Tensor,
        gated: tuple[Pending, Tensor] | None,
    ) -> tuple[Pending, Tensor]:
        """One block; `gated` is the output of the one before, which its first norm adds."""
        ops, decided, residual = self._ops, self._inputs.decided, self._residual
        first, second = modulations[:, 2 * index], modulations[:, 2 * index + 1]
        ops.ada_rms_norm(residual, first, self._normed, layer.qkv, decided, gated)
        self._attention(index, layer)
        attended = ops.split_linear(self._mixed.flatten(1), layer.out)
        gated = (attended, self._gate(first))
        ops.ada_rms_norm(residual, second, self._normed, layer.gate_up, decided, gated)
        ops.geglu(self._normed, layer.gate_up, self._hidden, layer.down)
        return ops.split_linear(self._hidden, layer.down), self._gate(second)

    def _attention(self, index: int, layer: ExpertLayer) -> None:
        ops, inputs, cache = self._ops, self._inputs, self._cache
        keys, values = cache.keys[index], cache.values[index]
        ops.qkv_rope(
            self._normed, layer.qkv, self._query, keys, values, cache.cos, cache.sin,
            offset=inputs.prefix_count,
        )  # fmt: skip
        ops.attention(
            self._query[None], keys[None], values[None], self._mixed[None], layer.out,
            key_count=inputs.key_count,
        )  # fmt: skip

    def _gate(self, modulation: Tensor) -> Tensor:
        return modulation[:, 2 * self._config.expert_width :]


def _at(layer: ExpertLayer, step: int) -> ExpertLayer:
    """The layer with the scales of one step."""
    return ExpertLayer(
        layer.qkv.at(step), layer.out.at(step), layer.gate_up.at(step), layer.down.at(step)
    )
