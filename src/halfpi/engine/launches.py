"""How each kernel of a plan is launched, and the memory that some launches want beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfpi.kernels.linear_norm import supports
from halfpi.kernels.spec import Device, Launch, row_launches
from halfpi.kernels.tile import TileLaunch
from halfpi.kernels.tuned import best

# What Triton's interpreter runs on: no PDL, no descriptors.
_INTERPRETED = Device(capability=80, shared_bytes=1 << 18)


class Launches:
    """Launches and workspace of the kernels on `device`; `working` is the dtype of partial sums.

    Kernels of one plan run one after another, so all that ask for the same shape share its memory.
    """

    def __init__(self, device: torch.device, working: torch.dtype) -> None:
        self.working = working
        self._torch_device = device
        self._device = Device.of(device) if device.type == "cuda" else _INTERPRETED
        self._workspace: dict[tuple[object, ...], Tensor] = {}
        # Every layer, step and graph asks again for the same few.
        self._looked_up: dict[tuple[object, ...], Any] = {}

    def row(self, width: int) -> Launch:
        """Of a kernel in which one program has a whole row."""
        return row_launches(width, self._device)[0]

    def of(self, kernel: str, x: Tensor, out_dtype: torch.dtype, **sizes: int) -> Any:
        """Of `kernel`, the name of a spec, that reads `x` at the `sizes` of the spec's cases."""
        key = (kernel, *sorted(sizes.items()), x.dtype, out_dtype)
        if key not in self._looked_up:
            self._looked_up[key] = best(kernel, sizes, x.dtype, out_dtype, self._device)
        return self._looked_up[key]

    def joins_norm(self, x: Tensor, residual: Tensor) -> bool:
        """Whether `linear_norm` does a product of `x`, its sum with `residual` and the norm."""
        return supports(x, residual, self._device)

    def partials(self, x: Tensor, weight: Tensor, launch: TileLaunch) -> Tensor | None:
        """Memory (split_k, m, n) for the partial products of `launch`, if it makes any."""
        if not launch.needs_partials:
            return None
        return self.workspace(launch.split_k, x.shape[0], weight.shape[0])

    def workspace(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of `shape`, of the working dtype, that nobody relies on between two kernels."""
        key = (*shape, dtype)
        if key not in self._workspace:
            self._workspace[key] = torch.empty(
                shape, dtype=dtype or self.working, device=self._torch_device
            )
        return self._workspace[key]
