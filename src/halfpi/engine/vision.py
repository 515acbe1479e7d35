"""The vision stage as kernels: images in device memory to rows of the prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from halfpi.config import Pi05Config
from halfpi.engine.operations import Operations
from halfpi.engine.packing import VisionLayer, VisionWeights
from halfpi.engine.persistent import persistent_vision


class VisionStage:
    """SigLIP over a run of cameras at once.

    Cameras are counted as blocks: block i of the images becomes block i of `prefix` (s, d), of
    tokens_per_image rows. pixels: uint8 (n, h, w, 3). floats: fp32 (n, 3, h, w), for pictures that
    8 bit cannot hold.
    """

    def __init__(
        self,
        config: Pi05Config,
        weights: VisionWeights,
        operations: Operations,
        prefix: Tensor,
        max_cameras: int,
    ) -> None:
        """Allocate for `max_cameras`. A buffer has the dtype of the matrix that reads it."""
        self._config = config
        self._weights = weights
        self._ops = operations
        self._prefix = prefix
        device, rows = prefix.device, max_cameras * config.tokens_per_image

        layer = weights.layers[0]
        size, width = config.image_size, config.vision_width
        self.pixels = torch.zeros(max_cameras, size, size, 3, dtype=torch.uint8, device=device)
        self.floats = torch.zeros(max_cameras, 3, size, size, device=device)
        self._positions = weights.position.repeat(max_cameras, 1)
        self._patches = weights.patch.input_buffer(rows)
        self._x = torch.empty(rows, width, dtype=prefix.dtype, device=device)
        self._qkv = torch.empty(rows, 3 * width, dtype=prefix.dtype, device=device)
        self._attn_normed = layer.qkv.input_buffer(rows)
        self._mixed = layer.out.input_buffer(rows)
        self._mlp_normed = layer.fc1.input_buffer(rows)
        self._hidden = layer.fc2.input_buffer(rows)
        self._final = weights.projector.input_buffer(rows)
        self._persistent = persistent_vision(config, weights, max_cameras, device)

    def enqueue(self, images: Tensor, first: int, count: int) -> None:
        """Encode blocks `first` … of `images`, which is `pixels` or `floats`."""
        config, ops, weights = self._config, self._ops, self._weights
        rows = count * config.tokens_per_image
        chosen = images[first : first + count]
        if images is self.floats:
            chosen = chosen.movedim(1, -1)
        x = self._x[:rows]
        ops.patchify(chosen, config.patch_size, self._patches[:rows])
        ops.linear(self._patches[:rows], weights.patch, x, residual=self._positions[:rows])
        if self._persistent is not None and count <= self._persistent.images:
            self._persistent(x)
            ops.layer_norm(x, weights.norm, self._final[:rows], weights.projector)
        else:
            self._chain(x)
        begin = first * config.tokens_per_image
        ops.linear(self._final[:rows], weights.projector, self._prefix[begin : begin + rows])

    def _chain(self, x: Tensor) -> None:
        """All layers, kernel by kernel, and the last norm."""
        weights, rows = self._weights, x.shape[0]
        first, *others = weights.layers
        normed = self._attn_normed[:rows]
        self._ops.layer_norm(x, first.attn_norm, normed, first.qkv)
        after = [(layer.attn_norm, layer.qkv, normed) for layer in others]
        after.append((weights.norm, weights.projector, self._final[:rows]))
        for layer, (norm, reader, out) in zip(weights.layers, after, strict=True):
            self._layer(x, layer)
            self._ops.linear_norm(self._hidden[:rows], layer.fc2, x, norm, out, reader)

    def _layer(self, x: Tensor, layer: VisionLayer) -> None:
        """One block, from behind its first norm to before its last product."""
        ops, rows = self._ops, x.shape[0]
        ops.linear(self._attn_normed[:rows], layer.qkv, self._qkv[:rows], later=layer.out.weight)
        self._attention(rows, layer)
        normed, hidden = self._mlp_normed[:rows], self._hidden[:rows]
        ops.linear_norm(self._mixed[:rows], layer.out, x, layer.mlp_norm, normed, layer.fc1)
        ops.linear(normed, layer.fc1, hidden, layer.fc2, later=layer.fc2.weight, gelu=True)

    def _attention(self, rows: int, layer: VisionLayer) -> None:
        """Every image's tokens among themselves."""
        config = self._config
        heads = (config.vision_heads, config.vision_head_dim)
        tokens = config.tokens_per_image
        qkv = self._qkv[:rows].view(-1, tokens, 3, *heads)
        query, keys, values = (qkv[:, :, part] for part in range(3))
        out = self._mixed[:rows].view(-1, tokens, *heads)
        self._ops.attention(query, keys, values, out, layer.out, bias=layer.query_bias)
