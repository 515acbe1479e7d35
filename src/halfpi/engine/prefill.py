"""The prefill stage as kernels: rows of the prefix to keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfpi.config import Pi05Config
from halfpi.engine.operations import Operations, Pending
from halfpi.engine.packing import PrefixLayer, PrefixWeights
from halfpi.model.attention import rotation


@dataclass(frozen=True)
class Cache:
    """Keys and values of all layers, with the rotary factors of every row.

    keys, values: (depth, s, kv, k) in the working dtype; valid prefix tokens come first, actions
    follow them. cos, sin: fp32 (s, k/2).
    """

    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def empty(
        cls, config: Pi05Config, rows: int, dtype: torch.dtype, device: torch.device
    ) -> Cache:
        """A cache of zeros: rows that nothing has written yet must at least be finite."""
        shape = (config.depth, rows, config.kv_heads, config.head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        factors = rotation(torch.arange(rows, device=device)[None], config.head_dim)
        half = config.head_dim // 2  # the other half repeats it; sin has its sign there
        cos, sin = (table[0, :, 0, half:].contiguous() for table in factors)
        return cls(keys, values, cos, sin)


class PrefillStage:
    """Gemma over the valid tokens of the prefix, image tokens first.

    embedded: (s, d), where vision writes image tokens and this stage the prompt; it outlives a
    call, so image tokens can serve again. tokens: int32 (l,). image_count, token_count, count:
    int32 (1,), valid image tokens, prompt tokens and both together.
    """

    def __init__(
        self,
        config: Pi05Config,
        weights: PrefixWeights,
        operations: Operations,
        embedded: Tensor,
        cache: Cache,
        inputs: dict[str, Tensor],
    ) -> None:
        """Allocate. inputs: tokens and the three counts.

        A buffer has the dtype of the matrix that reads it.
        """
        self._config = config
        self._weights = weights
        self._ops = operations
        self._embedded = embedded
        self._cache = cache
        self._tokens, self._image_count = inputs["tokens"], inputs["image_count"]
        self._token_count, self._count = inputs["token_count"], inputs["prefix_count"]
        rows, device = embedded.shape[0], embedded.device

        self._x = torch.empty_like(embedded)
        self._attn_normed = weights.last_kv.input_buffer(rows)
        if weights.layers:
            layer = weights.layers[0]
            heads = config.q_heads * config.head_dim
            self._query = torch.empty(rows, heads, dtype=embedded.dtype, device=device)
            self._mixed = layer.out.input_buffer(rows)
            self._mlp_normed = layer.gate_up.input_buffer(rows)
            self._hidden = layer.down.input_buffer(rows)

    def enqueue(self, rows: int) -> None:
        """Run the prefix, whose valid tokens fit into `rows`."""
        ops, weights = self._ops, self._weights
        ops.embed(
            self._tokens, weights.embed, self._embedded,
            offset=self._image_count, count=self._token_count,
        )  # fmt: skip
        x, normed, pending = self._x[:rows], self._attn_normed[:rows], None
        for index, layer in enumerate(weights.layers):
            pending = self._layer(index, layer, x, pending)
        last = len(weights.layers)
        source = x if weights.layers else self._embedded[:rows]
        ops.rms_norm(source, weights.last_gain, normed, weights.last_kv, self._count, pending)
        ops.qkv_rope(normed, weights.last_kv, None, *self._cache_of(last), count=self._count)

    def _layer(self, index: int, layer: PrefixLayer, x: Tensor, pending: Pending | None) -> Pending:
        """One block; `pending` is the output of the one before, which its first norm adds."""
        ops, count, rows = self._ops, self._count, x.shape[0]
        normed, mixed = self._attn_normed[:rows], self._mixed[:rows]
        # The first leaves image tokens as they are, for calls that reuse them.
        source, kept = (self._embedded[:rows], x) if index == 0 else (x, None)
        ops.rms_norm(source, layer.attn_gain, normed, layer.qkv, count, pending, kept)
        self._attention(index, layer, normed)
        attended = ops.split_linear(mixed, layer.out, count=count)
        normed, hidden = self._mlp_normed[:rows], self._hidden[:rows]
        ops.rms_norm(x, layer.mlp_gain, normed, layer.gate_up, count, attended)
        ops.geglu(normed, layer.gate_up, hidden, layer.down, count=count)
        return ops.split_linear(hidden, layer.down, count=count)

    def _attention(self, index: int, layer: PrefixLayer, normed: Tensor) -> None:
        config, count, rows = self._config, self._count, normed.shape[0]
        query, mixed = (
            one[:rows].view(1, rows, config.q_heads, config.head_dim)
            for one in (self._query, self._mixed)
        )
        keys, values, *_ = places = self._cache_of(index)
        self._ops.qkv_rope(normed, layer.qkv, query[0], *places, count=count)
        self._ops.attention(
            query, keys[None, :rows], values[None, :rows], mixed, layer.out,
            key_count=count, query_count=count,
        )  # fmt: skip

    def _cache_of(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        cache = self._cache
        return cache.keys[layer], cache.values[layer], cache.cos, cache.sin
