"""The denoise stage as one persistent kernel for Hopper: all steps and layers in one launch.

A step of the action expert is a chain of small products with M = h rows. As separate kernels each
costs more than its bytes, because its ramp is exposed. Here every SM keeps one block for the whole
stage. Its weights are packed, in the order in which it reads them, into one stream of bytes; one
warp copies the stream into a ring in shared memory and runs ahead of the dependency chain, so only
latencies of exchanging activations remain.

The CUDA source lies in `cuda/` and is compiled at run time through `cuda-core` (extra `hopper`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertSizes:
    """What the kernel is compiled for.

    horizon: h. capacity: rows of the key/value cache, at least prefix + h. precision: torch.bfloat16
    or torch.float8_e4m3fn, of all matrix weights and of what they are multiplied with.
    """

    horizon: int
    steps: int
    capacity: int
    precision: torch.dtype = torch.bfloat16
    width: int = 1024
    mlp: int = 4096
    depth: int = 18
    q_heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256
    action_dim: int = 32


@dataclass(frozen=True)
class ExpertLayer:
    """Matrices of one layer, all of `ExpertSizes.precision`, as the other kernels read them.

    qkv: ((q + 2)·k, d), rows of q, k, v, with q and k `paired` (qkv_rope.py). out: (d, q·k).
    gate_up: (2·mlp, d), `interleaved` (geglu.py). down: (d, mlp).
    """

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class ActionWeights:
    """fp32: weight_in (d, a), bias_in (d,), weight_out (a, d), bias_out (a,)."""

    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor


def supports(sizes: ExpertSizes, device: torch.device) -> bool:
    """Whether `ExpertSteps` can be built for `sizes` on `device`: a Hopper GPU with cuda-core."""
    raise NotImplementedError


class ExpertSteps:
    """The compiled kernel with its packed weights and workspace, for one stream at a time.

    Building compiles (or reads the cubin from the user's cache), packs and allocates. A call
    allocates nothing, synchronises nothing and can be captured in a CUDA graph.

    Raises ValueError naming what is wrong; ImportError naming the extra `hopper`.
    """

    def __init__(
        self,
        sizes: ExpertSizes,
        layers: Sequence[ExpertLayer],
        action: ActionWeights,
        device: torch.device,
        *,
        input_scales: Tensor | None = None,
        weight_scales: Tensor | None = None,
    ) -> None:
        """Pack `layers`.

        input_scales: fp32 (steps, depth, 4), of the inputs of qkv, out, gate_up, down; weight_scales:
        fp32 (depth, 4), of the matrices; both with E4M3 only, stored number · scale = value.
        """
        raise NotImplementedError

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
    ) -> None:
        """Denoise `actions` fp32 (h, a) in place, on torch's current stream.

        keys, values: bfloat16 (depth, capacity, 1, k); rows from prefix_count on are overwritten.
        prefix_count, decided: int32 (1,). Rows of `actions` below `decided` are given: they keep
        their value and use the last row of the modulations. cos, sin: fp32 (capacity, k/2).
        modulations: fp32 (steps + 1, 2·depth + 1, 3d), the last row is time 0. target: fp32 (h, a),
        weights: fp32 (h,), gains: fp32 (steps,): guidance; zero weights switch it off.
        """
        raise NotImplementedError
