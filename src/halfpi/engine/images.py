"""The images of a call: filled on the host, brought to the device, and resized there if need be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from halfpi.engine.graphs import Replay, captured
from halfpi.engine.operations import Operations
from halfpi.kernels.resize import Taps, taps
from halfpi.processing.images import Pictures, fitted_size

# A robot's cameras have one or two sizes of their own; room for so many is kept.
_SIZES = 4


class ImageInput:
    """Brings images to `buffers`, which the vision stage reads, with one copy on the host.

    buffers: by dtype, uint8 (n, s, s, 3) and fp32 (n, 3, s, s). `Pictures` of another size go to
    the device as they came and are resized there; the first call with a size allocates room.
    """

    def __init__(self, buffers: Mapping[torch.dtype, Tensor], operations: Operations) -> None:
        self._rooms = {dtype: _Room.beside(buffer) for dtype, buffer in buffers.items()}
        self._operations = operations
        self._resizers: dict[tuple[int, ...], _Resizer] = {}  # the latest last
        self._resize(self._make_resizer(1, 1), 0, 1)  # compiles, so that no call waits for it

    def load(
        self, images: Tensor | Pictures, places: Sequence[int], fresh: Sequence[int]
    ) -> torch.dtype:
        """Bring the images at `places` to the blocks of the same index, of which `fresh` are new.

        images: as in `ModelInputs`, of cameras that are there. Returns the buffers' dtype.
        """
        if isinstance(images, Tensor):
            self._rooms[images.dtype].fill({i: images.numpy()[0, places[i]] for i in fresh})
            return images.dtype
        pictures: dict[int, Any] = {i: images[places[i]] for i in fresh}
        for shape, blocks in groupby(fresh, key=lambda i: pictures[i].shape[:2]):
            self._bring(shape, {i: pictures[i] for i in blocks})
        return torch.uint8

    def _bring(self, shape: tuple[int, ...], pictures: Mapping[int, Any]) -> None:
        target = self._rooms[torch.uint8]
        if shape == target.device.shape[1:3]:
            target.fill(pictures)
            return
        resizer = self._resizer(shape)
        resizer.room.fill(pictures)
        for first, count in runs(list(pictures)):
            self._resize(resizer, first, count)

    def _resize(self, resizer: _Resizer, first: int, count: int) -> None:
        blocks, target = slice(first, first + count), self._rooms[torch.uint8].device
        self._operations.resize(
            resizer.room.device[blocks], target[blocks], resizer.rows, resizer.columns
        )

    def _resizer(self, shape: tuple[int, ...]) -> _Resizer:
        resizer = self._resizers.pop(shape, None)
        if resizer is None:
            resizer = self._make_resizer(*shape)
            if len(self._resizers) == _SIZES:
                self._forget_oldest()
        self._resizers[shape] = resizer
        return resizer

    def _forget_oldest(self) -> None:
        oldest = next(iter(self._resizers))
        if self._resizers[oldest].room.device.is_cuda:
            torch.cuda.synchronize()  # its copies may not be done
        del self._resizers[oldest]

    def _make_resizer(self, height: int, width: int) -> _Resizer:
        target = self._rooms[torch.uint8].device
        room = _Room.beside(target.new_zeros(target.shape[0], height, width, 3))
        new_height, new_width = fitted_size(height, width, target.shape[1])
        rows = taps(height, new_height, target.device)
        return _Resizer(room, rows, taps(width, new_width, target.device))


@dataclass(frozen=True)
class _Room:
    """Images on the device (n, …), and of each its place on the host and what copies that there.

    Places are pinned for a GPU. Copies are graphs: to enqueue one on a stream that has nothing to
    do costs the host 15 µs, and a copy that is not in a graph 90.
    """

    device: Tensor
    places: tuple[tuple[NDArray[Any], Replay], ...]

    @staticmethod
    def beside(device: Tensor) -> _Room:
        host = torch.zeros(device.shape, dtype=device.dtype, pin_memory=device.is_cuda)
        copies = [
            captured(partial(to.copy_, one, non_blocking=True), device.device)
            for to, one in zip(device, host, strict=True)
        ]
        return _Room(device, tuple(zip(host.numpy(), copies, strict=True)))

    def fill(self, images: Mapping[int, Any]) -> None:
        """Bring each image, a NumPy array, to its place, one while the next is being read."""
        for place, image in images.items():
            pixels, copy = self.places[place]
            pixels[:] = image  # NumPy's copy starts no threads
            copy()


@dataclass(frozen=True)
class _Resizer:
    """Room for images of one size, and how they are resized."""

    room: _Room
    rows: Taps
    columns: Taps


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending `numbers` as (first, length) of runs without a gap."""
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield run[0], len(run)
