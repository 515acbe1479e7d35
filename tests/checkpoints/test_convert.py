"""Conversion: what it writes, that it writes all or nothing, and how little memory it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from halfpi.checkpoints import CheckpointError, convert, load_model, open_checkpoint
from halfpi.checkpoints.checkpoint import Checkpoint
from halfpi.checkpoints.safetensors_io import SafetensorsWriter
from halfpi.config import Pi05Config, ProcessingConfig, to_json
from halfpi.model import Pi05


def test_bf16_is_the_models_own_cast(lerobot: Path, tmp_path: Path) -> None:
    target = convert(lerobot, tmp_path / "bf16", dtype="bfloat16", vision_heads=4)
    expected = load_model(lerobot, vision_heads=4, dtype="bfloat16").state_dict()
    found = dict(open_checkpoint(target).tensors())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32, torch.bfloat16}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())


def test_loading_needs_no_options(lerobot: Path, tmp_path: Path) -> None:
    before = load_model(lerobot, vision_heads=4, horizon=5)
    target = convert(lerobot, tmp_path / "own", vision_heads=4, horizon=5)
    after = load_model(target)
    assert after.config == before.config
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("tokenizer/tokenizer.json", "tokenizer.json"),
        ("tokenizer.json", "tokenizer.json"),
        ("tokenizer.model", "tokenizer.model"),
        ("paligemma_tokenizer.model", "tokenizer.model"),
    ],
)
def test_the_tokenizer_comes_along(lerobot: Path, tmp_path: Path, name: str, written: str) -> None:
    (lerobot / name).parent.mkdir(exist_ok=True)
    (lerobot / name).write_text("pieces")
    assert open_checkpoint(lerobot, vision_heads=4).tokenizer_path == lerobot / name
    target = convert(lerobot, tmp_path / "own", vision_heads=4)
    assert (target / written).read_text() == "pieces"
    assert sorted(path.name for path in target.iterdir()) == sorted(
        ["halfpi.json", "model.safetensors", written]
    )
    assert open_checkpoint(target).tokenizer_path == target / written


def test_describe(lerobot: Path) -> None:
    summary = open_checkpoint(lerobot, vision_heads=4).describe()
    assert summary.format == "lerobot"
    assert summary.tensors == 104
    assert sum(summary.parameters.values()) == 263248
    assert summary.parameters.keys() == {"vision", "prefix", "expert", "action"}
    assert summary.dtypes == {"float32": 263248}
    assert summary.stored_bytes == 4 * 263248
    assert len(summary.unused) == 9


def test_existing_targets_are_kept(lerobot: Path, tmp_path: Path) -> None:
    target = convert(lerobot, tmp_path / "own", vision_heads=4)
    with pytest.raises(CheckpointError, match="own exists; pass overwrite=True"):
        convert(lerobot, target, vision_heads=4)
    (target / "stale").touch()
    convert(lerobot, target, vision_heads=4, horizon=3, overwrite=True)
    assert open_checkpoint(target).config.horizon == 3
    assert not (target / "stale").exists()


def test_a_checkpoint_may_replace_itself(lerobot: Path, tmp_path: Path) -> None:
    target = convert(lerobot, tmp_path / "own", vision_heads=4)
    convert(target, target, dtype="bfloat16", overwrite=True)
    assert open_checkpoint(target).describe().dtypes.keys() == {"float32", "bfloat16"}
    assert list(tmp_path.glob(".own*")) == []


def test_only_own_checkpoints_are_replaced(lerobot: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with pytest.raises(CheckpointError, match="home is no halfpi checkpoint and is not replaced"):
        convert(lerobot, tmp_path / "home", vision_heads=4, overwrite=True)
    with pytest.raises(CheckpointError, match="nowhere is no directory"):
        convert(lerobot, tmp_path / "nowhere" / "own", vision_heads=4)


def test_failures_leave_nothing_behind(
    lerobot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = convert(lerobot, tmp_path / "own", vision_heads=4)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(self: SafetensorsWriter, name: str, tensor: Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "write", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*new: .*No space left on device"):
        convert(lerobot, tmp_path / "new", vision_heads=4)
    with pytest.raises(CheckpointError, match=r"cannot write .*own: .*No space left on device"):
        convert(lerobot, target, vision_heads=4, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert open_checkpoint(target).config.horizon == 10


def test_a_full_disk_is_noticed_before_writing(
    lerobot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1_052_991))
    with pytest.raises(CheckpointError, match=r"has 1052991 bytes free, .* needs 1052992"):
        convert(lerobot, tmp_path / "own", vision_heads=4)
    convert(lerobot, tmp_path / "own", vision_heads=4, dtype="bfloat16")


def test_options_of_an_open_checkpoint(lerobot: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(lerobot, vision_heads=4)
    with pytest.raises(ValueError, match="pass horizon to open_checkpoint"):
        load_model(checkpoint, horizon=3)
    with pytest.raises(ValueError, match="pass horizon to open_checkpoint"):
        convert(checkpoint, tmp_path / "own", horizon=3)


@pytest.mark.parametrize("dtype", ["float16", "fp32", torch.float32])
def test_unknown_dtypes(lerobot: Path, tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got"):
        load_model(lerobot, vision_heads=4, dtype=dtype)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got"):
        convert(lerobot, tmp_path / "own", vision_heads=4, dtype=dtype)


def test_one_tensor_is_in_memory_at_a_time(lerobot: Path) -> None:
    tensors = open_checkpoint(lerobot, vision_heads=4).tensors()
    assert isinstance(tensors, type(_ for _ in ()))
    assert isinstance(next(tensors)[1], Tensor)


# 300 MB of weights, the largest of them 31 MB.
MEDIUM = Pi05Config(
    vision_width=96,
    vision_mlp=192,
    vision_depth=2,
    vision_heads=4,
    vocab_size=7500,
    prefix_width=1024,
    prefix_mlp=4096,
    expert_width=256,
    expert_mlp=512,
    depth=6,
)
MEASURE = """
import re, sys
from pathlib import Path
from halfpi.checkpoints import convert, open_checkpoint

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

checkpoint = open_checkpoint(sys.argv[1])
before = peak_kib()
convert(checkpoint, sys.argv[2], dtype="bfloat16")
print((peak_kib() - before) * 1024)
"""


def write_own(root: Path, config: Pi05Config) -> Checkpoint:
    """A checkpoint of random weights in halfpi's own format."""
    root.mkdir()
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Pi05(config).state_dict().items()}
    announced = {name: (torch.float32, shape) for name, shape in shapes.items()}
    with SafetensorsWriter(root / "model.safetensors", announced) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.rand(shape))
    data = {"version": 1, "model": to_json(config), "processing": to_json(ProcessingConfig())}
    (root / "halfpi.json").write_text(json.dumps(data))
    return open_checkpoint(root)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's VmHWM")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    checkpoint = write_own(tmp_path / "medium", MEDIUM)
    sizes = [4 * torch.Size(stored.shape).numel() for stored in checkpoint.stored.values()]
    assert sum(sizes) > 250e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "medium"), str(tmp_path / "bf16")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # A tensor and its cast; 20 MB for what the interpreter and torch allocate on first use.
    assert grown < 1.5 * max(sizes) + 20e6
    assert sum(sizes) > 3 * grown
