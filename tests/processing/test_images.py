"""The three resize rules against independent computations, and what is refused."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from halfpi.config import ResizeRule
from halfpi.processing.images import (
    camera_mask,
    pictures,
    prepare_images,
    resize_with_pad,
    to_model,
)

SIZES = [(480, 640), (100, 37), (20, 31), (224, 300), (56, 112)]
RULES: list[ResizeRule] = ["pil", "interpolate", "interpolate-0.4"]


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth shapes and noise, so that both aliasing and rounding would show."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = 90 * np.sin(x / 7)[..., None] + 60 * np.cos(y[..., None] / (5, 9, 13))
    noise = random.integers(-40, 40, (height, width, 3))
    pixels: NDArray[np.uint8] = np.clip(128 + waves + noise, 0, 255).astype(np.uint8)
    return pixels


def triangle_weights(old: int, new: int) -> NDArray[np.float64]:
    """(new, old): a bilinear filter that widens when it shrinks, as Pillow documents it."""
    scale = old / new
    support = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    distance = np.abs(np.arange(old) + 0.5 - centres[:, None]) / support
    weights = np.clip(1 - distance, 0, None)
    normalized: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
    return normalized


def expected_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """top, left, height, width of the picture in the square."""
    ratio = max(width / size, height / size)
    new_height, new_width = math.floor(height / ratio), math.floor(width / ratio)
    return (size - new_height) // 2, (size - new_width) // 2, new_height, new_width


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pil_is_an_antialiased_triangle_filter(height: int, width: int) -> None:
    image, size = picture(height, width), 56
    top, left, new_height, new_width = expected_box(height, width, size)
    pixels = np.einsum(
        "yh,xw,hwc->cyx",
        triangle_weights(height, new_height),
        triangle_weights(width, new_width),
        image.astype(float),
        optimize=True,
    )
    expected = np.zeros((3, size, size))
    expected[:, top : top + new_height, left : left + new_width] = pixels
    levels = resize_with_pad("base", image, size, "pil")
    assert levels.dtype == torch.uint8
    # Pillow rounds to whole levels after each of its two passes.
    assert np.abs(levels.movedim(-1, 0).numpy() - expected).max() <= 1.01


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("rule", "padding"), [("interpolate", -1.0), ("interpolate-0.4", -3.0)])
def test_interpolate_is_torch_without_antialiasing(
    height: int, width: int, rule: ResizeRule, padding: float
) -> None:
    image, size = picture(height, width), 56
    top, left, new_height, new_width = expected_box(height, width, size)
    chw = torch.tensor(image).permute(2, 0, 1)[None].float() / 255
    inner = F.interpolate(chw, size=(new_height, new_width), mode="bilinear") * 2 - 1
    bottom, right = size - top - new_height, size - left - new_width
    expected = F.pad(inner, (left, right, top, bottom), value=padding)[0]
    result = resize_with_pad("base", image, size, rule)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    if height != width:
        assert result.min() == padding


@pytest.mark.parametrize(("height", "width"), [(30, 57), (57, 30), (33, 56)])
@pytest.mark.parametrize("rule", RULES)
def test_padding_is_centred_with_its_remainder_at_bottom_and_right(
    height: int, width: int, rule: ResizeRule
) -> None:
    white = np.full((height, width, 3), 255, np.uint8)
    inside = (to_model(resize_with_pad("base", white, 56, rule))[0] > 0.99).numpy()
    top, left, new_height, new_width = expected_box(height, width, 56)
    expected = np.zeros((56, 56), bool)
    expected[top : top + new_height, left : left + new_width] = True
    np.testing.assert_array_equal(inside, expected)


@pytest.mark.parametrize("rule", RULES)
def test_an_image_of_the_right_size_is_untouched(rule: ResizeRule) -> None:
    image = picture(56, 56)
    expected = image.transpose(2, 0, 1).astype(np.float32) / np.float32(255) * 2 - 1
    untouched = to_model(resize_with_pad("base", image, 56, rule))
    np.testing.assert_array_equal(untouched.numpy(), expected)


@pytest.mark.parametrize("rule", RULES)
def test_layout_and_strides_do_not_matter(rule: ResizeRule) -> None:
    image = picture(40, 64)
    expected = resize_with_pad("base", image, 56, rule)
    assert torch.equal(resize_with_pad("base", image.transpose(2, 0, 1), 56, rule), expected)
    turned = np.ascontiguousarray(image[::-1, ::-1])[::-1, ::-1]
    assert torch.equal(resize_with_pad("base", turned, 56, rule), expected)


def test_float_images_follow_each_framework() -> None:
    values = np.linspace(0, 1, 56 * 56 * 3).reshape(56, 56, 3).astype(np.float32)
    pil = resize_with_pad("base", values, 56, "pil")
    truncated = np.floor(255 * values).transpose(2, 0, 1) / np.float32(255) * 2 - 1
    np.testing.assert_allclose(to_model(pil).numpy(), truncated, atol=1e-6)
    kept = resize_with_pad("base", values, 56, "interpolate")
    np.testing.assert_array_equal(kept.numpy(), values.transpose(2, 0, 1) * 2 - 1)


def test_absent_cameras_keep_their_place_and_are_masked() -> None:
    image = picture(56, 56)
    images, mask = prepare_images({"wrist": image}, ("base", "wrist", "other"), 56, "pil")
    assert images.shape == (1, 3, 56, 56, 3)
    assert images.dtype == torch.uint8
    assert mask.tolist() == [[False, True, False]]
    assert torch.equal(images[0, 1], resize_with_pad("wrist", image, 56, "pil"))
    assert (to_model(images)[0, [0, 2]] == -1).all()


def test_pictures_are_the_images_that_came_but_uint8() -> None:
    image, floats = picture(40, 30), np.linspace(0, 1, 5 * 8 * 3).reshape(3, 5, 8)
    given: dict[str, NDArray[Any]] = {"wrist": image, "top": floats}
    base, wrist, top = pictures(given, ("base", "wrist", "top"), 56)
    assert base is None
    assert wrist is image
    assert top is not None
    np.testing.assert_array_equal(top, np.floor(255 * floats.transpose(1, 2, 0)))
    assert camera_mask(given, ("base", "wrist", "top")).tolist() == [[False, True, True]]
    tall = picture(91, 45)
    resized, _, _ = pictures({"base": tall}, ("base", "wrist", "top"), 56)
    np.testing.assert_array_equal(resized, resize_with_pad("base", tall, 56, "pil").numpy())
    mistakes: list[dict[str, Any]] = [{"other": image}, {}, {"top": picture(1, 200)}]
    for wrong in mistakes:
        with pytest.raises(ValueError, match="camera") as expected:
            prepare_images(wrong, ("base", "wrist", "top"), 56, "pil")
        with pytest.raises(ValueError, match=re.escape(str(expected.value))):
            pictures(wrong, ("base", "wrist", "top"), 56)


def test_unknown_and_no_cameras() -> None:
    with pytest.raises(ValueError, match="unknown camera top: expected base, wrist"):
        prepare_images({"top": picture(8, 8)}, ("base", "wrist"), 56, "pil")
    with pytest.raises(ValueError, match="at least one of base, wrist"):
        prepare_images({}, ("base", "wrist"), 56, "pil")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8), np.uint8), r"got shape \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"got shape \(8, 8, 4\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"got shape \(1, 8, 8, 3\)"),
        (np.zeros((0, 8, 3), np.uint8), r"got shape \(0, 8, 3\)"),
        (np.zeros((8, 8, 3), np.int64), "got int64"),
        (np.zeros((8, 8, 3), bool), "got bool"),
        (np.full((8, 8, 3), np.nan, np.float32), "from nan to nan"),
        (np.full((8, 8, 3), 255, np.float32), r"from 255\.0 to 255\.0"),
        (np.full((8, 8, 3), -0.5, np.float32), r"from -0\.5 to -0\.5"),
        (np.zeros((1, 500, 3), np.uint8), "1×500 is too long"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_malformed_images_name_the_camera(
    image: NDArray[Any], message: str, rule: ResizeRule
) -> None:
    with pytest.raises(ValueError, match=f"camera wrist: .*{message}"):
        prepare_images({"wrist": image}, ("base", "wrist"), 56, rule)
