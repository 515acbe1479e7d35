"""Any JSON file with any one value replaced: it opens or is refused, and never fails otherwise."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from halfpi.checkpoints import CheckpointError, convert, open_checkpoint

STRANGE: tuple[Any, ...] = (None, True, 3, -1, 0.5, "x", [], {}, [None], {"x": 3}, 10**400)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below `node`."""
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in children:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from places(child, (*path, key))


def replace(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(data)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return changed


@pytest.fixture
def own(golden: Path, tmp_path: Path) -> Path:
    return convert(golden / "lerobot_tiny_ckpt", tmp_path / "own", vision_heads=4)


@pytest.fixture
def openpi(openpi_torch: Path, stats: Callable[[int, int], dict[str, Any]]) -> Path:
    (openpi_torch / "assets" / "droid").mkdir(parents=True)
    (openpi_torch / "assets" / "droid" / "norm_stats.json").write_text(json.dumps(stats(8, 8)))
    return openpi_torch


@pytest.mark.parametrize(
    ("fixture", "name", "options"),
    [
        ("lerobot", "config.json", {"vision_heads": 4}),
        ("lerobot", "policy_preprocessor.json", {"vision_heads": 4}),
        ("lerobot", "policy_postprocessor.json", {"vision_heads": 4}),
        ("openpi", "config.json", {"vision_heads": 4}),
        ("openpi", "assets/droid/norm_stats.json", {"vision_heads": 4}),
        ("own", "halfpi.json", {}),
    ],
)
def test_no_value_is_too_strange(
    request: pytest.FixtureRequest, fixture: str, name: str, options: dict[str, Any]
) -> None:
    root: Path = request.getfixturevalue(fixture)
    data = json.loads((root / name).read_text())
    rng = random.Random(0)
    refused = 0
    for path in places(data):
        for value in rng.sample(STRANGE, 3):
            (root / name).write_text(json.dumps(replace(data, path, value)))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    open_checkpoint(root, **options)
            except CheckpointError as error:
                refused += len(str(error)) > 0
            except Exception as error:
                raise AssertionError(f"{path} = {value!r}") from error
    assert refused > 0
