"""How each kernel of a plan is launched, and the memory that some launches want beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from halfpi.kernels import attention as attention_file
from halfpi.kernels.attention import AttentionLaunch
from halfpi.kernels.launches import linear_launches
from halfpi.kernels.spec import Case, Device, Launch, row_launches
from halfpi.kernels.tile import TileLaunch

# What Triton's interpreter runs on: no PDL, no descriptors.
_INTERPRETED = Device(capability=80, shared_bytes=1 << 18)


class Launches:
    """Launches and workspace of the kernels on `device`.

    Kernels of one plan run one after another, so all that ask for the same shape share its memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._torch_device = device
        self._device = Device.of(device) if device.type == "cuda" else _INTERPRETED
        self._workspace: dict[tuple[object, ...], Tensor] = {}

    def row(self, width: int) -> Launch:
        """Of a kernel in which one program has a whole row."""
        return row_launches(width, self._device)[0]

    def linear(self, x: Tensor, weight: Tensor) -> TileLaunch:
        """Of x (m, k) · weight (n, k)ᵀ."""
        (m, k), n = x.shape, weight.shape[0]
        return linear_launches(m, n, k, x.dtype.itemsize, self._device)[0]

    def attention(self, query: Tensor, keys: Tensor) -> AttentionLaunch:
        """Of queries (b, t, q, k) over keys (b, s, kv, k)."""
        sizes = dict(zip("btqk", query.shape, strict=True))
        sizes |= {"s": keys.shape[1], "kv": keys.shape[2]}
        return attention_file.SPEC.candidates(Case("", sizes, query.dtype), self._device)[0]

    def partials(self, x: Tensor, weight: Tensor, launch: TileLaunch) -> Tensor | None:
        """fp32 (split_k, m, n) for the products that `launch` splits, if it does."""
        if launch.split_k == 1:
            return None
        return self.workspace(launch.split_k, x.shape[0], weight.shape[0])

    def workspace(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory of `shape` that nobody relies on between two kernels."""
        key = (*shape, dtype)
        if key not in self._workspace:
            self._workspace[key] = torch.empty(shape, dtype=dtype, device=self._torch_device)
        return self._workspace[key]
