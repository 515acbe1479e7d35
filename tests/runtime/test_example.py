"""The example robot runs, with a policy that stands in for nano."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from halfpi.model import Guidance
from halfpi.runtime import load_run
from halfpi.types import ActionChunk, Observation

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_robot.py"


class Upwards:
    horizon = 16

    def reset(self) -> None:
        pass

    def infer(
        self,
        observation: Observation,
        *,
        given: NDArray[np.float32] | None = None,
        guidance: Guidance | None = None,
    ) -> ActionChunk:
        assert set(observation.images) == {"scene", "wrist"}
        actions = np.tile(np.array([0, 0, 1, 0], np.float32), (16, 1))
        return ActionChunk(actions, actions)

    def rebase(
        self, normalized: NDArray[np.float32], was: Observation, now: Observation
    ) -> NDArray[np.float32]:
        return normalized


def test_the_plain_robot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("plain_robot", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "load_policy", lambda checkpoint: Upwards())
    run = tmp_path / "run.jsonl"
    example.main(run=str(run), seconds=0.25)
    summary = json.loads(capsys.readouterr().out)
    assert summary["ticks"] + summary["missed_ticks"] == 5
    assert summary["failed_calls"] == 0
    assert load_run(run)[0].summary() == summary
