"""Golden checkpoints of every format, loaded and run against the actions that upstream computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from halfpi.checkpoints import convert, load_model, open_checkpoint

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@pytest.fixture
def openpi_io(golden: Path) -> tuple[dict[str, Any], torch.Tensor]:
    io = {
        name: torch.from_numpy(value)
        for name, value in np.load(golden / "openpi_tiny_io.npz").items()
    }
    inputs = {
        "images": torch.stack([io[f"img_{name}"].permute(0, 3, 1, 2) for name in CAMERAS], 1),
        "image_mask": torch.stack([io[f"m_{name}"] for name in CAMERAS], 1),
        "tokens": io["tok"].long(),
        "token_mask": io["tm"],
        "noise": io["noise"],
    }
    return inputs, io["actions"]


@pytest.fixture
def lerobot_io(golden: Path) -> tuple[dict[str, Any], torch.Tensor]:
    io = load_file(golden / "pi05_tiny_golden.safetensors")
    inputs = {
        "images": torch.stack([io[f"in.image{camera}"] for camera in range(3)], 1),
        "image_mask": torch.stack([io[f"in.image_mask{camera}"] for camera in range(3)], 1),
        "tokens": io["in.tokens"],
        "token_mask": io["in.token_mask"],
        "noise": io["in.noise"],
    }
    return inputs, io["out.actions"]


@pytest.mark.parametrize("below", ["", "params"])
@pytest.mark.parametrize("tree", ["openpi_tiny_orbax_step7", "openpi_tiny_orbax_pure"])
def test_openpi_orbax_matches_jax(
    golden: Path, tree: str, below: str, openpi_io: tuple[dict[str, Any], torch.Tensor]
) -> None:
    model = load_model(golden / tree / below, horizon=10)
    inputs, expected = openpi_io
    torch.testing.assert_close(model.sample_actions(**inputs), expected, atol=2e-4, rtol=0)


def test_openpi_orbax_reads_head_counts(golden: Path) -> None:
    config = open_checkpoint(golden / "openpi_tiny_orbax_pure", horizon=10).config
    assert (config.vision_heads, config.q_heads, config.kv_heads, config.head_dim) == (4, 8, 1, 16)
    assert (config.image_size, config.max_prompt_tokens) == (224, 200)


def test_lerobot_matches_lerobot(
    golden: Path, lerobot_io: tuple[dict[str, Any], torch.Tensor]
) -> None:
    model = load_model(golden / "lerobot_tiny_ckpt", vision_heads=4)
    inputs, expected = lerobot_io
    torch.testing.assert_close(model.sample_actions(**inputs), expected, atol=1e-5, rtol=0)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_openpi_torch_matches_lerobot(
    openpi_torch: Path, lerobot_io: tuple[dict[str, Any], torch.Tensor]
) -> None:
    model = load_model(openpi_torch, vision_heads=4, max_prompt_tokens=24)
    inputs, expected = lerobot_io
    torch.testing.assert_close(model.sample_actions(**inputs), expected, atol=1e-5, rtol=0)


def test_bf16_is_the_models_own_cast(golden: Path) -> None:
    path = golden / "lerobot_tiny_ckpt"
    cast = load_model(path, vision_heads=4, dtype="bfloat16").state_dict()
    expected = load_model(path, vision_heads=4).to_dtype(torch.bfloat16).state_dict()
    assert cast["expert.norm.dense.weight"].dtype == torch.float32
    assert cast["prefix.embed.weight"].dtype == torch.bfloat16
    for name, tensor in expected.items():
        assert torch.equal(cast[name], tensor), name
        assert cast[name].dtype == tensor.dtype, name


@pytest.mark.parametrize(
    ("path", "format_name", "options"),
    [
        ("openpi_tiny_orbax_step7", "openpi-orbax", {"horizon": 10}),
        ("openpi_tiny_orbax_pure", "openpi-orbax", {"horizon": 10}),
        ("lerobot_tiny_ckpt", "lerobot", {"vision_heads": 4}),
    ],
)
def test_conversion_keeps_every_bit(
    golden: Path, tmp_path: Path, path: str, format_name: str, options: dict[str, Any]
) -> None:
    source = open_checkpoint(golden / path, **options)
    assert source.format == format_name
    converted = open_checkpoint(convert(source, tmp_path / "converted"))
    assert converted.format == "halfpi"
    assert converted.config == source.config
    assert converted.processing == source.processing
    expected, found = dict(source.tensors()), dict(converted.tensors())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    again = convert(converted, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (
        tmp_path / "converted" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("path", ["openpi_tiny_orbax_step7", "openpi_tiny_orbax_pure"])
def test_each_works_on_what_tensors_reads(golden: Path, tmp_path: Path, path: str) -> None:
    source = open_checkpoint(golden / path, horizon=10)
    converted = open_checkpoint(convert(source, tmp_path / "converted"))
    for checkpoint in (source, converted):
        found = checkpoint.each(lambda name, tensor: (name, tensor))
        for name, tensor in checkpoint.tensors():
            assert found[name][0] == name
            assert torch.equal(found[name][1], tensor)
        assert len(found) == len(checkpoint.stored)


def test_each_stops_at_an_error(golden: Path) -> None:
    def fail(name: str, _: torch.Tensor) -> None:
        raise ValueError(f"no room for {name}")

    checkpoint = open_checkpoint(golden / "lerobot_tiny_ckpt", vision_heads=4)
    with pytest.raises(ValueError, match="no room for"):
        checkpoint.each(fail)


def test_openpi_torch_conversion_keeps_every_bit(openpi_torch: Path, tmp_path: Path) -> None:
    source = open_checkpoint(openpi_torch, vision_heads=4)
    converted = open_checkpoint(convert(source, tmp_path / "converted"))
    found = dict(converted.tensors())
    assert all(torch.equal(found[name], tensor) for name, tensor in source.tensors())
