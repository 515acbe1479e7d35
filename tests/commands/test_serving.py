"""`halfpi serve`, but for the serving: what its options make of the server's answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.commands.conftest import Halfpi

from halfpi.commands import serving
from halfpi.integrations.openpi import Answer
from halfpi.types import ActionChunk, Observation, StageTimes


@pytest.mark.parametrize("recorded", [False, True])
def test_a_recording_keeps_robots_apart(
    recorded: bool, halfpi: Halfpi, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chunks = pytest.importorskip("rerun.chunk")
    actions = np.zeros((3, 2), np.float32)
    observation = Observation({"base": np.zeros((8, 8, 3), np.uint8)}, np.zeros(2, np.float32))
    answer = Answer({}, observation, ActionChunk(actions, actions, StageTimes(1, 2, 3, 4)), 12.0)

    def run_server(factory: Any, config: Any, watch: Any) -> None:
        assert (watch is not None) is recorded
        assert config.max_batch == 3
        for robot in (1, 2, 2) if recorded else ():
            watch(robot, answer)

    monkeypatch.setattr(serving, "run_server", run_server)
    path = tmp_path / "robots.rrd"
    halfpi("serve", "nano", "--max-batch", 3, *(("--rerun", path) if recorded else ()))
    assert path.exists() is recorded
    if recorded:
        rows = Counter[str]()
        for chunk in chunks.RrdReader(path).stream():
            rows[chunk.entity_path] += chunk.num_rows
        assert [rows[f"/robot/{robot}/camera/base"] for robot in (1, 2)] == [1, 2]
        assert [rows[f"/robot/{robot}/stage/denoise_ms"] for robot in (1, 2)] == [1, 2]
