"""Weights in the layouts that kernels read, made once.

Every matrix product of a stage has one `Matrix`: neighbours that read the same input are stacked,
rows that an epilogue combines are neighbours, and FP8 weights come with the scales of both sides.
Packing copies one matrix at a time, so a model on the CPU never has to fit twice on the GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from halfpi.config import Pi05Config
from halfpi.kernels.geglu import interleaved
from halfpi.kernels.patchify import patch_weight
from halfpi.kernels.qkv_rope import paired
from halfpi.model import Pi05
from halfpi.model.siglip import VisionBlock
from halfpi.quant import Scales, quantise
from halfpi.quant.sites import matrix_products

# Pixels of a patch are padded to whole steps along K of a product.
PATCH_ALIGN = 64
# Hidden activations of SigLIP are padded to whole lines of memory: rows of 4304 bytes would have
# every load of 128 bytes touch two lines.
HIDDEN_ALIGN = 128


@dataclass(frozen=True)
class Matrix:
    """The right side of one product, and what its epilogue needs.

    weight: (n, k), in the working dtype or E4M3. bias: (n,), fp32 unless said otherwise. With E4M3,
    input_scale quantises what comes in and alpha, its product with the weight's scale, undoes both:
    fp32 (1,), or in the expert (steps, 1).
    """

    weight: Tensor
    bias: Tensor | None = None
    alpha: Tensor | None = None
    input_scale: Tensor | None = None

    def input_buffer(self, rows: int) -> Tensor:
        """Room for (rows, k) of what it is multiplied with, in its dtype."""
        return self.weight.new_empty(rows, self.weight.shape[1])

    def at(self, step: int) -> Matrix:
        """The matrix as denoising step `step` uses it."""
        if self.alpha is None or self.input_scale is None:
            return self
        return dataclasses.replace(self, alpha=self.alpha[step], input_scale=self.input_scale[step])


@dataclass(frozen=True)
class LayerNormWeights:
    """Weight and bias, both fp32 (d,)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class VisionLayer:
    """One SigLIP block.

    qkv has no bias: a query's, fp32 (q, k), is added where it is read, a key's cancels in the
    softmax, and a value's adds up to a constant, which is in the bias of out.
    """

    attn_norm: LayerNormWeights
    qkv: Matrix
    query_bias: Tensor
    out: Matrix
    mlp_norm: LayerNormWeights
    fc1: Matrix
    fc2: Matrix


@dataclass(frozen=True)
class VisionWeights:
    """SigLIP. position: fp32 (tokens_per_image, d).

    stacks: by the name of a layer's matrix, the weights of all layers, one behind another: (depth,
    n, k), of which each layer has its own.
    """

    patch: Matrix
    position: Tensor
    layers: tuple[VisionLayer, ...]
    stacks: Mapping[str, Tensor]
    norm: LayerNormWeights
    projector: Matrix


@dataclass(frozen=True)
class PrefixLayer:
    """One block of the prefix; gains are Gemma's 1 + weight, fp32 (d,)."""

    attn_gain: Tensor
    qkv: Matrix
    out: Matrix
    mlp_gain: Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True)
class PrefixWeights:
    """The prefix: its token table, all whole layers, and the last layer's norm, keys and values."""

    embed: Tensor
    layers: tuple[PrefixLayer, ...]
    last_gain: Tensor
    last_kv: Matrix


@dataclass(frozen=True)
class ExpertLayer:
    """One block of the expert; its norms are in the modulations."""

    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True)
class ExpertWeights:
    """The expert, with the fp32 projections at its ends."""

    action_in: Matrix
    layers: tuple[ExpertLayer, ...]
    action_out: Matrix


class Packer:
    """Packs parts of `model` for `device`, in E4M3 what has `scales`, else in `dtype`."""

    def __init__(
        self, model: Pi05, device: torch.device, dtype: torch.dtype, scales: Scales | None
    ) -> None:
        self.config: Pi05Config = model.config
        self._model = model
        self._device = device
        self._dtype = dtype
        self._scales = scales
        self._sites = {site.name: site for site in matrix_products(model.config)}

    def vision(self) -> VisionWeights:
        """All of SigLIP and the projector."""
        siglip = self._model.vision
        layers, stacks = _stacked(
            [self._vision_layer(index) for index in range(self.config.vision_depth)]
        )
        return VisionWeights(
            patch=self._patch(siglip.patch_embed),
            position=self._wide(siglip.position_embed),
            layers=layers,
            stacks=stacks,
            norm=self._layer_norm(siglip.norm),
            projector=self._linear(siglip.projector, self._dtype),
        )

    def prefix(self) -> PrefixWeights:
        """The prefix stack and its token table."""
        last = self.config.depth - 1
        return PrefixWeights(
            layers=tuple(self._prefix_layer(index) for index in range(last)),
            last_gain=self._gain(f"prefix.layers.{last}.attn_norm"),
            last_kv=self._site(f"prefix.layers.{last}.attn.kv", self._paired_heads),
            embed=self._moved(self._model.prefix.embed.weight),
        )

    def expert(self) -> ExpertWeights:
        """The expert stack and the projections of actions."""
        model = self._model
        return ExpertWeights(
            action_in=self._linear(model.action_in, torch.float32),
            layers=tuple(self._expert_layer(index) for index in range(self.config.depth)),
            action_out=self._linear(model.action_out, torch.float32),
        )

    def _vision_layer(self, index: int) -> VisionLayer:
        path = f"vision.layers.{index}"
        block = cast("VisionBlock", self._model.vision.layers[index])
        attn, heads = block.attn, (self.config.vision_heads, self.config.vision_head_dim)
        out = self._site(f"{path}.attn.o")
        constant = self._wide(attn.o.weight) @ self._wide(attn.v.bias)
        return VisionLayer(
            attn_norm=self._layer_norm(block.attn_norm),
            qkv=dataclasses.replace(self._site(f"{path}.attn.qkv"), bias=None),
            query_bias=self._wide(attn.q.bias).view(heads),
            out=dataclasses.replace(out, bias=self._wide(attn.o.bias) + constant),
            mlp_norm=self._layer_norm(block.mlp_norm),
            fc1=self._fc1(f"{path}.mlp.fc1"),
            fc2=self._site(f"{path}.mlp.fc2", lambda weights: _padded(weights[0], 1)),
        )

    def _fc1(self, name: str) -> Matrix:
        """Padded with outputs that GELU leaves zero.

        Its bias is in the dtype of 16-bit weights, because cuBLAS, which can follow the product
        with bias and GELU, wants it so.
        """
        matrix = self._site(name, lambda weights: _padded(weights[0], 0))
        assert matrix.bias is not None
        bias = _padded(matrix.bias, 0)
        narrow = matrix.weight.dtype if matrix.alpha is None else bias.dtype
        return dataclasses.replace(matrix, bias=bias.to(narrow))

    def _prefix_layer(self, index: int) -> PrefixLayer:
        path = f"prefix.layers.{index}"
        return PrefixLayer(
            attn_gain=self._gain(f"{path}.attn_norm"),
            qkv=self._site(f"{path}.attn.qkv", self._paired_heads),
            out=self._site(f"{path}.attn.o"),
            mlp_gain=self._gain(f"{path}.mlp_norm"),
            gate_up=self._site(f"{path}.mlp.gate_up", _interleaved),
            down=self._site(f"{path}.mlp.down"),
        )

    def _expert_layer(self, index: int) -> ExpertLayer:
        path = f"expert.layers.{index}"
        return ExpertLayer(
            qkv=self._site(f"{path}.attn.qkv", self._paired_heads),
            out=self._site(f"{path}.attn.o"),
            gate_up=self._site(f"{path}.mlp.gate_up", _interleaved),
            down=self._site(f"{path}.mlp.down"),
        )

    def _site(self, name: str, stack: Callable[[list[Tensor]], Tensor] = torch.cat) -> Matrix:
        site = self._sites[name]
        linears = site.layers(self._model)
        weight = stack([self._moved(linear.weight) for linear in linears])
        bias = self._bias(linears)
        scales = None if self._scales is None else self._scales.sites.get(name)
        if scales is None:
            return Matrix(weight, bias)
        inputs = torch.tensor(scales.input, device=self._device)
        if site.per_step:
            inputs = inputs[:, None]
        quantised = quantise(weight, scales.weight)
        return Matrix(quantised, bias, inputs * scales.weight, inputs)

    def _paired_heads(self, weights: Sequence[Tensor]) -> Tensor:
        """q (if any), k and v, with the rows that a rotation turns together as neighbours."""
        *turned, value = weights
        return torch.cat([*(paired(one, self.config.head_dim) for one in turned), value])

    def _patch(self, patch_embed: nn.Conv2d) -> Matrix:
        pixels = patch_embed.weight[0].numel()
        width = math.ceil(pixels / PATCH_ALIGN) * PATCH_ALIGN
        weight = patch_weight(patch_embed.weight.detach(), width)
        return Matrix(self._moved(weight).contiguous(), self._bias([patch_embed]))

    def _linear(self, linear: nn.Linear, dtype: torch.dtype) -> Matrix:
        return Matrix(linear.weight.detach().to(self._device, dtype), self._bias([linear]))

    def _layer_norm(self, norm: nn.LayerNorm) -> LayerNormWeights:
        return LayerNormWeights(self._wide(norm.weight), self._wide(norm.bias))

    def _gain(self, name: str) -> Tensor:
        return 1 + self._wide(self._model.get_parameter(f"{name}.weight"))

    def _bias(self, layers: Sequence[nn.Linear | nn.Conv2d]) -> Tensor | None:
        biases = [self._wide(layer.bias) for layer in layers if layer.bias is not None]
        return torch.cat(biases) if biases else None

    def _moved(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(self._device, self._dtype)

    def _wide(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(self._device, torch.float32)


def _stacked(
    layers: list[VisionLayer],
) -> tuple[tuple[VisionLayer, ...], dict[str, Tensor]]:
    """The same layers, and the stacks that their matrices are now in."""
    stacks = {}
    for name in ("qkv", "out", "fc1", "fc2"):
        matrices: list[Matrix] = [getattr(layer, name) for layer in layers]
        stacks[name] = stack = torch.stack([matrix.weight for matrix in matrices])
        for index, (matrix, weight) in enumerate(zip(matrices, stack, strict=True)):
            own: dict[str, Any] = {name: dataclasses.replace(matrix, weight=weight)}
            layers[index] = dataclasses.replace(layers[index], **own)
    return tuple(layers), stacks


def _padded(tensor: Tensor, dim: int) -> Tensor:
    """`tensor` with zeros at the end of `dim`, to a multiple of HIDDEN_ALIGN."""
    shape = list(tensor.shape)
    shape[dim] = -shape[dim] % HIDDEN_ALIGN
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _interleaved(weights: Sequence[Tensor]) -> Tensor:
    gate, up = weights
    return interleaved(gate, up)
