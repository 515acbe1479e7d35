"""SigLIP: camera images to prefix tokens (openpi siglip.py; pre-norm ViT without a class token)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfpi.config import Pi05Config
from halfpi.model.attention import attention

NORM_EPS = 1e-6


class LayerNorm(nn.LayerNorm):
    """LayerNorm in fp32 whatever the dtype of its input, which the output keeps."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., d)."""
        return super().forward(x.float()).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention with biases; every image token sees every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the tokens of `x` (b, t, d) → (b, t, d)."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)) for project in (self.q, self.k, self.v)
        )
        mixed = attention(query, [key.transpose(1, 2)], [value.transpose(1, 2)])
        out: Tensor = self.o(mixed)
        return out


class Mlp(nn.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., d) → (..., d)."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.attn_norm = LayerNorm(config.vision_width)
        self.attn = SelfAttention(config.vision_width, config.vision_heads)
        self.mlp_norm = LayerNorm(config.vision_width)
        self.mlp = Mlp(config.vision_width, config.vision_mlp)

    def forward(self, x: Tensor) -> Tensor:
        """One layer over `x` (b, t, d) → (b, t, d)."""
        x = x + self.attn(self.attn_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Siglip(nn.Module):
    """Images to tokens of the prefix's width.

    Patch and position embeddings are fp32; blocks and projector run in the projector's dtype.
    """

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        patch = config.patch_size
        self.patch_embed = nn.Conv2d(3, config.vision_width, kernel_size=patch, stride=patch)
        self.position_embed = nn.Parameter(
            torch.zeros(config.tokens_per_image, config.vision_width)
        )
        self.layers = nn.ModuleList(VisionBlock(config) for _ in range(config.vision_depth))
        self.norm = LayerNorm(config.vision_width)
        self.projector = nn.Linear(config.vision_width, config.prefix_width)

    def forward(self, images: Tensor) -> Tensor:
        """Encode `images` fp32 (b, n, 3, image_size, image_size) in [-1, 1] → (b, n·t, d).

        t = tokens_per_image patches in row-major order. Cameras do not see each other.
        """
        b, n = images.shape[:2]
        patches = self.patch_embed(images.flatten(0, 1)).flatten(2).mT
        x = (patches + self.position_embed).to(self.projector.weight.dtype)
        for layer in self.layers:
            x = layer(x)
        tokens: Tensor = self.projector(self.norm(x))
        return tokens.reshape(b, n * tokens.shape[1], tokens.shape[2])
