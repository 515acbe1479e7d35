"""Checkpoints that tests may break: copies of the golden ones, and small synthetic trees."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"

Arrays = dict[str, NDArray[Any]]


@pytest.fixture
def golden() -> Path:
    return GOLDEN


@pytest.fixture
def lerobot(tmp_path: Path) -> Path:
    """A LeRobot checkpoint that a test may change."""
    return Path(shutil.copytree(GOLDEN / "lerobot_tiny_ckpt", tmp_path / "lerobot"))


@pytest.fixture
def openpi_torch(tmp_path: Path) -> Path:
    """A checkpoint as openpi's converter writes it; the token table is stored as the LM head."""
    root = tmp_path / "openpi_torch"
    root.mkdir()
    weights = load_file(GOLDEN / "lerobot_tiny_ckpt" / "model.safetensors")
    stripped = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    table = stripped.pop("paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight")
    stripped["paligemma_with_expert.paligemma.lm_head.weight"] = table
    save_file(stripped, root / "model.safetensors")
    config = {"action_dim": 32, "action_horizon": 10, "paligemma_variant": "gemma_2b"}
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture
def edit_weights() -> Callable[[Path, Callable[[dict[str, Tensor]], None]], None]:
    """Change the tensors of a checkpoint's model.safetensors in place."""

    def edit(root: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
        weights = load_file(root / "model.safetensors")
        change(weights)
        save_file(weights, root / "model.safetensors")

    return edit


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    """Change a JSON file in place."""

    def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))

    return edit


@pytest.fixture(scope="session")
def _golden_arrays() -> Arrays:
    root = GOLDEN / "openpi_tiny_orbax_pure" / "params"
    tree = json.loads((root / "_METADATA").read_text())["tree_metadata"].values()
    keys = [[part["key"] for part in leaf["key_metadata"]] for leaf in tree]
    return {
        "/".join(key[1:]): tensorstore.open(_spec(root, ".".join(key)), open=True)
        .result()
        .read()
        .result()
        for key in keys
    }


@pytest.fixture
def golden_arrays(_golden_arrays: Arrays) -> Arrays:
    """The arrays of the golden openpi tree by path, in a dictionary that a test may change."""
    return dict(_golden_arrays)


@pytest.fixture
def write_orbax(tmp_path: Path) -> Callable[..., Path]:
    """Write arrays as an openpi checkpoint, as orbax does; chunks: path → chunk shape."""

    def write(arrays: Arrays, chunks: Mapping[str, tuple[int, ...]] | None = None) -> Path:
        params = tmp_path / "orbax" / "params"
        tree = {}
        with tensorstore.Transaction() as transaction:  # one commit instead of fifty
            for path, array in arrays.items():
                key = ["params", *path.split("/"), "value"]
                spec = _spec(params, ".".join(key))
                spec["metadata"] = {
                    "chunks": (chunks or {}).get(path, array.shape),
                    "compressor": None,
                }
                store = tensorstore.open(
                    spec,
                    create=True,
                    dtype=array.dtype,
                    shape=array.shape,
                    transaction=transaction,
                )
                store.result().write(array).result()
                tree[str(tuple(key))] = {"key_metadata": [{"key": part} for part in key]}
        metadata = {"tree_metadata": tree, "store_array_data_equal_to_fill_value": True}
        (params / "_METADATA").write_text(json.dumps(metadata))
        return params.parent

    return write


def _spec(params: Path, key: str) -> dict[str, Any]:
    return {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{params}/", "path": f"{key}/"},
        "store_data_equal_to_fill_value": True,
        "context": {"file_io_sync": False},
    }


@pytest.fixture
def stats() -> Callable[[int, int], dict[str, Any]]:
    """openpi's norm_stats.json for a state and actions of some length."""

    def make(state: int, actions: int) -> dict[str, Any]:
        rng = np.random.default_rng(0)

        def feature(size: int) -> dict[str, list[float]]:
            q01 = rng.normal(-2, 0.1, size)
            return {
                "mean": rng.normal(size=size).tolist(),
                "std": rng.uniform(0.5, 2, size).tolist(),
                "q01": q01.tolist(),
                "q99": (q01 + 4).tolist(),
            }

        return {"norm_stats": {"state": feature(state), "actions": feature(actions)}}

    return make
