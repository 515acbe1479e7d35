"""Frames: openpi-client's bytes, and none of what a stranger might send instead."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from halfpi.serving.wire import MAX_DEPTH, MAX_ITEMS, MAX_TEXT_BYTES, WireError, packb, unpackb

# Written by openpi-client 0.1.2; test_openpi_client.py checks that it still does.
GOLDEN = {
    name: bytes.fromhex(frame)
    for name, frame in json.loads(
        (Path(__file__).parent / "golden_frames.json").read_text()
    ).items()
}
VALUES: dict[str, Any] = {
    "array": {"a": np.arange(3, dtype=np.float32)},
    "scalar": np.float32(1.5),
    "metadata": {"reset_pose": [0.0, -1.5, 1.5]},
    "request": {
        "observation/image": np.arange(12, dtype=np.uint8).reshape(2, 2, 3),
        "observation/state": np.linspace(-1, 1, 4),
        "observation/gripper_position": np.float64(0.5),
        "count": np.int64(-3),
        "done": np.bool_(True),
        "name": np.array(["left", "right"]),
        "prompt": "pick up the μ-cube",
    },
    "reply": {
        "actions": (np.arange(6, dtype=np.float32) / 4).reshape(2, 3),
        "policy_timing": {"infer_ms": 12.5},
        "server_timing": {"infer_ms": 13.25, "prev_total_ms": 20.0},
    },
}


def array(data: object = b"\0" * 4, dtype: object = "<f4", shape: object = (1,)) -> bytes:
    """The frame of one array, whatever it claims."""
    parts = {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}
    frame: bytes = msgpack.packb({"a": parts})
    return frame


@pytest.mark.parametrize("name", VALUES)
def test_golden_frames(name: str) -> None:
    assert packb(VALUES[name]) == GOLDEN[name]
    assert packb(unpackb(GOLDEN[name])) == GOLDEN[name]


def test_every_golden_frame_is_tested() -> None:
    assert set(GOLDEN) == set(VALUES)


@given(
    arrays(
        st.sampled_from(["u1", "i8", ">i4", "f2", "f4", "f8", "?", "S3", "U2"]),
        array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    )
)
def test_arrays_come_back(value: np.ndarray[Any, Any]) -> None:
    decoded = unpackb(packb(value))
    assert (decoded.dtype, decoded.shape) == (value.dtype, value.shape)
    assert decoded.tobytes() == value.tobytes()


def test_the_order_in_memory_does_not_matter() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1)[::-1]
    assert np.array_equal(unpackb(packb(image)), image)


def test_decoded_arrays_are_views_that_nobody_can_change() -> None:
    decoded = unpackb(GOLDEN["array"])["a"]
    assert not decoded.flags.owndata
    assert not decoded.flags.writeable


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.zeros(1, "c8"), np.zeros(1, "i4,f4"), np.complex64(1)]
)
def test_only_plain_arrays_are_packed(value: object) -> None:
    with pytest.raises(ValueError, match="a frame cannot hold an array of dtype"):
        packb(value)


def test_other_objects_are_not_packed() -> None:
    with pytest.raises(TypeError, match="a frame cannot hold a object"):
        packb({"what": object()})


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("|O", b"\0" * 8),
        ("O", b"\0" * 8),
        ("|V4", b"\0" * 4),
        ("<c8", b"\0" * 8),
        ("<M8[s]", b"\0" * 8),
        ("<f3", b"\0" * 3),
        ("<U0", b""),
        ("f4,f4", b"\0" * 8),
        ("<f4\n", b"\0" * 4),
        (4, b"\0" * 4),
        (b"<f4", b"\0" * 4),
    ],
)
def test_dtypes_that_could_run_code_or_are_none(dtype: object, data: bytes) -> None:
    with pytest.raises(WireError, match="dtype must be of numbers, booleans or text, got"):
        unpackb(array(data, dtype))


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (array(b"\0" * 3), r"dtype <f4 and shape \(1,\) has 4 bytes, got 3"),
        (array(b"\0" * 4, shape=(2,)), r"shape \(2,\) has 8 bytes, got 4"),
        (array(b"\0" * 4, shape=(2**40, 2**40)), "has 4835703278458516698824704 bytes, got 4"),
        (array(b"", shape=(0, 2**62, 2**62)), "cannot have shape"),
        (array(shape=(-1,)), "shape must be at most 8 lengths, got"),
        (array(shape=(True,)), "shape must be at most 8 lengths, got"),
        (array(shape=(1,) * 9), "shape must be at most 8 lengths, got"),
        (array(shape="ab"), "shape must be at most 8 lengths, got ab"),
        (array("text"), "the data of an array must be bytes, got str"),
        (msgpack.packb({b"__ndarray__": True}), "an array has data, dtype and shape, got"),
        (msgpack.packb({b"__npgeneric__": True}), "a NumPy scalar has data and dtype, got"),
        (
            msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
            r"not a NumPy scalar of dtype \|u1",
        ),
        (
            msgpack.packb({b"__npgeneric__": True, b"data": 1e300, b"dtype": "<f4"}),
            "not a NumPy scalar of dtype <f4: overflow",
        ),
        (
            msgpack.packb({b"__npgeneric__": True, b"data": [1] * 9, b"dtype": "<f4"}),
            "must be one value, got list",
        ),
        (msgpack.packb({b"key": 1}), "a key must be text, got b'key'"),
        (msgpack.packb({1: 1}), "not a msgpack frame: int is not allowed for map key"),
        (msgpack.packb({"when": msgpack.Timestamp(1)}), "not a msgpack frame: .* max_ext_len"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "not a msgpack frame: .* max_ext_len"),
        (b"", "not a msgpack frame"),
        (b"\xc1", "not a msgpack frame: FormatError"),
        (b"\x81\xa1a", "not a msgpack frame"),
        (b"\x01\x01", "not a msgpack frame: unpack.b. received extra data"),
        (b"\xa2\xff\xfe", "not a msgpack frame: 'utf-8' codec"),
        (b"\xdd\xff\xff\xff\xff", "not a msgpack frame: 4294967295 exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "not a msgpack frame: 4294967295 exceeds max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "not a msgpack frame"),
        (b"\x91" * 2000 + b"\xc0", "not a msgpack frame: StackError"),
        (b"\x91" * (MAX_DEPTH + 1) + b"\xc0", f"nested at most {MAX_DEPTH} deep"),
        (msgpack.packb("a" * (MAX_TEXT_BYTES + 1)), "exceeds max_str_len"),
        (msgpack.packb([[0] * 1000] * 20), f"at most {MAX_ITEMS} items"),
    ],
)
def test_what_a_stranger_might_send(frame: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        unpackb(frame)


@given(st.binary(max_size=200))
def test_garbage_is_a_wire_error_or_a_value(frame: bytes) -> None:
    with suppress(WireError):
        unpackb(frame)


@given(st.sampled_from(sorted(GOLDEN)), st.data())
def test_a_damaged_frame_is_a_wire_error_or_a_value(name: str, data: st.DataObject) -> None:
    frame = bytearray(GOLDEN[name])
    frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with suppress(WireError):
        unpackb(bytes(frame))
