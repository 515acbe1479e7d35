"""The two Gemma stacks of π0.5 (openpi gemma.py): the prefix and the expert that reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfpi.config import Pi05Config
from halfpi.model.attention import Rotation, attention, key_bias, rotate, rotation

NORM_EPS = 1e-6


@dataclass(frozen=True)
class PrefixCache:
    """What the expert needs of a prefix.

    keys, values: (b, kv, s, k) in the working dtype, one a layer; keys are already rotated.
    mask: bool (b, s), True where a token is valid.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """Valid prefix tokens of each row, int64 (b,): the position of the first action."""
        return self.mask.sum(1)

    def repeat_interleave(self, copies: int) -> PrefixCache:
        """The cache with each row `copies` times in a row: many noises for one observation."""
        return PrefixCache(
            tuple(key.repeat_interleave(copies, 0) for key in self.keys),
            tuple(value.repeat_interleave(copies, 0) for value in self.values),
            self.mask.repeat_interleave(copies, 0),
        )


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + weight), in fp32; the output has the dtype of `x`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` (..., d)."""
        normed = F.rms_norm(x.float(), self.weight.shape, 1 + self.weight, NORM_EPS)
        return normed.to(x.dtype)


class AdaRMSNorm(nn.Module):
    """RMSNorm whose scale, shift and residual gate come from the flow time.

    `dense` maps the time condition to a modulation, in fp32. It starts at zero, so a new block is
    the identity. `forward` takes modulations because a fixed schedule needs each only once.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise `x` (b, h, d) → (normed, gate), both in its dtype.

        modulation: fp32 (b or 1, h or 1, 3d), in the order scale, shift, gate.
        """
        scale, shift, gate = modulation.chunk(3, -1)
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
        return torch.addcmul(shift, normed, 1 + scale).to(x.dtype), gate.to(x.dtype)


class KeyValue(nn.Module):
    """The half of attention that other tokens read; all that the prefix's last layer needs."""

    def __init__(self, config: Pi05Config, width: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.k = nn.Linear(width, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(width, config.kv_heads * config.head_dim, bias=False)

    def key_value(self, x: Tensor, positions: Rotation) -> tuple[Tensor, Tensor]:
        """Keys, rotated, and values of `x` (b, t, d), each (b, kv, t, k)."""
        key = rotate(self.k(x).unflatten(-1, (-1, self.head_dim)), positions)
        value = self.v(x).unflatten(-1, (-1, self.head_dim))
        return key.transpose(1, 2), value.transpose(1, 2)


class Attention(KeyValue):
    """Grouped-query attention without biases."""

    def __init__(self, config: Pi05Config, width: int) -> None:
        super().__init__(config, width)
        self.q = nn.Linear(width, config.q_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.q_heads * config.head_dim, width, bias=False)

    def read(
        self,
        x: Tensor,
        positions: Rotation,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        bias: Tensor,
    ) -> Tensor:
        """What `x` (b, t, d) reads from the segments `keys`, `values` under `bias` → (b, t, d)."""
        query = rotate(self.q(x).unflatten(-1, (-1, self.head_dim)), positions)
        out: Tensor = self.o(attention(query, keys, values, bias))
        return out


class GatedMlp(nn.Module):
    """down(gelu_tanh(gate(x)) · up(x)), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` (..., d) → (..., d)."""
        out: Tensor = self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))
        return out


class KeyValueBlock(nn.Module):
    """The prefix's last layer: nobody reads its output, so it ends at keys and values."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.prefix_width)
        self.attn = KeyValue(config, config.prefix_width)

    def forward(self, x: Tensor, positions: Rotation) -> tuple[Tensor, Tensor]:
        """Keys and values of `x` (b, s, d), each (b, kv, s, k)."""
        return self.attn.key_value(self.attn_norm(x), positions)


class PrefixBlock(nn.Module):
    """Pre-norm attention and gated MLP over the prefix."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.prefix_width)
        self.attn = Attention(config, config.prefix_width)
        self.mlp_norm = RMSNorm(config.prefix_width)
        self.mlp = GatedMlp(config.prefix_width, config.prefix_mlp)

    def forward(
        self, x: Tensor, positions: Rotation, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer over `x` (b, s, d) → (x, keys, values)."""
        normed = self.attn_norm(x)
        key, value = self.attn.key_value(normed, positions)
        x = x + self.attn.read(normed, positions, [key], [value], bias)
        return x + self.mlp(self.mlp_norm(x)), key, value


class Prefix(nn.Module):
    """Image tokens and prompt to a `PrefixCache`.

    Only keys and values are used: there is no final norm, and the last layer computes nothing else.
    """

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        # Not yet random: `Pi05` will see to that, but on the meta device, where it takes seconds.
        table = torch.empty(config.vocab_size, config.prefix_width)
        self.embed = nn.Embedding.from_pretrained(table, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(PrefixBlock(config) for _ in range(config.depth - 1))
        self.layers.append(KeyValueBlock(config))

    def forward(self, image_tokens: Tensor, tokens: Tensor, mask: Tensor) -> PrefixCache:
        """Run `image_tokens` (b, n·t, d) followed by the prompt's `tokens` int64 (b, l).

        mask: bool (b, s), s = n·t + l; invalid tokens are not read and do not advance positions.
        Only prompt embeddings are scaled by √d.
        """
        text = self.embed(tokens) * math.sqrt(self.embed.embedding_dim)
        x = torch.cat([image_tokens, text], 1)
        positions = rotation(mask.cumsum(1) - 1, self.head_dim)
        bias = key_bias(mask)
        keys, values = [], []
        for layer in self.layers[:-1]:
            x, key, value = layer(x, positions, bias)
            keys.append(key)
            values.append(value)
        key, value = self.layers[-1](x, positions)
        return PrefixCache((*keys, key), (*values, value), mask)


class ExpertBlock(nn.Module):
    """Attention over the prefix and all actions, then a gated MLP, both modulated by the time."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.attn_norm = AdaRMSNorm(config.expert_width)
        self.attn = Attention(config, config.expert_width)
        self.mlp_norm = AdaRMSNorm(config.expert_width)
        self.mlp = GatedMlp(config.expert_width, config.expert_mlp)

    def forward(
        self,
        x: Tensor,
        modulations: Sequence[Tensor],
        positions: Rotation,
        prefix: tuple[Tensor, Tensor],
        bias: Tensor,
    ) -> Tensor:
        """One layer over `x` (b, h, d).

        modulations: of the two norms. prefix: this layer's keys and values. positions, bias: as in
        `ExpertView`.
        """
        normed, gate = self.attn_norm(x, modulations[0])
        key, value = self.attn.key_value(normed, positions)
        keys, values = (prefix[0], key), (prefix[1], value)
        x = torch.addcmul(x, self.attn.read(normed, positions, keys, values, bias), gate)
        normed, gate = self.mlp_norm(x, modulations[1])
        return torch.addcmul(x, self.mlp(normed), gate)


@dataclass(frozen=True)
class ExpertView:
    """What the expert sees of a prefix at every step: its cache, and where actions stand after it.

    positions: rotary factors of the h actions. bias: fp32 (b, 1, 1, s + h), hides invalid tokens.
    """

    cache: PrefixCache
    positions: Rotation
    bias: Tensor


class Expert(nn.Module):
    """The action expert: embedded noisy actions to hidden states from which velocities are read."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.layers = nn.ModuleList(ExpertBlock(config) for _ in range(config.depth))
        self.norm = AdaRMSNorm(config.expert_width)

    def view(self, cache: PrefixCache, horizon: int) -> ExpertView:
        """The part of `forward` that does not depend on actions or time: once per observation."""
        offsets = torch.arange(horizon, device=cache.mask.device)
        positions = rotation(cache.lengths[:, None] + offsets, self.head_dim)
        return ExpertView(cache, positions, F.pad(key_bias(cache.mask), (0, horizon)))

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """All 2·depth + 1 modulations fp32 (..., 3d), in order of use, at `condition` (..., d)."""
        norms = (module for module in self.modules() if isinstance(module, AdaRMSNorm))
        return [norm.dense(condition) for norm in norms]

    def forward(self, x: Tensor, modulations: Sequence[Tensor], view: ExpertView) -> Tensor:
        """Hidden states (b, h, d) of `x` (b, h, d), in its dtype, under `modulations`."""
        pairs = zip(view.cache.keys, view.cache.values, strict=True)
        for index, (layer, prefix) in enumerate(zip(self.layers, pairs, strict=True)):
            own = modulations[2 * index : 2 * index + 2]
            x = layer(x, own, view.positions, prefix, view.bias)
        hidden: Tensor
        hidden, _ = self.norm(x, modulations[-1])
        return hidden
