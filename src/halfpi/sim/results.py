"""What an evaluation found: summaries, tables for people, and JSON for machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from halfpi.files import atomic_write
from halfpi.sim.evaluate import Episode, EvalConfig
from halfpi.sim.statistics import PairedDifference, Proportion
from halfpi.sim.tasks import PRECISE
from halfpi.types import StageTimes

STAGES = tuple(field.name for field in dataclasses.fields(StageTimes))


@dataclass(frozen=True)
class Setting:
    """One setting and all its episodes."""

    config: EvalConfig
    episodes: tuple[Episode, ...]

    @property
    def tasks(self) -> list[str]:
        """The tasks played, sorted by name."""
        return sorted({episode.task for episode in self.episodes})

    def success(self, tasks: Sequence[str] | None = None) -> Proportion:
        """The success rate over the episodes of `tasks`, or of all."""
        return Proportion.of(e.success for e in self.episodes if tasks is None or e.task in tasks)

    def mean_success(self, tasks: Sequence[str]) -> float:
        """The mean over `tasks` of their success rates."""
        return float(np.mean([self.success([task]).rate for task in tasks]))

    def against(self, other: Setting) -> PairedDifference:
        """How much better this setting is than `other` on the same episodes."""
        first, second = ({(e.task, e.seed): e.success for e in s.episodes} for s in (other, self))
        return PairedDifference.of(first, second)

    def median_ms(self, stage: str, tasks: Sequence[str] | None = None) -> float:
        """The median over calls of a stage ("vision_ms", …) or "total_ms"."""
        times = [t for e in self.episodes if tasks is None or e.task in tasks for t in e.times]
        return float(np.median([getattr(t, stage) for t in times]))

    def summary(self) -> dict[str, Any]:
        """JSON-ready figures."""
        return {
            "config": dataclasses.asdict(self.config),
            "means": {name: self.mean_success(tasks) for name, tasks in _groups(self).items()},
            "median_ms": {stage: self.median_ms(stage) for stage in (*STAGES, "total_ms")},
            "all": self._success_summary(self.tasks),
            "tasks": {task: self._task_summary(task) for task in self.tasks},
        }

    def _success_summary(self, tasks: Sequence[str]) -> dict[str, Any]:
        success = self.success(tasks)
        return {
            "successes": success.successes,
            "episodes": success.trials,
            "interval": success.interval,
        }

    def _task_summary(self, task: str) -> dict[str, Any]:
        episodes = [episode for episode in self.episodes if episode.task == task]
        solved = [episode.steps for episode in episodes if episode.success]
        return {
            "prompt": episodes[0].prompt,
            **self._success_summary([task]),
            "median_steps": float(np.median(solved)) if solved else None,
            "action_error": float(np.mean([episode.action_error for episode in episodes])),
        }


def success_table(setting: Setting) -> Table:
    """Task by task: success with its interval, steps to it, and the error of the first chunk."""
    table = _table(setting, ("success", "95 %", "steps", "action error"))
    for task, row in setting.summary()["tasks"].items():
        solved = f"{row['successes']}/{row['episodes']}"
        steps, error = _steps(row), f"{row['action_error']:.3f}"
        table.add_row(task, solved, _interval(row["interval"]), steps, error)
    table.add_section()
    for name, tasks in _groups(setting).items():
        mean, interval = setting.mean_success(tasks), setting.success(tasks).interval
        table.add_row(name, f"{100 * mean:.1f} %", _interval(interval))
    return table


def speed_table(setting: Setting) -> Table:
    """Task by task: success, steps, control rate, and median milliseconds of each stage."""
    stages = (*STAGES, "total_ms")
    names = (stage.removesuffix("_ms").replace("processing", "i/o") for stage in stages)
    table = _table(setting, ("solved", "steps", "Hz", *names))
    table.caption = (
        "ms a call (i/o: processing of inputs and actions); Hz: actions a second of calls"
    )
    steps = {task: _steps(row) for task, row in setting.summary()["tasks"].items()}
    groups = {task: [task] for task in setting.tasks} | {"all": setting.tasks}
    for name, tasks in groups.items():
        if name == "all":
            table.add_section()
        success = setting.success(tasks)
        rate = setting.config.execute * 1000 / setting.median_ms("total_ms", tasks)
        table.add_row(
            name,
            f"{success.successes}/{success.trials}",
            steps[tasks[0]] if len(tasks) == 1 else "",
            f"{rate:.0f}",
            *(f"{setting.median_ms(stage, tasks):.1f}" for stage in stages),
        )
    return table


def _table(setting: Setting, columns: Sequence[str]) -> Table:
    config = setting.config
    title = f"{config.policy}, {config.num_steps} Euler steps, {config.execute} actions a call"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column("task", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _groups(setting: Setting) -> dict[str, list[str]]:
    groups = {"mean": setting.tasks}
    precise = [task for task in setting.tasks if task in PRECISE]
    return {**groups, "mean, precise": precise} if precise else groups


def _steps(row: Mapping[str, Any]) -> str:
    return "–" if row["median_steps"] is None else f"{row['median_steps']:.0f}"


def comparison_table(settings: Sequence[Setting]) -> Table:
    """Every setting's success, and its paired difference to the first."""
    table = Table(title="settings, paired by episode")
    what = ("precision", "backend", "steps", "actions a call")
    for name in (*what, "success", "95 %", "difference", "95 %", "call ms"):
        table.add_column(name, justify="right")
    for setting in settings:
        success, paired = setting.success(), setting.against(settings[0])
        low, high = paired.interval
        table.add_row(
            setting.config.precision,
            setting.config.backend,
            str(setting.config.num_steps),
            str(setting.config.execute),
            f"{100 * success.rate:.1f} %",
            _interval(success.interval),
            "–" if setting is settings[0] else f"{100 * paired.difference:+.1f}",
            "–" if setting is settings[0] else f"{100 * low:+.1f} to {100 * high:+.1f}",
            f"{setting.median_ms('total_ms'):.1f}",
        )
    return table


def summaries(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """JSON-ready figures of each setting, behind the first with the paired difference to it."""
    first, *others = settings
    paired = [
        {**setting.summary(), "against_first": _difference(setting.against(first))}
        for setting in others
    ]
    return [first.summary(), *paired]


def _difference(paired: PairedDifference) -> dict[str, Any]:
    return {
        **dataclasses.asdict(paired),
        "difference": paired.difference,
        "interval": paired.interval,
    }


def save_summaries(settings: Sequence[Setting], path: Path) -> None:
    """Write `summaries` as JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(summaries(settings), indent=1)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n")


def _interval(bounds: tuple[float, float]) -> str:
    return f"{100 * bounds[0]:.0f}–{100 * bounds[1]:.0f} %"
