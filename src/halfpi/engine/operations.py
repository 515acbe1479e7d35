"""The kernels as a plan calls them: matrices bring their scales, launches are looked up."""

from __future__ import annotations

from dataclasses import dataclass
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
from halfpi.kernels.linear_norm import linear_norm
from halfpi.kernels.patchify import patchify
from halfpi.kernels.qkv_rope import qkv_rope
from halfpi.kernels.resize import Taps, resize
from halfpi.kernels.rms_norm import rms_norm
from halfpi.kernels.split_linear import split_linear


@dataclass(frozen=True)
class Pending:
    """Partial products (splits, m, n) of `matrix`, which the next norm adds to the residual."""

    partials: Tensor
    matrix: Matrix


class Operations:
    """Enqueues kernels on one device; every call writes into tensors that it is given.

    `reader`, where an operation takes one, is the matrix that will read its output: with an FP8
    matrix the output is quantised by that matrix's input scale.
    """

    def __init__(self, device: torch.device, working: torch.dtype) -> None:
        self._launches = Launches(device, working)

    def resize(self, images: Tensor, out: Tensor, rows: Taps, columns: Taps) -> None:
        """`images` (n, h, w, 3) into the middle of squares."""
        resize(images, out, rows, columns, self._launches.row(out[0, 0].numel()))

    def patchify(self, images: Tensor, patch: int, out: Tensor) -> None:
        """Rows of patches of `images` (n, h, w, c)."""
        patchify(images, patch, out, self._launches.row(out.shape[1]))

    def embed(self, tokens: Tensor, table: Tensor, out: Tensor, **places: Tensor) -> None:
        """Token embeddings into rows of `out`."""
        embed(tokens, table, out, self._launches.row(out.shape[1]), **places)

    def layer_norm(
        self,
        x: Tensor,
        norm: LayerNormWeights,
        out: Tensor,
        reader: Matrix,
        pending: Pending | None = None,
    ) -> None:
        """LayerNorm of `x` (m, d), to which what is `pending` is added first."""
        update: dict[str, Any] = {}
        if pending is not None:
            update = {**_update(pending), "partials_bias": pending.matrix.bias}
        launch = self._launches.of("layer_norm", x, out.dtype, m=x.shape[0], d=x.shape[1])
        layer_norm(x, norm.weight, norm.bias, out, launch, scale=reader.input_scale, **update)

    def rms_norm(
        self,
        x: Tensor,
        gain: Tensor,
        out: Tensor,
        reader: Matrix,
        count: Tensor,
        pending: Pending | None = None,
        kept: Tensor | None = None,
    ) -> None:
        """RMSNorm of `x` (m, d), to which what is `pending` is added first; `kept` gets that."""
        launch = self._launches.of("rms_norm", x, out.dtype, m=x.shape[0], d=x.shape[1])
        update = {} if pending is None else _update(pending)
        scale = reader.input_scale
        rms_norm(x, gain, out, launch, kept=kept, scale=scale, count=count, **update)

    def ada_rms_norm(
        self,
        residual: Tensor,
        modulation: Tensor,
        out: Tensor,
        reader: Matrix | None,
        decided: Tensor,
        gated: tuple[Pending, Tensor] | None,
    ) -> None:
        """The modulated norm of `residual` (m, d), to which what is pending is added first, gated.

        modulation, gate: of free and of decided rows, (2, …). gated: pending, and its gate.
        """
        launch = self._launches.row(residual.shape[1])
        update: dict[str, Any] = {}
        if gated is not None:
            update = {**_update(gated[0]), "gate": gated[1]}
        scale = None if reader is None else reader.input_scale
        ada_rms_norm(residual, modulation, out, launch, scale=scale, decided=decided, **update)

    def linear(
        self, x: Tensor, matrix: Matrix, out: Tensor, reader: Matrix | None = None, **rest: Any
    ) -> None:
        """`x` times `matrix`, with the epilogue in `rest`."""
        launch = self._launches.of("linear", x, out.dtype, **_sizes(x, matrix))
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
        sizes = {**_sizes(x, matrix), "n": out.shape[1]}
        launch = self._launches.of("geglu", x, out.dtype, **sizes)
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
        (s, kv, k), q = keys.shape, 0 if query is None else query.shape[1]
        sizes = {"m": x.shape[0], "d": x.shape[1], "q": q, "kv": kv, "k": k, "s": s}
        launch = self._launches.of("qkv_rope", x, keys.dtype, **sizes)
        qkv_rope(
            x, matrix.weight, cos, sin, query, keys, values, launch,
            alpha=matrix.alpha, partials=self._launches.partials(x, matrix.weight, launch), **rest,
        )  # fmt: skip

    def split_linear(self, x: Tensor, matrix: Matrix, **rest: Tensor | None) -> Pending:
        """Partial products of `x` and `matrix`, for the norm that adds them."""
        working = self._launches.working
        launch = self._launches.of("split_linear", x, working, **_sizes(x, matrix))
        out = self._launches.workspace(launch.split_k, x.shape[0], matrix.weight.shape[0])
        split_linear(x, matrix.weight, out, launch, **rest)
        return Pending(out, matrix)

    def linear_norm(
        self,
        x: Tensor,
        matrix: Matrix,
        residual: Tensor,
        norm: LayerNormWeights,
        out: Tensor,
        reader: Matrix,
    ) -> None:
        """`x` times `matrix`, added to `residual` (m, d), and the LayerNorm of that."""
        later = reader.weight
        if not self._launches.joins_norm(x, residual):
            pending = self.split_linear(x, matrix, later=later)
            self.layer_norm(residual, norm, out, reader, pending)
            return
        linear_norm(
            x, matrix.weight, residual, norm.weight, norm.bias, out,
            alpha=matrix.alpha, bias=matrix.bias, scale=reader.input_scale, later=later,
        )  # fmt: skip

    def attention(
        self, query: Tensor, keys: Tensor, values: Tensor, out: Tensor, reader: Matrix,
        **rest: Tensor | None,
    ) -> None:  # fmt: skip
        """Attention of `query` (b, t, q, k)."""
        sizes = dict(zip("btqk", query.shape, strict=True))
        sizes |= {"s": keys.shape[1], "kv": keys.shape[2]}
        launch = self._launches.of("attention", query, out.dtype, **sizes)
        workspace = {}
        if launch.splits > 1:
            shape = (launch.splits, *query.shape)
            workspace = {
                "partials": self._launches.workspace(*shape),
                "log_sums": self._launches.workspace(*shape[:-1], dtype=torch.float32),
            }
        attention(query, keys, values, out, launch, scale=reader.input_scale, **workspace, **rest)

    def euler(self, hidden: Tensor, **rest: Any) -> None:
        """The end of a denoising step, see `halfpi.kernels.euler`."""
        euler(hidden, **rest, launch=self._launches.row(hidden.shape[1]))


def _update(pending: Pending) -> dict[str, Tensor | None]:
    return {"partials": pending.partials, "alpha": pending.matrix.alpha}


def _sizes(x: Tensor, matrix: Matrix) -> dict[str, int]:
    return {"m": x.shape[0], "n": matrix.weight.shape[0], "k": x.shape[1]}
