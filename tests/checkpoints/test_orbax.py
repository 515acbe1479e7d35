"""openpi's JAX trees: every layout that orbax writes, LoRA, and what is broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import torch
from numpy.typing import NDArray

from halfpi.checkpoints import CheckpointError, open_checkpoint

Arrays = dict[str, NDArray[Any]]
Write = Callable[..., Path]

QUERY = "PaliGemma/llm/layers/attn/q_einsum/w"
VISION_QUERY = "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(path, horizon=10).tensors())


def fails(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        tensors(path)


@pytest.fixture
def expected(golden: Path) -> dict[str, torch.Tensor]:
    return tensors(golden / "openpi_tiny_orbax_pure")


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("split", [1, 2])
def test_any_chunks(
    golden_arrays: Arrays,
    write_orbax: Write,
    expected: dict[str, torch.Tensor],
    layers: int,
    split: int,
) -> None:
    chunks = {
        path: (min(layers, array.shape[0]), *array.shape[1:-1], array.shape[-1] // split)
        for path, array in golden_arrays.items()
        if array.ndim > 1
    }
    found = tensors(write_orbax(golden_arrays, chunks))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(
    golden_arrays: Arrays, write_orbax: Write, expected: dict[str, torch.Tensor], dtype: Any
) -> None:
    halves = {path: array.astype(dtype) for path, array in golden_arrays.items()}
    found = tensors(write_orbax(halves))
    torch_dtype = torch.float16 if dtype == np.float16 else torch.bfloat16
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(torch_dtype)), name


def add_lora(arrays: Arrays, weight: str, rank: int) -> None:
    """Add random LoRA factors of `weight`."""
    rng = np.random.default_rng(0)
    shape = arrays[weight].shape
    stem = weight.removesuffix("w") if weight.endswith("/w") else f"{weight}_"
    arrays[f"{stem}lora_a"] = rng.normal(size=(*shape[:-1], rank)).astype(np.float32)
    arrays[f"{stem}lora_b"] = rng.normal(size=(*shape[:-2], rank, shape[-1])).astype(np.float32)


@pytest.mark.parametrize("layers", [1, 3])
def test_lora_is_merged(
    golden_arrays: Arrays, write_orbax: Write, tmp_path: Path, layers: int
) -> None:
    merged = dict(golden_arrays)
    adapted = dict(golden_arrays)
    for suffix, rank in (("", 16), ("_1", 32)):
        for name in (
            f"attn/q_einsum{suffix}/w",
            f"attn/kv_einsum{suffix}/w",
            f"attn/attn_vec_einsum{suffix}/w",
            f"mlp{suffix}/gating_einsum",
            f"mlp{suffix}/linear",
        ):
            weight = f"PaliGemma/llm/layers/{name}"
            add_lora(adapted, weight, rank)
            stem = weight.removesuffix("w") if weight.endswith("/w") else f"{weight}_"
            product = adapted[f"{stem}lora_a"] @ adapted[f"{stem}lora_b"]
            merged[weight] = golden_arrays[weight] + product
    chunks = {
        path: (layers, *array.shape[1:]) for path, array in adapted.items() if "llm/layers" in path
    }
    expected = tensors(write_orbax(merged))
    shutil.move(tmp_path / "orbax", tmp_path / "merged")
    found = tensors(write_orbax(adapted, chunks))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


def test_lora_of_an_unknown_rank(golden_arrays: Arrays, write_orbax: Write) -> None:
    add_lora(golden_arrays, QUERY, 8)
    fails(write_orbax(golden_arrays), "q_einsum/lora_a has rank 8; only ranks 16 and 32")


def test_lora_of_another_shape(golden_arrays: Arrays, write_orbax: Write) -> None:
    add_lora(golden_arrays, QUERY, 16)
    golden_arrays[QUERY[:-1] + "lora_b"] = golden_arrays[QUERY[:-1] + "lora_b"][..., :8]
    fails(write_orbax(golden_arrays), r"q_einsum/lora_b has shape .*, expected \(3, 8, 16, 16\)")


def test_half_a_lora_is_unexpected(golden_arrays: Arrays, write_orbax: Write) -> None:
    add_lora(golden_arrays, QUERY, 16)
    del golden_arrays[QUERY[:-1] + "lora_b"]
    fails(write_orbax(golden_arrays), f"unexpected: {QUERY[:-1]}lora_a")


def test_missing_and_unexpected_arrays(golden_arrays: Arrays, write_orbax: Write) -> None:
    del golden_arrays["time_mlp_in/bias"]
    golden_arrays["value_head/kernel"] = np.zeros((2, 2), np.float32)
    fails(write_orbax(golden_arrays), "missing: time_mlp_in.bias; unexpected: value_head/kernel")


def test_a_layer_less_is_missing(golden_arrays: Arrays, write_orbax: Write) -> None:
    golden_arrays[QUERY] = golden_arrays[QUERY][:1]
    fails(write_orbax(golden_arrays), "missing: prefix.layers.1.attn.q.weight")


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (QUERY, lambda a: a[..., 0], r"q_einsum/w has shape \(3, 8, 64\), expected 4 axes"),
        (
            "PaliGemma/llm/layers/mlp/gating_einsum",
            lambda a: a[:, :1],
            "gating_einsum has shape .* expected 2 on axis 1",
        ),
        (
            "PaliGemma/llm/layers/mlp/linear",
            lambda a: a[:, :-1],
            r"prefix.layers.0.mlp.down.weight \(stored as .*mlp/linear\[0\]\) has shape",
        ),
        ("PaliGemma/img/pos_embedding", lambda a: a.repeat(2, 0), "vision.position_embed .*shape"),
        (QUERY, lambda a: a.reshape(3, 16, 64, 8), "q_heads × head_dim differ"),
        (VISION_QUERY, lambda a: a.reshape(2, 48, 6, 8), "vision_heads × head_dim differ"),
        (
            "action_in_proj/bias",
            lambda a: a.astype(np.float64),
            "action_in.bias .* is torch.float64",
        ),
        ("action_in_proj/bias", lambda a: a.astype(np.complex64), "action_in_proj.* complex64"),
        ("action_in_proj/bias", lambda a: a * np.nan, "action_in.bias has NaN"),
    ],
)
def test_wrong_arrays_are_named(
    golden_arrays: Arrays,
    write_orbax: Write,
    path: str,
    change: Callable[[NDArray[Any]], NDArray[Any]],
    message: str,
) -> None:
    golden_arrays[path] = change(golden_arrays[path])
    fails(write_orbax(golden_arrays), message)


def test_pi0_is_refused(golden_arrays: Arrays, write_orbax: Write) -> None:
    for path in [path for path in golden_arrays if "Dense_0" in path and "norm" in path]:
        del golden_arrays[path]
    for leaf in ("kernel", "bias"):
        golden_arrays[f"action_time_mlp_in/{leaf}"] = golden_arrays.pop(f"time_mlp_in/{leaf}")
    fails(write_orbax(golden_arrays), "holds π0, not π0.5")


@pytest.fixture
def broken(golden: Path, tmp_path: Path) -> Path:
    """The parameters of a golden tree that a test may break."""
    root = shutil.copytree(golden / "openpi_tiny_orbax_step7", tmp_path / "step7")
    return Path(root) / "params"


def test_no_lost_file_goes_unnoticed(broken: Path, expected: dict[str, torch.Tensor]) -> None:
    noticed, messages = set(), set()
    for path in sorted(broken.glob("**/d/*")):
        content = path.read_bytes()
        for damage in (None, content[: len(content) // 2]):
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            try:
                found = tensors(broken)
            except CheckpointError as error:
                noticed.add(path)
                messages.add(str(error).partition("cannot be read")[1])
            else:  # orbax leaves index files behind that it no longer refers to
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
            path.write_bytes(content)
    assert messages == {"cannot be read"}
    assert len(noticed) > 3
    assert noticed.issuperset(broken.glob("d/*"))


def test_corrupt_manifest(broken: Path) -> None:
    path = broken / "manifest.ocdbt"
    content = path.read_bytes()
    for byte in range(0, len(content), 5):
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 1]) + content[byte + 1 :])
        fails(broken, "cannot be read")
    path.unlink()
    fails(broken, "has no manifest.ocdbt; only OCDBT is supported")


def test_lost_chunks_are_not_zeros(golden_arrays: Arrays, write_orbax: Write) -> None:
    params = write_orbax(golden_arrays) / "params"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{params}/"}).result()
    store.write("params.time_mlp_in.bias.value/0", None).result()
    fails(params, "params.time_mlp_in.bias.value cannot be read: .*missing")
    metadata = json.loads((params / "_METADATA").read_text())
    del metadata["store_array_data_equal_to_fill_value"]  # then orbax left zeros out
    (params / "_METADATA").write_text(json.dumps(metadata))
    assert not tensors(params)["time_mlp_in.bias"].any()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "_METADATA is not readable JSON"),
        ("[]", "_METADATA must hold a JSON object, got list"),
        ("{}", "'tree_metadata' must be of type dict, got nothing"),
        ('{"tree_metadata": {"a": {}}}', "_METADATA has a leaf {}"),
        ('{"tree_metadata": {"a": {"key_metadata": [{"key": 3}]}}}', "_METADATA has a leaf"),
        (
            '{"tree_metadata": {"a": {"key_metadata": [{"key": "gone"}]}}}',
            "gone cannot be read: NOT_FOUND",
        ),
        (
            '{"tree_metadata": {"a": {"key_metadata": [{"key": "params"}, {"key": "b"}]}, '
            '"b": {"key_metadata": [{"key": "b"}]}}}',
            "stores b twice",
        ),
    ],
)
def test_broken_tree_metadata(broken: Path, metadata: str, message: str) -> None:
    (broken / "_METADATA").write_text(metadata)
    fails(broken, message)
