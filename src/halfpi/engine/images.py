"""The images of a call: filled on the host, brought to the device, and resized there if need be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from halfpi.engine.graphs import Replay, captured
from halfpi.engine.operations import Operations
from halfpi.kernels.resize import taps
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
        self._size = buffers[torch.uint8].shape[1:3]
        # As many as one call may have. Making one waits for the device, which may still copy from
        # the one that is then forgotten.
        remembered = lru_cache(max(_SIZES, len(buffers[torch.uint8])))
        self._resizer = remembered(partial(_resizing_room, buffers[torch.uint8], operations))
        _resizing_room(buffers[torch.uint8], operations, 1, 1)  # compiles: no call waits for it

    def load(
        self, images: Tensor | Pictures, places: Sequence[int], fresh: Sequence[int]
    ) -> torch.dtype:
        """Bring the images at `places` to the blocks of the same index, of which `fresh` are new.

        images: as in `ModelInputs`, of cameras that are there. Returns the buffers' dtype.
        """
        if isinstance(images, Tensor):
            pixels = images.numpy()[0]
            for block in fresh:
                self._rooms[images.dtype].bring(block, pixels[places[block]])
            return images.dtype
        pictures: dict[int, Any] = {block: images[places[block]] for block in fresh}
        # Before any of them comes, because to make a resizer writes to all blocks.
        rooms = {block: self._room_for(one.shape[:2]) for block, one in pictures.items()}
        for block, room in rooms.items():
            room.bring(block, pictures[block])
        return torch.uint8

    def _room_for(self, shape: tuple[int, ...]) -> _Room:
        """Of pictures of that height and width."""
        return self._rooms[torch.uint8] if shape == self._size else self._resizer(*shape)


@dataclass(frozen=True)
class _Room:
    """Of each block its place on the host, pinned for a GPU, and what brings it to the device.

    That is a graph: as the first thing on a stream that has nothing to do, it costs the host a
    third of a copy that is not in one.
    """

    places: tuple[tuple[NDArray[Any], Replay], ...]

    @staticmethod
    def beside(device: Tensor, arrived: Callable[[int], None] | None = None) -> _Room:
        """For images on the `device` (n, …). arrived: what is done there with one that has come."""
        host = torch.zeros(device.shape, dtype=device.dtype, pin_memory=device.is_cuda)

        def copy(block: int) -> None:
            device[block].copy_(host[block], non_blocking=True)
            if arrived is not None:
                arrived(block)

        copies = (captured(partial(copy, block), device.device) for block in range(len(device)))
        return _Room(tuple(zip(host.numpy(), copies, strict=True)))

    def bring(self, block: int, image: NDArray[Any]) -> None:
        """Copy `image` to its place and on, without waiting for it to come."""
        pixels, copy = self.places[block]
        pixels[:] = image  # NumPy's copy starts no threads
        copy()


def _resizing_room(target: Tensor, operations: Operations, height: int, width: int) -> _Room:
    """For images of another size, which are resized into `target` once they are there."""
    came = target.new_zeros(target.shape[0], height, width, 3)
    new_height, new_width = fitted_size(height, width, target.shape[1])
    rows = taps(height, new_height, target.device)
    columns = taps(width, new_width, target.device)

    def resize(block: int) -> None:
        one = slice(block, block + 1)
        operations.resize(came[one], target[one], rows, columns)

    return _Room.beside(came, resize)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending `numbers` as (first, length) of runs without a gap."""
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield run[0], len(run)
