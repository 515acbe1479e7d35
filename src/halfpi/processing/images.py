"""Camera images to the model's square images in [-1, 1].

A checkpoint only sees the pixels it was trained on if they are resized as its trainer did, so there
are three rules. "pil" is openpi's (openpi-client image_tools.py): Pillow's bilinear filter, which
averages when it shrinks, on uint8. "interpolate" is LeRobot's since 0.5 (modeling_pi05.py): torch's
bilinear interpolation, which only looks at the four nearest pixels. "interpolate-0.4" is LeRobot's
0.4, the same but for its padding.

Pillow's pixels stay 8-bit until the model's device normalises them (`to_model`), a quarter of the
bytes to bring there. An engine that resizes by itself, to the same pixels, is given `pictures`
instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from halfpi.config import ResizeRule

_BLACK = -1.0
# LeRobot 0.4 padded with -1 while pixels were still in [0, 1]; the last step, 2x - 1, made that -3.
_PADDING: Mapping[ResizeRule, float] = {
    "pil": _BLACK,
    "interpolate": _BLACK,
    "interpolate-0.4": -3.0,
}


# The image of each camera as it came, uint8 (height, width, 3), None where a camera is absent.
Pictures = tuple[NDArray[np.uint8] | None, ...]

# Pillow lets other threads run while it resizes, so the cameras share one camera's time.
_WORKERS = ThreadPoolExecutor(thread_name_prefix="halfpi-images")


def prepare_images(
    images: Mapping[str, NDArray[Any]], cameras: Sequence[str], size: int, rule: ResizeRule
) -> tuple[Tensor, Tensor]:
    """Resize the cameras that are present and stack all `cameras` in their order.

    images: camera name → uint8, or float in [0, 1]; (height, width, 3), or (3, height, width).
    Returns images, as n of `resize_with_pad` with a batch dimension, and image_mask, bool (1, n),
    False where a camera is absent. An absent camera keeps its place, as in openpi;
    LeRobot moves it to the end. Both give the same actions: masked tokens are not attended to and
    do not advance the positions.

    Raises ValueError if no camera is present, a camera is not in `cameras`, or an image is
    malformed.
    """
    present = _present(images, cameras)
    to_resize = [camera for camera in present if np.shape(images[camera])[:2] != (size, size)]
    # Handing work to a thread costs more than a copy, and sometimes milliseconds.
    each = _WORKERS.map if len(to_resize) > 1 else map
    resized = each(lambda camera: resize_with_pad(camera, images[camera], size, rule), present)
    by_camera = dict(zip(present, resized, strict=True))
    absent = _blank(size, rule, _BLACK)
    # NumPy, because a parallel copy by torch costs more in waking its threads than in copying.
    stacked = np.stack([by_camera.get(camera, absent).numpy() for camera in cameras])[None]
    return torch.from_numpy(stacked), camera_mask(images, cameras)


def pictures(images: Mapping[str, NDArray[Any]], cameras: Sequence[str], size: int) -> Pictures:
    """The images of `cameras` to be resized by the rule "pil", checked, copied only if need be.

    Only those more than twice as tall as wide, which Pillow resizes rows first, are resized here.
    images and ValueError as in `prepare_images`.
    """
    present = _present(images, cameras)
    return tuple([_picture(one, images[one], size) if one in present else None for one in cameras])


def _picture(camera: str, image: NDArray[Any], size: int) -> NDArray[np.uint8]:
    pixels = _to_uint8(_checked(camera, image))
    height, width = pixels.shape[:2]
    if height > 2 * width:
        return resize_with_pad(camera, pixels, size, "pil").numpy()
    if (height, width) != (size, size):
        _fitted(camera, pixels, size)
    return pixels


def camera_mask(images: Mapping[str, object], cameras: Sequence[str]) -> Tensor:
    """Which of `cameras` have an image, bool (1, n)."""
    return torch.from_numpy(np.array([[camera in images for camera in cameras]]))


def fitted_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image that was scaled to just fit a square; 0 if nothing is left."""
    ratio = max(width / size, height / size)
    return int(height / ratio), int(width / ratio)


def to_model(images: Tensor) -> Tensor:
    """Prepared images as the model reads them: float32 (..., 3, h, w) in [-1, 1].

    images: uint8 (..., h, w, 3), or float32 that is so already.
    """
    if images.dtype != torch.uint8:
        return images
    return (images.float() / 255 * 2 - 1).movedim(-1, -3)


def resize_with_pad(camera: str, image: NDArray[Any], size: int, rule: ResizeRule) -> Tensor:
    """Scale `image` into a square, keeping its aspect, and centre it on padding.

    image: as in `prepare_images`. Returns uint8 (size, size, 3) by the rule "pil", by the others
    float32 (3, size, size) in [-1, 1] but for the padding of "interpolate-0.4".
    Raises ValueError naming `camera` if the image is malformed.
    """
    pixels = _checked(camera, image)
    height, width = pixels.shape[:2]
    if rule == "pil":
        pixels = _to_uint8(pixels)
    if (height, width) == (size, size):
        return _arranged(pixels, rule)
    new_height, new_width = _fitted(camera, pixels, size)
    resize = _resize_pil if rule == "pil" else _resize_interpolate
    top, left = (size - new_height) // 2, (size - new_width) // 2
    padded = _blank(size, rule, _PADDING[rule])
    inside = padded if rule == "pil" else padded.movedim(0, -1)
    box = inside.numpy()[top : top + new_height, left : left + new_width]
    box[:] = resize(pixels, new_height, new_width)
    return padded


def _present(images: Mapping[str, object], cameras: Sequence[str]) -> list[str]:
    present = [camera for camera in cameras if camera in images]
    if len(present) != len(images):
        unknown = ", ".join(sorted(images.keys() - cameras))
        raise ValueError(f"unknown camera {unknown}: expected {', '.join(cameras)}")
    if not present:
        raise ValueError(f"no camera image: expected at least one of {', '.join(cameras)}")
    return present


def _fitted(camera: str, pixels: NDArray[Any], size: int) -> tuple[int, int]:
    height, width = pixels.shape[:2]
    fitted = fitted_size(height, width, size)
    if min(fitted) == 0:
        raise ValueError(
            f"camera {camera}: an image of {height}×{width} is too long for {size}×{size}"
        )
    return fitted


def _blank(size: int, rule: ResizeRule, value: float) -> Tensor:
    """A square of `value` in the model's range, which is black where pixels are 8-bit."""
    if rule == "pil":
        return torch.from_numpy(np.zeros((size, size, 3), np.uint8))
    return torch.full((3, size, size), value)


def _arranged(pixels: NDArray[Any], rule: ResizeRule) -> Tensor:
    if rule == "pil":
        return torch.from_numpy(pixels.copy())
    return (torch.from_numpy(_unit_interval(pixels)) * 2 - 1).movedim(-1, 0)


def _checked(camera: str, image: NDArray[Any]) -> NDArray[Any]:
    """`image` as a contiguous (height, width, 3) array."""
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(
            f"camera {camera}: expected an image (height, width, 3) or (3, height, width), "
            f"got shape {np.shape(image)}"
        )
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"camera {camera}: expected uint8 or float pixels, got {pixels.dtype}")
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= 1):  # written so that NaN fails
        raise ValueError(
            f"camera {camera}: a float image must be in [0, 1], got values from {low} to {high}"
        )
    return np.ascontiguousarray(pixels)


def _to_uint8(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels
    return (255 * pixels).astype(np.uint8)  # truncates, as openpi does


def _unit_interval(pixels: NDArray[Any]) -> NDArray[np.float32]:
    as_float = pixels.astype(np.float32)
    return as_float / np.float32(255) if pixels.dtype == np.uint8 else as_float


def _resize_pil(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[Any]:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _resize_interpolate(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Pixels in [-1, 1], (height, width, 3)."""
    chw = torch.from_numpy(_unit_interval(pixels)).permute(2, 0, 1)
    resized = F.interpolate(
        chw[None], size=(height, width), mode="bilinear", align_corners=False
    ).clamp(0, 1)
    return (resized[0] * 2 - 1).permute(1, 2, 0).numpy()
