"""Stages, or most of one, as one kernel whose blocks wait for each other, on Hopper GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from halfpi.config import Pi05Config
from halfpi.engine.denoise import DenoiseInputs
from halfpi.engine.packing import ExpertLayer, ExpertWeights, Matrix, VisionLayer, VisionWeights
from halfpi.engine.prefill import Cache
from halfpi.kernels import expert_stream, siglip_layers
from halfpi.kernels.expert_steps import ActionWeights, ExpertSizes, ExpertSteps, supports
from halfpi.kernels.siglip_layers import SiglipLayers, SiglipWeights
from halfpi.kernels.spec import FP8, Device


def persistent_sizes(
    config: Pi05Config, num_steps: int, precision: torch.dtype, device: torch.device
) -> ExpertSizes | None:
    """What `PersistentDenoise` would be built for, None where it cannot be."""
    sizes = ExpertSizes(
        horizon=config.horizon,
        steps=num_steps,
        precision=precision,
        width=config.expert_width,
        mlp=config.expert_mlp,
        depth=config.depth,
        q_heads=config.q_heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        action_dim=config.action_dim,
    )
    return sizes if supports(sizes, device) else None


class PersistentDenoise:
    """As `DenoiseStage`, for one schedule.

    Raises ImportError naming the extra that brings what compiles the kernel.
    """

    def __init__(
        self, sizes: ExpertSizes, weights: ExpertWeights, cache: Cache, inputs: DenoiseInputs
    ) -> None:
        """Pack the weights once more, into the stream that the kernel reads."""
        self._cache = cache
        self._inputs = inputs
        matrices = [_matrices(layer) for layer in weights.layers]
        layers = [
            expert_stream.ExpertLayer(*(matrix.weight for matrix in layer)) for layer in matrices
        ]
        quantised = sizes.precision != torch.bfloat16
        self._kernel = ExpertSteps(
            sizes,
            layers,
            _ends(weights),
            cache.keys.shape[1],
            cache.keys.device,
            input_scales=_input_scales(matrices) if quantised else None,
            weight_scales=_weight_scales(matrices) if quantised else None,
        )

    def enqueue(self, modulations: Tensor) -> None:
        """All steps of the schedule whose `modulation_table` this is."""
        inputs, cache = self._inputs, self._cache
        self._kernel(
            inputs.actions,
            cache.keys,
            cache.values,
            inputs.prefix_count,
            inputs.decided,
            cache.cos,
            cache.sin,
            modulations,
            inputs.target,
            inputs.pull,
            inputs.gains[: modulations.shape[0] - 1],
            inputs.result,
        )


def persistent_vision(
    config: Pi05Config, weights: VisionWeights, max_cameras: int, device: torch.device
) -> SiglipLayers | None:
    """All layers of SigLIP for as many cameras as can be, None where no camera can."""
    sizes = (config.tokens_per_image, config.vision_heads, config.vision_head_dim)
    layer = weights.layers[0]
    formats = [matrix.weight.dtype for matrix in (layer.qkv, layer.out, layer.fc1, layer.fc2)]
    if (
        device.type != "cuda"
        or sizes != (siglip_layers.TOKENS, siglip_layers.HEADS, siglip_layers.HEAD_DIM)
        or formats != [FP8, torch.bfloat16, FP8, FP8]
        or layer.fc2.weight.shape[1] != siglip_layers.HIDDEN
    ):
        return None
    depth, limits = len(weights.layers), Device.of(device)
    fit = [n for n in range(1, max_cameras + 1) if siglip_layers.supports(n, depth, limits)]
    return SiglipLayers(siglip_weights(weights), fit[-1], device) if fit else None


def siglip_weights(weights: VisionWeights) -> SiglipWeights:
    """SigLIP in E4M3 as the kernel reads it.

    Raises ValueError for a matrix that should have scales or a bias and has none.
    """

    def all_layers(part: Callable[[VisionLayer], Tensor]) -> Tensor:
        return torch.stack([part(layer).flatten() for layer in weights.layers])

    def matrices(layer: VisionLayer) -> list[Matrix]:
        return [getattr(layer, site) for site in siglip_layers.SITES]

    return SiglipWeights(
        **weights.stacks,
        query_bias=all_layers(lambda layer: layer.query_bias),
        attn_gain=all_layers(lambda layer: layer.attn_norm.weight),
        attn_shift=all_layers(lambda layer: layer.attn_norm.bias),
        out_bias=all_layers(lambda layer: _bias(layer.out, "out")),
        mlp_gain=all_layers(lambda layer: layer.mlp_norm.weight),
        mlp_shift=all_layers(lambda layer: layer.mlp_norm.bias),
        fc1_bias=all_layers(lambda layer: _bias(layer.fc1, "fc1")),
        fc2_bias=all_layers(lambda layer: _bias(layer.fc2, "fc2")),
        alphas=all_layers(lambda layer: torch.cat([_alpha(one) for one in matrices(layer)])),
        input_scales=all_layers(lambda layer: torch.cat([_scale(one) for one in matrices(layer)])),
    )


def _matrices(layer: ExpertLayer) -> tuple[Matrix, ...]:
    return layer.qkv, layer.out, layer.gate_up, layer.down


def _ends(weights: ExpertWeights) -> ActionWeights:
    first, last = weights.action_in, weights.action_out
    return ActionWeights(
        first.weight, _bias(first, "action_in"), last.weight, _bias(last, "action_out")
    )


def _input_scales(matrices: list[tuple[Matrix, ...]]) -> Tensor:
    """fp32 (steps, depth, 4)."""
    return torch.stack([torch.cat([_scale(one) for one in layer], 1) for layer in matrices], 1)


def _weight_scales(matrices: list[tuple[Matrix, ...]]) -> Tensor:
    """fp32 (depth, 4): what is left of alpha without the input's scale."""
    rows = [[_alpha(one)[0] / _scale(one)[0] for one in layer] for layer in matrices]
    return torch.stack([torch.cat(row) for row in rows])


def _bias(matrix: Matrix, name: str) -> Tensor:
    if matrix.bias is None:
        raise ValueError(f"{name} must have a bias")
    return matrix.bias


def _scale(matrix: Matrix) -> Tensor:
    if matrix.input_scale is None:
        raise ValueError("an FP8 matrix must have an input scale")
    return matrix.input_scale


def _alpha(matrix: Matrix) -> Tensor:
    if matrix.alpha is None:
        raise ValueError("an FP8 matrix must have the product of its scales")
    return matrix.alpha
