"""The torch checkpoints of openpi: model.safetensors, maybe the converter's config.json, assets."""

from __future__ import annotations

from pathlib import Path

from halfpi.checkpoints.contents import Contents, file_tensors
from halfpi.checkpoints.json_files import member, read_json
from halfpi.checkpoints.openpi_assets import read_assets
from halfpi.checkpoints.torch_names import torch_tensors


def read_openpi_torch(root: Path, asset_id: str | None) -> Contents:
    """The checkpoint in the directory `root`.

    Raises CheckpointError for unreadable files and for what `read_assets` raises.
    """
    weights = root / "model.safetensors"
    tensors, unknown = torch_tensors(file_tensors(weights), weights)
    assets = read_assets(root, asset_id)
    stated, assumptions = dict(assets.stated), assets.assumptions
    config = root / "config.json"
    if config.is_file():
        stated["horizon"] = member(read_json(config), "action_horizon", int, config)
        assumptions = tuple(each for each in assumptions if "horizon" not in each.options)
    return Contents(
        format="openpi-torch",
        root=root,
        tensors=tensors,
        unknown=unknown,
        stated=stated,
        processing=assets.processing,
        assumptions=assumptions,
    )
