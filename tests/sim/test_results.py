"""Summaries and tables of episodes whose figures are known."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from halfpi.sim.evaluate import Episode, EvalConfig
from halfpi.sim.results import (
    Setting,
    comparison_table,
    save_summaries,
    speed_table,
    success_table,
    summaries,
)
from halfpi.types import StageTimes


def episode(task: str, seed: int, success: bool, steps: int, vision_ms: float) -> Episode:
    times = tuple(StageTimes(1.0, vision_ms + extra, 3.0, 4.0) for extra in (0.0, 2.0))
    return Episode(task, f"do {task}", seed, success, steps, 0.1 * seed, times)


EPISODES = (
    episode("push", 1, True, 40, 10.0),
    episode("push", 2, False, 300, 12.0),
    episode("door-open", 1, True, 60, 20.0),
    episode("door-open", 2, True, 80, 22.0),
)
FIRST = Setting(EvalConfig(execute=4), EPISODES)
SECOND = Setting(
    EvalConfig(num_steps=2, execute=4),
    tuple(dataclasses.replace(e, success=e.seed == 2) for e in EPISODES),
)


def text_of(table: Table) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_summary_holds_the_figures_of_every_task() -> None:
    summary = FIRST.summary()
    assert json.loads(json.dumps(summary)) == json.loads(json.dumps(summary))
    assert summary["config"] == dataclasses.asdict(FIRST.config)
    assert summary["means"] == {"mean": 0.75, "mean, precise": 0.5}  # push alone is precise
    assert summary["median_ms"]["vision_ms"] == 17.0  # of 10 12 12 14 20 22 22 24
    assert summary["median_ms"]["total_ms"] == 25.0
    assert [*summary["tasks"]] == ["door-open", "push"]
    push = summary["tasks"]["push"]
    assert (push["successes"], push["episodes"], push["median_steps"]) == (1, 2, 40.0)
    assert push["action_error"] == pytest.approx(0.15)
    assert push["prompt"] == "do push"
    assert (summary["all"]["successes"], summary["all"]["episodes"]) == (3, 4)
    assert summary["all"]["interval"] == FIRST.success().interval
    assert push["interval"] == pytest.approx((0.0945, 0.9055), abs=1e-4)


def test_a_task_that_was_never_solved_has_no_steps() -> None:
    setting = Setting(EvalConfig(), (episode("door-open", 1, False, 300, 1.0),))
    summary = setting.summary()
    assert summary["tasks"]["door-open"]["median_steps"] is None
    assert [*summary["means"]] == ["mean"]
    for table in (success_table(setting), speed_table(setting)):
        assert "–" in text_of(table)
        assert "precise" not in text_of(table)


def test_settings_are_compared_episode_by_episode() -> None:
    paired = SECOND.against(FIRST)  # it lost both of seed 1 and won push 2
    assert (paired.only_first, paired.only_second, paired.pairs) == (2, 1, 4)
    other = Setting(EvalConfig(), EPISODES[:2])
    with pytest.raises(ValueError, match="the same episodes"):
        other.against(FIRST)


def test_summaries_compare_every_setting_to_the_first() -> None:
    first, second = summaries([FIRST, SECOND])
    assert first == FIRST.summary()
    paired = second.pop("against_first")
    assert second == SECOND.summary()
    assert (paired["only_first"], paired["only_second"], paired["pairs"]) == (2, 1, 4)
    assert paired["difference"] == -0.25
    assert paired["interval"] == SECOND.against(FIRST).interval


def test_tables_show_what_the_summary_says() -> None:
    text = text_of(success_table(FIRST))
    for cell in ("door-open", "2/2", "1/2", "0.150", "75.0 %", "50.0 %", "mean, precise"):
        assert cell in text
    # Four actions a call of 8 ms + 11 … 14 ms of vision: 4000 / 20 = 200 Hz on push.
    speed = text_of(speed_table(FIRST))
    (push,) = (line.split() for line in speed.splitlines() if line.split()[:1] == ["push"])
    assert push == ["push", "1/2", "40", "200", "1.0", "12.0", "3.0", "4.0", "20.0"]
    narrow = Setting(dataclasses.replace(SECOND.config, precision="fp8"), SECOND.episodes)
    comparison = text_of(comparison_table([FIRST, narrow]))
    assert "fp32" in comparison
    assert "fp8" in comparison
    assert "-25.0" in comparison
    assert "75.0 %" in comparison


def test_summaries_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    save_summaries([FIRST, SECOND], path)
    assert [entry["config"]["num_steps"] for entry in json.loads(path.read_text())] == [10, 2]
    assert os.listdir(path.parent) == ["results.json"]  # noqa: PTH208
