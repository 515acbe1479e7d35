"""The small inputs of a call: filled on the host, brought to the device in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfpi.engine.graphs import captured, stream_of

# Every tensor starts at a multiple of this, as kernels expect of memory.
_ALIGN_BYTES = 256


@dataclass(frozen=True)
class Field:
    """A tensor of the inputs."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Staging:
    """`fields` in one stretch of memory on the host, pinned for a GPU, and again on the device.

    host, device: the tensors by name.
    """

    def __init__(self, fields: Mapping[str, Field], device: torch.device) -> None:
        size = sum(_aligned(field.nbytes) for field in fields.values())
        on_gpu = device.type == "cuda"
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu)
        there = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host = _views(host, fields)
        self.device = _views(there, fields)

        def copy() -> None:
            there.copy_(host, non_blocking=True)

        self._copy = captured(copy, device)
        self._beside = stream_of(device) if on_gpu else None

    def upload(self) -> None:
        """Copy all of it to the device, for what the current stream gets from here on.

        That does not wait for what is under way there, which must not read these inputs.
        """
        if self._beside is None:
            self._copy()
            return
        with torch.cuda.stream(self._beside):
            self._copy()
        torch.cuda.current_stream(self._beside.device).wait_stream(self._beside)


def _views(memory: Tensor, fields: Mapping[str, Field]) -> dict[str, Tensor]:
    views, place = {}, 0
    for name, field in fields.items():
        views[name] = memory[place : place + field.nbytes].view(field.dtype).view(field.shape)
        place += _aligned(field.nbytes)
    return views


def _aligned(size: int) -> int:
    return -(-size // _ALIGN_BYTES) * _ALIGN_BYTES
