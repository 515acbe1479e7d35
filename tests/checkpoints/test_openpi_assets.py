"""What openpi keeps beside its weights, and what its asset ids tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfpi.checkpoints import Checkpoint, CheckpointError, load_model, open_checkpoint

Stats = Callable[[int, int], dict[str, Any]]


def add(root: Path, asset_id: str, stats: dict[str, Any]) -> None:
    directory = root / "assets" / asset_id
    directory.mkdir(parents=True)
    (directory / "norm_stats.json").write_text(json.dumps(stats))


def opened(root: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(root, **{"vision_heads": 4, **options})


def test_without_assets_there_are_no_statistics(openpi_torch: Path) -> None:
    processing = opened(openpi_torch).processing
    assert processing.state_stats is None
    assert processing.action_stats is None
    assert processing.robot_action_dim == 32
    assert (processing.norm_rule, processing.resize) == ("openpi", "pil")


@pytest.mark.parametrize(
    ("asset_id", "sizes", "expected"),
    [
        ("physical-intelligence/libero", (8, 7), ("libero", 7, False, None, 10)),
        ("physical-intelligence/libero", (32, 32), ("libero", 7, False, None, 10)),
        ("droid", (8, 8), ("droid", 8, True, None, 15)),
        ("trossen", (14, 14), ("aloha", 14, True, (*[True] * 6, False) * 2, 50)),
    ],
)
def test_asset_ids_of_released_checkpoints(
    openpi_torch: Path,
    stats: Stats,
    asset_id: str,
    sizes: tuple[int, int],
    expected: tuple[object, ...],
) -> None:
    (openpi_torch / "config.json").unlink()
    written = stats(*sizes)
    add(openpi_torch, asset_id, written)
    checkpoint = opened(openpi_torch)
    processing = checkpoint.processing
    assert (
        processing.robot,
        processing.robot_action_dim,
        processing.state_in_prompt,
        processing.delta_mask,
        checkpoint.config.horizon,
    ) == expected
    assert (processing.state_norm, processing.norm_rule) == ("quantile", "openpi")
    for feature, name in ((processing.state_stats, "state"), (processing.action_stats, "actions")):
        assert feature is not None
        assert feature.q01 == tuple(written["norm_stats"][name]["q01"])
        assert feature.std == tuple(written["norm_stats"][name]["std"])


def test_config_json_wins_over_the_asset_id(openpi_torch: Path, stats: Stats) -> None:
    add(openpi_torch, "droid", stats(8, 8))
    assert opened(openpi_torch).config.horizon == 10


def test_assets_lie_beside_the_parameters(golden: Path, tmp_path: Path, stats: Stats) -> None:
    (tmp_path / "params").symlink_to(golden / "openpi_tiny_orbax_pure" / "params")
    add(tmp_path, "droid", stats(8, 8))
    assert open_checkpoint(tmp_path).processing.robot == "droid"
    assert open_checkpoint(tmp_path / "params").processing.robot == "droid"


def test_a_model_alone_needs_no_horizon(golden: Path) -> None:
    # Warnings are errors here.
    model = load_model(golden / "openpi_tiny_orbax_pure")
    assert model.config.action_dim == 32


def test_an_unknown_horizon_is_assumed_aloud(golden: Path) -> None:
    with pytest.warns(UserWarning, match=r"assuming 50, pass horizon=…"):
        checkpoint = open_checkpoint(golden / "openpi_tiny_orbax_pure")
    assert checkpoint.config.horizon == 50
    assert "assuming 50" in checkpoint.describe().assumptions[0]
    assert open_checkpoint(golden / "openpi_tiny_orbax_pure", horizon=50).assumptions == ()


def test_an_unknown_robot_is_assumed_aloud(openpi_torch: Path, stats: Stats) -> None:
    add(openpi_torch, "me/my_dataset", stats(6, 5))
    with pytest.warns(UserWarning, match="asset id 'me/my_dataset' is of no robot"):
        processing = opened(openpi_torch).processing
    assert (processing.robot, processing.robot_action_dim) == ("none", 5)
    mask = (True, True, False)
    processing = opened(openpi_torch, processing_overrides={"delta_mask": mask}).processing
    assert processing.delta_mask == mask


def test_several_assets_need_a_choice(openpi_torch: Path, stats: Stats) -> None:
    add(openpi_torch, "droid", stats(8, 8))
    add(openpi_torch, "trossen", stats(14, 14))
    with pytest.raises(CheckpointError, match="several robots; pass asset_id=… of one of droid, t"):
        opened(openpi_torch)
    with pytest.raises(
        CheckpointError, match=r"no norm_stats\.json for asset_id 'ur5'; it has droi"
    ):
        opened(openpi_torch, asset_id="ur5")
    assert opened(openpi_torch, asset_id="trossen").processing.robot == "aloha"
    assert load_model(openpi_torch, asset_id="trossen", vision_heads=4).config.horizon == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("norm_stats"),
            "norm_stats.json: 'norm_stats' must be of type dict, got n",
        ),
        (lambda s: s["norm_stats"].pop("actions"), "norm_stats.json: 'actions' must be of type"),
        (
            lambda s: s["norm_stats"]["state"].pop("q99"),
            "state normalisation needs the statistic q",
        ),
        (lambda s: s["norm_stats"].update(actions={}), "action normalisation needs the statistic"),
        (
            lambda s: s["norm_stats"]["state"]["q99"].pop(),
            "norm_stats.json: state has statistics of unequal lengths",
        ),
        (
            lambda s: s["norm_stats"]["actions"].update(q01=[float("nan")] * 8),
            "norm_stats.json: actions.q01 must be finite",
        ),
        (
            lambda s: s["norm_stats"]["actions"].update(q01=["a"] * 8),
            "norm_stats.json: actions.q01 must be finite numbers, got .'a'",
        ),
        (lambda s: s["norm_stats"]["actions"].update(q01=3), "actions.q01 must be a list of numb"),
        (
            lambda s: [values.pop() for values in s["norm_stats"]["actions"].values()],
            "action_stats have length 7, the robot has 8",
        ),
        (
            lambda s: [values.pop() for values in s["norm_stats"]["state"].values()],
            "state_stats have length 7, the robot has 8",
        ),
    ],
)
def test_broken_statistics_are_named(
    openpi_torch: Path, stats: Stats, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    broken = stats(8, 8)
    change(broken)
    add(openpi_torch, "droid", broken)
    with pytest.raises(CheckpointError, match=message):
        opened(openpi_torch)


def test_statistics_longer_than_the_actions(openpi_torch: Path, stats: Stats) -> None:
    add(openpi_torch, "mine", stats(33, 33))
    with pytest.raises(CheckpointError, match=r"robot_action_dim must be in \[1, 32\], got 33"):
        opened(openpi_torch)


def test_broken_json(openpi_torch: Path, stats: Stats) -> None:
    add(openpi_torch, "droid", stats(8, 8))
    (openpi_torch / "assets" / "droid" / "norm_stats.json").write_text('{"norm_stats": {')
    with pytest.raises(CheckpointError, match=r"norm_stats\.json is not readable JSON"):
        opened(openpi_torch)
    (openpi_torch / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"config\.json is not readable JSON"):
        opened(openpi_torch)
