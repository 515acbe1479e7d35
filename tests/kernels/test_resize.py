"""The pixels of Pillow, which a checkpoint was trained on: the reference has them all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from halfpi.kernels.resize import resize, resize_reference, taps
from halfpi.kernels.spec import Launch
from halfpi.processing.images import fitted_size, resize_with_pad

CPU = torch.device("cpu")
SIZES = [(480, 640), (720, 1280), (224, 300), (100, 57), (20, 31), (56, 112), (5, 4), (225, 224)]


def pictures(height: int, width: int) -> list[np.ndarray]:
    rng = np.random.default_rng(height)
    board = np.indices((height, width)).sum(0)[..., None] % 2 * np.uint8(255)
    shape = (height, width, 3)
    return [
        rng.integers(0, 256, shape, dtype=np.uint8),
        np.broadcast_to(board, shape).astype(np.uint8),
        np.full(shape, 255, np.uint8),
    ]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [224, 57])
def test_the_reference_is_pillow(height: int, width: int, size: int) -> None:
    images = pictures(height, width)
    box = fitted_size(height, width, size)
    rows, columns = (taps(*axis, CPU) for axis in zip((height, width), box, strict=True))
    (ours,) = resize_reference(torch.from_numpy(np.stack(images)), rows, columns, size)
    theirs = [resize_with_pad("camera", image, size, "pil") for image in images]
    assert torch.equal(ours, torch.stack(theirs))


def test_names_what_is_wrong() -> None:
    images, out = torch.zeros(2, 8, 6, 3, dtype=torch.uint8), torch.zeros(2, 4, 4, 3).byte()
    rows, columns = taps(8, 4, CPU), taps(6, 3, CPU)
    with pytest.raises(ValueError, match="images must be contiguous uint8"):
        resize(images.float(), out, rows, columns, Launch())
    with pytest.raises(ValueError, match=r"images must be contiguous uint8 \(1, 8, 6, 3\)"):
        resize(images, out[:1], rows, columns, Launch())
    with pytest.raises(ValueError, match="columns must make at most 4 pixels, got 5"):
        resize(images, out, rows, taps(6, 5, CPU), Launch())
