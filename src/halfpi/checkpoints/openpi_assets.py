"""What lies beside openpi's weights: statistics, and what their asset id tells about the robot.

openpi keeps the robot, the horizon and the prompt's form in its code, by the name of a training
config, and not in the checkpoint. The asset id under which the statistics are stored identifies the
released configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfpi.checkpoints.contents import Assumption
from halfpi.checkpoints.errors import CheckpointError, listing
from halfpi.checkpoints.json_files import member, read_json
from halfpi.checkpoints.stats import feature_stats, length
from halfpi.config import FeatureStats, RobotName


@dataclass(frozen=True)
class Assets:
    """What the assets state of `Pi05Config` and of `ProcessingConfig`, and what they leave open."""

    stated: Mapping[str, int | float]
    processing: Mapping[str, Any]
    assumptions: tuple[Assumption, ...]


@dataclass(frozen=True)
class _Robot:
    """A released config of openpi training/config.py, and the sizes in its policies/*_policy.py."""

    robot: RobotName
    horizon: int
    state_dim: int
    action_dim: int
    state_in_prompt: bool = True
    delta_mask: tuple[bool, ...] | None = field(default=None)


_ROBOTS: Mapping[str, _Robot] = {
    # pi05_libero: discrete_state_input=False, extra_delta_transform=False
    "physical-intelligence/libero": _Robot("libero", 10, 8, 7, state_in_prompt=False),
    # pi05_droid: joint velocities, so no delta transform
    "droid": _Robot("droid", 15, 8, 8),
    # pi05_aloha: deltas by make_bool_mask(6, -1, 6, -1)
    "trossen": _Robot("aloha", 50, 14, 14, delta_mask=((True,) * 6 + (False,)) * 2),
}
_OPENPI_HORIZON = 50  # action_horizon of openpi pi0_config.py


def read_assets(root: Path, asset_id: str | None) -> Assets:
    """The assets of the checkpoint at `root`; without norm_stats.json there are no statistics.

    Raises CheckpointError when `asset_id` is not among the assets, when there are several and none
    was chosen, and when norm_stats.json is not what openpi shared/normalize.py writes.
    """
    chosen = _choose(root / "assets", asset_id)
    stats = _read_stats(root / "assets" / chosen) if chosen is not None else {}
    robot = _ROBOTS.get(chosen or "")
    if robot is not None:
        _check_lengths(root / "assets" / str(chosen), stats, robot)
        processing: dict[str, Any] = {
            "robot": robot.robot,
            "robot_action_dim": robot.action_dim,
            "state_in_prompt": robot.state_in_prompt,
            "delta_mask": robot.delta_mask,
        }
        return Assets({"horizon": robot.horizon}, {**stats, **processing}, ())
    assumptions = [
        Assumption(
            f"openpi checkpoints do not store the action horizon; assuming {_OPENPI_HORIZON}, "
            "pass horizon=… if it was trained with another",
            frozenset({"horizon"}),
        )
    ]
    if chosen is not None:
        stats["robot_action_dim"] = length(stats["action_stats"])
        assumptions.append(
            Assumption(
                f"asset id {chosen!r} is of no robot that halfpi knows; assuming absolute actions "
                "and the state in the prompt; pass processing_overrides with robot, delta_mask or "
                "state_in_prompt if it was trained otherwise",
                frozenset({"robot", "delta_mask", "state_in_prompt"}),
            )
        )
    return Assets({}, stats, tuple(assumptions))


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
        name: feature_stats(member(data, key, dict, path), f"{path}: {key}", "quantile")
        for name, key in (("state_stats", "state"), ("action_stats", "actions"))
    }


def _check_lengths(directory: Path, stats: Mapping[str, FeatureStats], robot: _Robot) -> None:
    for name, at_least in (("state_stats", robot.state_dim), ("action_stats", robot.action_dim)):
        found = length(stats[name]) or 0
        if found < at_least:
            raise CheckpointError(
                f"{directory}: {name} have length {found}, {robot.robot} has {at_least} dimensions"
            )
