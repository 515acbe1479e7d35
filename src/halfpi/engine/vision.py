"""The vision stage as kernels: images in device memory to rows of the prefix."""

from __future__ import annotations

import torch
from torch import Tensor

from halfpi.config import Pi05Config
from halfpi.engine.operations import Operations
from halfpi.engine.packing import Matrix, VisionLayer, VisionWeights


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
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        """Allocate for `max_cameras`. dtypes: the working one, and that of products' inputs."""
        self._config = config
        self._weights = weights
        self._ops = operations
        self._prefix = prefix
        working, narrow = dtypes
        device, rows = prefix.device, max_cameras * config.tokens_per_image

        def empty(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, width, dtype=dtype, device=device)

        size, width = config.image_size, config.vision_width
        self.pixels = torch.zeros(max_cameras, size, size, 3, dtype=torch.uint8, device=device)
        self.floats = torch.zeros(max_cameras, 3, size, size, device=device)
        self._positions = weights.position.repeat(max_cameras, 1)
        self._patches = empty(weights.patch.weight.shape[1], working)
        self._x = empty(width, working)
        self._normed = empty(width, narrow)
        self._final = empty(width, working)
        self._qkv = empty(3 * width, working)
        self._mixed = empty(width, narrow)
        self._hidden = empty(config.vision_mlp, narrow)

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
        for layer in weights.layers:
            self._layer(x, layer)
        ops.layer_norm(x, weights.norm, self._final[:rows], weights.projector)
        begin = first * config.tokens_per_image
        ops.linear(self._final[:rows], weights.projector, self._prefix[begin : begin + rows])

    def _layer(self, x: Tensor, layer: VisionLayer) -> None:
        ops, rows = self._ops, x.shape[0]
        normed, hidden, mixed = (
            buffer[:rows] for buffer in (self._normed, self._hidden, self._mixed)
        )
        ops.layer_norm(x, layer.attn_norm, normed, layer.qkv)
        ops.linear(normed, layer.qkv, self._qkv[:rows])
        self._attention(rows, layer.out)
        ops.linear(mixed, layer.out, x, residual=x)
        ops.layer_norm(x, layer.mlp_norm, normed, layer.fc1)
        ops.linear(normed, layer.fc1, hidden, layer.fc2, gelu=True)
        ops.linear(hidden, layer.fc2, x, residual=x)

    def _attention(self, rows: int, reader: Matrix) -> None:
        """Every image's tokens among themselves."""
        config = self._config
        heads = (config.vision_heads, config.vision_head_dim)
        tokens = config.tokens_per_image
        qkv = self._qkv[:rows].view(-1, tokens, 3, *heads)
        out = self._mixed[:rows].view(-1, tokens, *heads)
        self._ops.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], out, reader)
