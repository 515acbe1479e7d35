"""Safetensors without the safetensors library, held against it, and against broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from halfpi.checkpoints.errors import CheckpointError
from halfpi.checkpoints.safetensors_io import SafetensorsFile, SafetensorsWriter

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {
        f"t{index}": (torch.randn(3, 5, generator=generator) * 9).to(dtype)
        for index, dtype in enumerate(DTYPES)
    }
    return {**made, "scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}


@pytest.fixture
def written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "x.safetensors"
    announced = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    with SafetensorsWriter(path, announced) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    return path


def with_header(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_reads_what_the_library_writes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata={"some": "text"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = file.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_the_library_reads_what_we_write(written: Path, tensors: dict[str, torch.Tensor]) -> None:
    read = load_file(written)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_tensors_are_aligned(written: Path) -> None:
    for entry in SafetensorsFile(written).entries.values():
        assert entry.begin % entry.dtype.itemsize == 0


def test_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"a was announced as torch.float32 \(2,\), got .*\(3,\)"),
        SafetensorsWriter(tmp_path / "x", {"a": (torch.float32, (2,))}) as writer,
    ):
        writer.write("a", torch.zeros(3))


def test_writer_refuses_to_leave_a_hole(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="never written: b"),
        SafetensorsWriter(
            tmp_path / "x", {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
        ) as writer,
    ):
        writer.write("a", torch.zeros(2))


def test_every_truncation_is_an_error(written: Path) -> None:
    content = written.read_bytes()
    for length in (*range(0, len(content), 3), len(content) - 1):
        written.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            SafetensorsFile(written)


def test_every_flipped_header_bit_is_judged_as_the_library_judges_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"ab": torch.ones(2, 3), "cd": torch.zeros(4, dtype=torch.bfloat16)}, path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for bit in range(8 * header):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        try:
            with safe_open(path, "pt") as file:
                expected = {name: file.get_tensor(name).shape for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, UnicodeDecodeError, AttributeError):
            with pytest.raises(CheckpointError, match=r"x\.safetensors"):
                SafetensorsFile(path)
        else:
            entries = SafetensorsFile(path).entries
            assert {name: torch.Size(entry.shape) for name, entry in entries.items()} == expected


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "corrupt header"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "corrupt header"),
        (b"\xff\xfe", "corrupt header"),
        ({"a": 3}, "a is 3"),
        ({"a": {"dtype": "F32", "shape": [1]}}, "corrupt header: a is"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "corrupt header: a is"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "corrupt header: a is"),
        ({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, "a has the unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "a of F32 .* needs 8"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "a begins at byte"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            "a stored twice",
        ),
        (
            {
                "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            "b begins at byte",
        ),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "trailing bytes"),
    ],
)
def test_broken_headers_name_the_tensor(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(with_header(tmp_path / "x.safetensors", header, b"\0" * 8))


def test_file_that_shrinks_after_opening(written: Path) -> None:
    file = SafetensorsFile(written)
    written.write_bytes(written.read_bytes()[:-1])
    last = max(file.entries, key=lambda name: file.entries[name].end)
    with pytest.raises(CheckpointError, match=f"shorter while {last} was read"):
        file.read(last)
