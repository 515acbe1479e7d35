"""The file of scales: whole, bound to its weights, and refused when anything is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfpi.checkpoints import Checkpoint, CheckpointError, convert, open_checkpoint
from halfpi.checkpoints.halfpi_files import WEIGHTS
from halfpi.quant import Scales, SiteScales, load_scales, save_scales
from halfpi.quant.scales import SCALES


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_round_trip_changes_nothing(checkpoint: Checkpoint, scales: Scales) -> None:
    path = save_scales(scales, checkpoint)
    assert path == checkpoint.path / SCALES
    assert load_scales(checkpoint) == scales


def test_saving_replaces_and_leaves_nothing_else(checkpoint: Checkpoint, scales: Scales) -> None:
    before = set(checkpoint.path.iterdir())
    save_scales(dataclasses.replace(scales, frames=1), checkpoint)
    save_scales(scales, checkpoint)
    assert set(checkpoint.path.iterdir()) == before | {checkpoint.path / SCALES}
    assert load_scales(checkpoint).frames == scales.frames


def test_missing_scales_name_the_command(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=rf"has no {SCALES}, .*`halfpi calibrate` writes it"):
        load_scales(checkpoint)


def test_scales_of_other_weights_are_refused(checkpoint: Checkpoint, scales: Scales) -> None:
    path = save_scales(scales, checkpoint)
    weights = load_file(checkpoint.path / WEIGHTS)
    weights["expert.norm.dense.bias"][3] += 1e-3
    save_file(weights, checkpoint.path / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"belongs to other weights .* again") as caught:
        load_scales(open_checkpoint(checkpoint.path))
    assert str(path) in str(caught.value)


def test_scales_outlive_a_conversion_that_keeps_the_weights(
    checkpoint: Checkpoint, scales: Scales, tmp_path: Path
) -> None:
    path = save_scales(scales, checkpoint)
    copied = convert(checkpoint, tmp_path / "copied")
    rounded = convert(checkpoint, tmp_path / "rounded", dtype="bfloat16")
    for target in (copied, rounded):
        (target / SCALES).write_bytes(path.read_bytes())
    assert load_scales(open_checkpoint(copied)) == scales
    with pytest.raises(CheckpointError, match="belongs to other weights"):
        load_scales(open_checkpoint(rounded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(version=2), "is of version 2; this halfpi reads 1"),
        (lambda data: data.pop("version"), "'version' must be of type int, got nothing"),
        (lambda data: data.pop("weights"), "'weights' must be of type str, got nothing"),
        (lambda data: data.update(num_steps="4"), "'num_steps' must be of type int, got '4'"),
        (lambda data: data.update(sites=[]), r"'sites' must be of type dict, got \[\]"),
        (lambda data: data["sites"].popitem(), r"missing: expert\.layers\.2\.mlp\.down"),
        (lambda data: data["sites"].update(x=[1]), "x must hold a JSON object, got"),
        (
            lambda data: data["sites"].update(x={"weight": 1.0, "input": [1.0]}),
            "unexpected: x",
        ),
        (
            lambda data: data["sites"]["vision.layers.0.mlp.fc1"].update(weight=-1.0),
            r"wrong: vision\.layers\.0\.mlp\.fc1",
        ),
        (
            lambda data: data["sites"]["vision.layers.0.mlp.fc2"].update(input=[2e-5]),
            r"inputs' at least 3.05e-05\): wrong: vision\.layers\.0\.mlp\.fc2",
        ),
        (
            lambda data: data["sites"]["vision.layers.0.mlp.fc1"].update(input=["1"]),
            r"vision\.layers\.0\.mlp\.fc1: 'input' must be of type float, got '1'",
        ),
        (
            lambda data: data["sites"]["expert.layers.0.attn.o"]["input"].pop(),
            r"wrong: expert\.layers\.0\.attn\.o",
        ),
    ],
)
def test_a_damaged_file_is_refused_by_what_is_wrong(
    checkpoint: Checkpoint,
    scales: Scales,
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    path = save_scales(scales, checkpoint)
    edit(path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_scales(checkpoint)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused(checkpoint: Checkpoint, scales: Scales) -> None:
    path = save_scales(scales, checkpoint)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match="is not readable JSON"):
        load_scales(checkpoint)


@pytest.mark.parametrize("name", ["vision.layers.9.mlp.fc1", "vision.layers.0.attn.o"])
def test_scales_of_sites_that_the_model_lacks_are_not_saved(
    checkpoint: Checkpoint, scales: Scales, name: str
) -> None:
    sites = dict(scales.sites) | {name: SiteScales(1.0, (1.0,))}
    with pytest.raises(ValueError, match=f"unexpected: {re.escape(name)}"):
        save_scales(dataclasses.replace(scales, sites=sites), checkpoint)
    assert not (checkpoint.path / SCALES).exists()


def test_scales_need_a_step(checkpoint: Checkpoint, scales: Scales) -> None:
    sites = {
        name: SiteScales(each.weight, () if name.startswith("expert") else each.input)
        for name, each in scales.sites.items()
    }
    with pytest.raises(ValueError, match=r"wrong: expert\.layers\.0\.attn\.qkv"):
        save_scales(dataclasses.replace(scales, num_steps=0, sites=sites), checkpoint)


def test_a_directory_that_cannot_be_written_is_an_error_that_names_the_file(
    checkpoint: Checkpoint, scales: Scales
) -> None:
    (checkpoint.path / SCALES).mkdir()
    with pytest.raises(CheckpointError, match=f"cannot write .*{SCALES}"):
        save_scales(scales, checkpoint)
    assert [path.name for path in checkpoint.path.glob(".*")] == []


def test_a_model_may_be_stored_in_any_dtype(checkpoint: Checkpoint, scales: Scales) -> None:
    weights = load_file(checkpoint.path / WEIGHTS)
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(halved, checkpoint.path / WEIGHTS)
    reopened = open_checkpoint(checkpoint.path)
    save_scales(scales, reopened)
    assert load_scales(reopened) == scales
