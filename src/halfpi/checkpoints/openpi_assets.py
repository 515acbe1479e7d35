"""What lies beside openpi's weights: statistics, and what their asset id tells about the robot.

openpi keeps the robot, the horizon and the prompt's form in its code, by the name of a training
config, and not in the checkpoint. The asset id under which the statistics are stored identifies the
released configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfpi.checkpoints.contents import Assumption
from halfpi.checkpoints.errors import CheckpointError, listing
from halfpi.checkpoints.json_files import member, read_json
from halfpi.checkpoints.stats import feature_stats, length
from halfpi.config import RobotName
from halfpi.processing import ROBOTS


@dataclass(frozen=True)
class Assets:
    """What the assets state of `Pi05Config` and of `ProcessingConfig`, and what they leave open."""

    stated: Mapping[str, int | float]
    processing: Mapping[str, Any]
    assumptions: tuple[Assumption, ...]


@dataclass(frozen=True)
class _Config:
    """What sets a released config of openpi training/config.py apart from the others."""

    robot: RobotName
    horizon: int
    state_in_prompt: bool = True
    delta_mask: tuple[bool, ...] | None = None


_CONFIGS: Mapping[str, _Config] = {
    # pi05_libero: discrete_state_input=False, extra_delta_transform=False
    "physical-intelligence/libero": _Config("libero", 10, state_in_prompt=False),
    # pi05_droid: joint velocities, so no delta transform
    "droid": _Config("droid", 15),
    # pi05_aloha: deltas by make_bool_mask(6, -1, 6, -1)
    "trossen": _Config("aloha", 50, delta_mask=((True,) * 6 + (False,)) * 2),
}
_OPENPI_HORIZON = 50  # action_horizon of openpi pi0_config.py


def read_assets(root: Path, asset_id: str | None) -> Assets:
    """The assets of the checkpoint at `root`; without norm_stats.json there are no statistics.

    Raises CheckpointError when `asset_id` is not among the assets, when there are several and none
    was chosen, and when norm_stats.json is not what openpi shared/normalize.py writes.
    """
    chosen = _choose(root / "assets", asset_id)
    stats = _read_stats(root / "assets" / chosen) if chosen is not None else {}
    config = _CONFIGS.get(chosen or "")
    if config is not None:
        processing: dict[str, Any] = {
            "robot": config.robot,
            "robot_action_dim": ROBOTS[config.robot].action_dim,
            "state_in_prompt": config.state_in_prompt,
            "delta_mask": config.delta_mask,
        }
        return Assets({"horizon": config.horizon}, {**stats, **processing}, ())
    assumptions = [
        Assumption(
            f"openpi checkpoints do not store the action horizon; assuming {_OPENPI_HORIZON}, "
            "pass horizon=… if it was trained with another",
            frozenset({"horizon"}),
        )
    ]
    if chosen is not None:
        action_dim = length(stats["action_stats"])
        stats |= {} if action_dim is None else {"robot_action_dim": action_dim}
        assumptions.append(
            Assumption(
                f"asset id {chosen!r} is of no robot that halfpi knows; assuming absolute actions "
                "and the state in the prompt; pass processing_overrides with robot, delta_mask or "
                "state_in_prompt if it was trained otherwise",
                frozenset({"robot", "delta_mask", "state_in_prompt"}),
            )
        )
    return Assets({"horizon": _OPENPI_HORIZON}, stats, tuple(assumptions))


def _choose(assets: Path, asset_id: str | None) -> str | None:
    found = sorted(
        path.parent.relative_to(assets).as_posix() for path in assets.rglob("norm_stats.json")
    )
    if asset_id is not None:
        if asset_id not in found:
            raise CheckpointError(
                f"{assets} has no norm_stats.json for asset_id {asset_id!r}; "
                f"it has {listing(found) or 'none'}"
            )
        return asset_id
    if len(found) > 1:
        raise CheckpointError(
            f"{assets} has statistics of several robots; pass asset_id=… of one of {listing(found)}"
        )
    return found[0] if found else None


def _read_stats(directory: Path) -> dict[str, Any]:
    path = directory / "norm_stats.json"
    data = member(read_json(path), "norm_stats", dict, path)
    return {
        name: feature_stats(member(data, key, dict, path), f"{path}: {key}")
        for name, key in (("state_stats", "state"), ("action_stats", "actions"))
    }
