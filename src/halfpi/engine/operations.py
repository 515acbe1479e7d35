"""The kernels as a plan calls them: matrices bring their scales, launches are looked up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfpi.engine.launches import Launches
from halfpi.engine.packing import LayerNormWeights, Matrix
from halfpi.kernels.ada_rms_norm import ada_rms_norm
from halfpi.kernels.attention import attention
from halfpi.kernels.embed import embed
from halfpi.kernels.euler import euler
from halfpi.kernels.geglu import geglu
from halfpi.kernels.layer_norm import layer_norm
from halfpi.kernels.linear import linear
from halfpi.kernels.patchify import patchify
from halfpi.kernels.qkv_rope import qkv_rope
from halfpi.kernels.rms_norm import rms_norm
from halfpi.kernels.split_linear import split_linear


class Operations:
    """Enqueues kernels on one device; every call writes into tensors that it is given.

    `reader`, where an operation takes one, is the matrix that will read its output: with an FP8
    matrix the output is quantised by that matrix's input scale.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._launches = Launches(device)

    def patchify(self, images: Tensor, patch: int, out: Tensor) -> None:
        """Rows of patches of `images` (n, h, w, c)."""
        patchify(images, patch, out, self._launches.row(out.shape[1]))

    def embed(self, tokens: Tensor, table: Tensor, out: Tensor, **places: Tensor) -> None:
        """Token embeddings into rows of `out`."""
        embed(tokens, table, out, self._launches.row(out.shape[1]), **places)

    def layer_norm(self, x: Tensor, norm: LayerNormWeights, out: Tensor, reader: Matrix) -> None:
        """LayerNorm of `x` (m, d)."""
        launch = self._launches.row(x.shape[1])
        layer_norm(x, norm.weight, norm.bias, out, launch, scale=reader.input_scale)

    def rms_norm(self, x: Tensor, gain: Tensor, out: Tensor, reader: Matrix, count: Tensor) -> None:
        """RMSNorm of `x` (m, d)."""
        launch = self._launches.row(x.shape[1])
        rms_norm(x, gain, out, launch, scale=reader.input_scale, count=count)

    def ada_rms_norm(
        self, residual: Tensor, modulation: Tensor, out: Tensor, reader: Matrix | None, **rest: Any
    ) -> None:
        """What follows a block of the expert, and the modulated norm before the next."""
        launch = self._launches.row(residual.shape[1])
        scale = None if reader is None else reader.input_scale
        ada_rms_norm(residual, modulation, out, launch, scale=scale, **rest)

    def linear(
        self, x: Tensor, matrix: Matrix, out: Tensor, reader: Matrix | None = None, **rest: Any
    ) -> None:
        """`x` times `matrix`, with the epilogue in `rest`."""
        launch = self._launches.linear(x, matrix.weight)
        linear(
            x, matrix.weight, out, launch,
            alpha=matrix.alpha, bias=matrix.bias,
            scale=None if reader is None else reader.input_scale,
            partials=self._launches.partials(x, matrix.weight, launch), **rest,
        )  # fmt: skip

    def geglu(
        self, x: Tensor, matrix: Matrix, out: Tensor, reader: Matrix, count: Tensor | None = None
    ) -> None:
        """The wide half of a gated MLP."""
        launch = self._launches.linear(x, matrix.weight)
        geglu(
            x, matrix.weight, out, launch,
            alpha=matrix.alpha, scale=reader.input_scale, count=count,
            partials=self._launches.partials(x, matrix.weight, launch),
        )  # fmt: skip

    def qkv_rope(
        self, x: Tensor, matrix: Matrix, query: Tensor | None, keys: Tensor, values: Tensor,
        cos: Tensor, sin: Tensor, **rest: Tensor,
    ) -> None:  # fmt: skip
        """q, k and v, rotated, with k and v in the cache."""
        launch = self._launches.linear(x, matrix.weight)
        qkv_rope(
            x, matrix.weight, cos, sin, query, keys, values, launch,
            alpha=matrix.alpha, partials=self._launches.partials(x, matrix.weight, launch), **rest,
        )  # fmt: skip

    def split_linear(self, x: Tensor, matrix: Matrix) -> Tensor:
        """Partial products of `x` and `matrix`, fp32 (splits, m, n), for a norm that adds them."""
        launch = self._launches.linear(x, matrix.weight)
        out = self._launches.workspace(launch.split_k, x.shape[0], matrix.weight.shape[0])
        split_linear(x, matrix.weight, out, launch)
        return out

    def attention(
        self, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, reader: Matrix,
        **counts: Tensor,
    ) -> None:  # fmt: skip
        """Attention of `query` (b, t, q, k)."""
        launch = self._launches.attention(query, keys)
        workspace = {}
        if launch.splits > 1:
            shape = (launch.splits, *query.shape)
            workspace = {
                "partials": self._launches.workspace(*shape),
                "log_sums": self._launches.workspace(*shape[:-1]),
            }
        attention(
            query, keys, values, out, launch, scale=reader.input_scale, **workspace, **counts
        )  # fmt: skip

    def euler(self, hidden: Tensor, **rest: Any) -> None:
        """The end of a denoising step, see `halfpi.kernels.euler`."""
        euler(hidden, **rest, launch=self._launches.row(hidden.shape[1]))
