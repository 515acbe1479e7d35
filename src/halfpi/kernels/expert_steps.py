"""The denoise stage as one persistent kernel for Hopper: all steps and layers in one launch.

A step of the action expert is a chain of small products with M = h rows. As separate kernels each
costs more than its bytes, because its ramp is exposed. Here 64 SMs keep one block each for the
whole stage, in clusters of eight: a cluster has one attention head and an eighth of the hidden
activations, which its blocks hand to each other from shared memory to shared memory. Only what
sums over clusters goes through L2: twice a layer, to blocks on other SMs that have the rows of the
actions, and back. The weights of a block are packed, in the order in which it reads them, into one
stream of bytes (expert_stream.py); a warp copies the stream into a ring in shared memory and runs
ahead of the dependency chain.

The CUDA source lies in `cuda/` and is compiled at run time through `cuda-core` (extra `hopper`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.cuda_launch import load
from halfpi.kernels.expert_stream import (
    BLOCKS,
    HEAD_DIM,
    MLP,
    PEERS,
    Q_HEADS,
    QKV_ROWS,
    WIDTH,
    ExpertLayer,
    pack,
)
from halfpi.kernels.spec import CLUSTERS, FP8, check

NORM_EPS = 1e-6
SITES = ("qkv", "out", "gate_up", "down")
_LONGEST = 64  # horizon: the rows of a tile
_FEW = 16  # rows
_LONGEST_TILE, _KEYS = 128, 16  # keys of a tile, and those that a product takes at a time
_THREADS = 384
_SHARED_BYTES = 232_448
_COUNTERS = 3 * 32  # words, before those of layers (cuda/exchange.cuh)
_MULTIPROCESSORS = 132
_ROW_BLOCKS = CLUSTERS[PEERS] * PEERS - BLOCKS


@dataclass(frozen=True)
class ExpertSizes:
    """What the kernel is compiled for.

    horizon: h. precision: torch.bfloat16 or torch.float8_e4m3fn, of all matrix weights and of what
    they are multiplied with. The rest as in `Pi05Config`.
    """

    horizon: int
    steps: int
    precision: torch.dtype = torch.bfloat16
    width: int = WIDTH
    mlp: int = MLP
    depth: int = 18
    q_heads: int = Q_HEADS
    kv_heads: int = 1
    head_dim: int = HEAD_DIM
    action_dim: int = 32

    def check(self) -> None:
        """Raise ValueError unless the kernel can do these sizes."""
        fixed = {
            "width": WIDTH, "mlp": MLP, "q_heads": Q_HEADS, "kv_heads": 1, "head_dim": HEAD_DIM,
        }  # fmt: skip
        for name, expected in fixed.items():
            if getattr(self, name) != expected:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")
        if self.precision not in (torch.bfloat16, FP8):
            raise ValueError(f"precision must be bfloat16 or float8_e4m3fn, got {self.precision}")
        limits = {"horizon": _LONGEST, "action_dim": 32, "steps": 1000, "depth": 1000}
        for name, most in limits.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {getattr(self, name)}")

    @property
    def rows_per_block(self) -> int:
        """Rows of the actions of a block that has any. One is faster, if there is room for it."""
        return 1 if self.horizon <= _ROW_BLOCKS else 2

    @property
    def few(self) -> bool:
        """Whether rows are so few that they have an attention of their own."""
        return self.horizon <= _FEW

    @property
    def turns(self) -> int:
        """In which gate/up is multiplied.

        Two take longer, but half of the hidden activations travels meanwhile, which pays for those
        of many rows in bfloat16.
        """
        return 2 if not self.few and self.precision == torch.bfloat16 else 1

    @property
    def blocks(self) -> int:
        """Of a launch, in whole clusters."""
        row_blocks = -(-self.horizon // self.rows_per_block)
        return BLOCKS + -(-row_blocks // PEERS) * PEERS

    @property
    def buffer_bytes(self) -> int:
        """Bytes of what blocks exchange through L2 (cuda/exchange.cuh)."""
        sums = self.horizon * self.width * 2 * self.q_heads
        return 2 * self.row_bytes + sums + 2 * PEERS * 2 * self.head_dim * 2 * 8

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows as operands, which come in groups of eight."""
        return -(-self.horizon // 8) * 8 * self.width * self.precision.itemsize

    def key_tile(self, prefix: int) -> int:
        """Keys of a tile, for at most `prefix` keys, of which a block has an eighth.

        With few rows no more than a block can have, if one tile holds them: zeros cost time, too.
        """
        mine = -(-prefix // PEERS)
        return min(_LONGEST_TILE, -(-mine // _KEYS) * _KEYS) if self.few else _LONGEST_TILE

    def cache_bytes(self, prefix: int) -> int:
        """Bytes of `prefix` cached keys and values in the layout of the ring."""
        keys = self.key_tile(prefix)
        tiles = -(-prefix // (PEERS * keys))
        return self.depth * PEERS * tiles * 2 * keys * self.head_dim * 2

    def defines(self, prefix: int) -> dict[str, int]:
        """Constants of the CUDA source, for at most `prefix` keys in the cache."""
        return {
            "HORIZON": self.horizon,
            "ROWS_PER_BLOCK": self.rows_per_block,
            "STEPS": self.steps,
            "DEPTH": self.depth,
            "ACTION_DIM": self.action_dim,
            "FP8": int(self.precision == FP8),
            "FEW": int(self.few),
            "TURNS": self.turns,
            "KEY_TILE": self.key_tile(prefix),
            "BUFFER_BYTES": self.buffer_bytes,
            "SHARED_BYTES": _SHARED_BYTES,
        }


@dataclass(frozen=True)
class ActionWeights:
    """fp32: weight_in (d, a), bias_in (d,), weight_out (a, d), bias_out (a,)."""

    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor


Quantise = Callable[[Tensor, int, int, int], Tensor]


def expert_steps_reference(
    layers: Sequence[ExpertLayer],
    action: ActionWeights,
    actions: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix_count: int,
    decided: int,
    cos: Tensor,
    sin: Tensor,
    modulations: Tensor,
    target: Tensor,
    weights: Tensor,
    gains: Tensor,
    quantise: Quantise = lambda x, *_: x,
) -> Tensor:
    """The actions (h, a) that all steps make of `actions`, by openpi's formulas (pi0.py, gemma.py).

    Everything between the action projections is in the dtype of the weights, norms and softmax in
    fp32. quantise: what is done to the input of each matrix, given step, layer and site.
    """
    steps, dtype = gains.shape[0], layers[0].qkv.dtype
    rows = torch.arange(actions.shape[0], device=actions.device)
    given = (rows < decided)[:, None]
    angles = tuple(table[prefix_count + rows, None] for table in (cos, sin))
    for step in range(steps):
        modulation = torch.where(given, modulations[-1][:, None], modulations[step][:, None])
        x = F.linear(actions, action.weight_in, action.bias_in).to(dtype)
        for index, layer in enumerate(layers):
            prefix = keys[index, :prefix_count], values[index, :prefix_count]

            def linear(
                x: Tensor,
                site: int,
                layer: ExpertLayer = layer,
                at: tuple[int, int] = (step, index),
            ) -> Tensor:
                return F.linear(quantise(x, *at, site), getattr(layer, SITES[site]))

            normed, gate = _modulated(x, modulation[2 * index])
            x = x + gate * linear(_attended(linear(normed, 0), angles, prefix), 1)
            normed, gate = _modulated(x, modulation[2 * index + 1])
            wide = linear(normed, 2)
            hidden = F.gelu(wide[:, ::2], approximate="tanh") * wide[:, 1::2]
            x = x + gate * linear(hidden, 3)
        normed, _ = _modulated(x, modulation[-1])
        velocity = F.linear(normed.float(), action.weight_out, action.bias_out)
        error = target - (actions - (1 - step / steps) * velocity)
        guided = velocity - gains[step] * weights[:, None] * error
        actions = torch.where(given, actions, actions - guided / steps)
    return actions


def _modulated(x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    scale, shift, gate = modulation.chunk(3, -1)
    normed = F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPS)
    return (normed * (1 + scale) + shift).to(x.dtype), gate.to(x.dtype)


def _attended(qkv: Tensor, angles: tuple[Tensor, ...], prefix: tuple[Tensor, Tensor]) -> Tensor:
    """What h rows of `qkv` (h, (q + 2)·k) read from the prefix and each other → (h, q·k)."""
    turned, value = qkv.unflatten(1, (-1, HEAD_DIM)).split([qkv.shape[1] // HEAD_DIM - 1, 1], 1)
    even, odd = turned.float().unflatten(2, (-1, 2)).unbind(-1)
    cos, sin = angles
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(2)
    query, key = rotated.to(qkv.dtype).split([turned.shape[1] - 1, 1], 1)
    keys, values = (
        torch.cat([old.to(qkv.dtype), new])[:, 0]
        for old, new in zip(prefix, (key, value), strict=True)
    )
    logits = (query.transpose(0, 1) @ keys.T).float() * HEAD_DIM**-0.5
    return (torch.softmax(logits, -1).to(qkv.dtype) @ values).transpose(0, 1).flatten(1)


def supports(sizes: ExpertSizes, device: torch.device) -> bool:
    """Whether the kernel can do `sizes`, and `device` is a Hopper GPU with enough SMs.

    They are 132, as an H100 SXM and an H200 have.
    """
    try:
        sizes.check()
    except ValueError:
        return False
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    is_hopper = (properties.major, properties.minor) == (9, 0)
    return is_hopper and properties.multi_processor_count >= _MULTIPROCESSORS


class ExpertSteps:
    """The compiled kernel with its packed weights and workspace, for one stream at a time.

    Building compiles (or reads the cubin from the user's cache), packs and allocates. A call
    allocates nothing, synchronises nothing and can be captured in a CUDA graph. Equal inputs give
    equal bits, whatever lies in the cache behind the prefix.
    """

    def __init__(
        self,
        sizes: ExpertSizes,
        layers: Sequence[ExpertLayer],
        action: ActionWeights,
        capacity: int,
        device: torch.device,
        *,
        input_scales: Tensor | None = None,
        weight_scales: Tensor | None = None,
    ) -> None:
        """Pack `layers`.

        capacity: rows of the caches of keys and values that calls will bring, of which the last h
        are never of the prefix. input_scales: fp32 (steps, depth, 4), of the inputs of qkv, out,
        gate_up, down, and weight_scales: fp32 (depth, 4), of the matrices; both with E4M3 only. A
        stored number times its scale is the value.

        Raises ValueError naming what is wrong, ImportError naming the extra `hopper`.
        """
        sizes.check()
        _check_weights(sizes, layers, action, input_scales, weight_scales)
        self.sizes = sizes
        self._capacity, prefix = capacity, max(capacity - sizes.horizon, 1)
        self._stream = pack(layers, sizes.turns, device)
        self._constants = [
            action.weight_in.T.contiguous().to(device),
            *(part.to(device) for part in (action.bias_in, action.weight_out, action.bias_out)),
            *(
                torch.ones(1, device=device) if scales is None else scales.to(device)
                for scales in (input_scales, weight_scales)
            ),
        ]
        # Slots of keys that no action fills are multiplied by zero, so they must be finite.
        self._buffers = torch.zeros(sizes.buffer_bytes, dtype=torch.uint8, device=device)
        self._buffers[: 2 * sizes.row_bytes] = 0xFF  # nothing is there (cuda/exchange.cuh)
        self._cache = torch.empty(sizes.cache_bytes(prefix), dtype=torch.uint8, device=device)
        self._counters = torch.zeros(_COUNTERS + sizes.depth, dtype=torch.int32, device=device)
        self._kernel = load(
            "expert_steps", sizes.defines(prefix), device, _THREADS, cooperative=True
        )

    def __call__(
        self,
        actions: Tensor,
        keys: Tensor,
        values: Tensor,
        prefix_count: Tensor,
        decided: Tensor,
        cos: Tensor,
        sin: Tensor,
        modulations: Tensor,
        target: Tensor,
        weights: Tensor,
        gains: Tensor,
        result: Tensor,
    ) -> None:
        """Denoise `actions` fp32 (h, a) into `result`, on torch's current stream.

        result: fp32 (h, a), maybe `actions`, or pinned memory of the host, to save a copy.
        keys, values: bfloat16 (depth, capacity, 1, k), of which the first `prefix_count` rows are
        read, and nothing is written. prefix_count, decided: int32 (1,). Rows of `actions` below
        `decided` are given: they keep their value and use the last row of the modulations.
        cos, sin: fp32 (positions, k/2), at least prefix_count + h of them. modulations: fp32
        (steps + 1, 2·depth + 1, 3d), the last row is time 0. target: fp32 (h, a), weights: fp32
        (h,), gains: fp32 (steps,): guidance; rows of weight 0 are free.

        Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
        """
        size = self.sizes
        cache = (size.depth, self._capacity, 1, size.head_dim)
        chunk = (size.horizon, size.action_dim)
        table = (cos.shape[0], size.head_dim // 2)
        for name, tensor, shape, dtype in (
            ("actions", actions, chunk, torch.float32),
            ("keys", keys, cache, torch.bfloat16),
            ("values", values, cache, torch.bfloat16),
            ("prefix_count", prefix_count, (1,), torch.int32),
            ("decided", decided, (1,), torch.int32),
            ("cos", cos, table, torch.float32),
            ("sin", sin, table, torch.float32),
            ("modulations", modulations,
             (size.steps + 1, 2 * size.depth + 1, 3 * size.width), torch.float32),
            ("target", target, chunk, torch.float32),
            ("weights", weights, (size.horizon,), torch.float32),
            ("gains", gains, (size.steps,), torch.float32),
            ("result", result, chunk, torch.float32),
        ):  # fmt: skip
            check(name, tensor, shape, dtype)
        self._kernel(
            (size.blocks,), self._stream, self._buffers, self._cache, self._counters, actions,
            result, keys, values, self._capacity, prefix_count, decided, cos, sin, modulations,
            target, weights, gains, *self._constants,
        )  # fmt: skip


def _check_weights(
    sizes: ExpertSizes,
    layers: Sequence[ExpertLayer],
    action: ActionWeights,
    input_scales: Tensor | None,
    weight_scales: Tensor | None,
) -> None:
    if len(layers) != sizes.depth:
        raise ValueError(f"layers must be {sizes.depth}, got {len(layers)}")
    d, a = sizes.width, sizes.action_dim
    for index, layer in enumerate(layers):
        shapes = (
            (QKV_ROWS, d),
            (d, sizes.q_heads * sizes.head_dim),
            (2 * sizes.mlp, d),
            (d, sizes.mlp),
        )
        for site, shape in zip(SITES, shapes, strict=True):
            check(f"layers[{index}].{site}", getattr(layer, site), shape, sizes.precision)
    shapes_by_name: dict[str, tuple[int, ...]] = {
        "weight_in": (d, a),
        "bias_in": (d,),
        "weight_out": (a, d),
        "bias_out": (a,),
    }
    for name, action_shape in shapes_by_name.items():
        check(f"action.{name}", getattr(action, name), action_shape, torch.float32)
    if (sizes.precision == FP8) != (input_scales is not None and weight_scales is not None):
        raise ValueError("input_scales and weight_scales must be given with float8_e4m3fn only")
    check("input_scales", input_scales, (sizes.steps, sizes.depth, 4), torch.float32)
    check("weight_scales", weight_scales, (sizes.depth, 4), torch.float32)
