"""`halfpi demo` and `halfpi eval`."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from halfpi.commands.console import notes, output, print_json, track
from halfpi.policy import Policy, load_policy
from halfpi.runtime.rerun_log import RerunLog
from halfpi.sim import demo as sim_demo
from halfpi.sim.evaluate import Episode, EvalConfig
from halfpi.sim.evaluate import evaluate as play_all
from halfpi.sim.rendering import RenderingUnavailableError
from halfpi.sim.results import (
    Setting,
    comparison_table,
    save_summaries,
    speed_table,
    success_table,
    summaries,
)
from halfpi.sim.tasks import SHARED_SCENE, TASKS, select

if TYPE_CHECKING:
    from halfpi.cli import Demo, Eval
    from halfpi.config import Backend, Precision


def demo(options: Demo) -> None:
    """Play the demo in simulation, or on recorded frames where nothing can be rendered."""
    tasks = select(options.tasks)
    if not tasks or options.episodes < 1:
        raise ValueError("nothing to play: no task, or no episodes")
    policy = load_policy(
        options.policy,
        num_steps=options.num_steps,
        precision=options.precision,
        backend=options.backend,
    )
    config = EvalConfig(
        options.policy,
        options.num_steps,
        options.execute,
        precision=options.precision,
        backend=options.backend,
    )
    notes.print(f"{options.policy} on {policy.engine.device}, {options.num_steps} steps a call")
    try:
        with ExitStack() as stack:
            log = None if options.rerun is None else stack.enter_context(RerunLog(options.rerun))
            played = sim_demo.play(policy, tasks, options.episodes, config, options.output, log)
            results = list(track(played, "episodes", len(tasks) * options.episodes))
    except RenderingUnavailableError as error:
        notes.print(f"[yellow]{error}.[/] Running on recorded frames instead, without simulation.")
        _demo_on_frames(policy, options.json)
        return
    setting = Setting(config, tuple(episode for episode, _ in results))
    if options.json:
        print_json({**setting.summary(), "sheets": [str(sheet) for _, sheet in results]})
        return
    output.print(speed_table(setting))
    output.print(f"What the cameras saw: {options.output}/*.png")


def _demo_on_frames(policy: Policy, as_json: bool) -> None:
    results = list(sim_demo.play_frames(policy))
    if as_json:
        print_json({"recorded_frames": [dataclasses.asdict(result) for result in results]})
        return
    table = Table(title="recorded frames: one call each, against the scripted expert")
    for name in ("task", "action error", "call ms"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for result in results:
        row = f"{result.action_error:.3f}", f"{result.times.total_ms:.1f}"
        table.add_row(result.task, *row)
    error = np.mean([result.action_error for result in results])
    table.add_section()
    table.add_row("mean", f"{error:.3f}", f"{np.median([r.times.total_ms for r in results]):.1f}")
    output.print(table)


def evaluate(options: Eval) -> None:
    """Play every setting on the same episodes, and compare them."""
    tasks, prompts = select(options.tasks), dict[str, str]()
    if options.wrong_instruction:
        tasks = [task for task in tasks if task.name in SHARED_SCENE]
        prompts = {task.name: TASKS[SHARED_SCENE[task.name]].instruction for task in tasks}
    if not tasks or options.episodes < 1:
        raise ValueError("nothing to evaluate: no task that shares a scene, or no episodes")
    settings = []
    choices = itertools.product(_arithmetic(options), options.num_steps, options.execute)
    for (precision, backend), num_steps, execute in choices:
        config = EvalConfig(
            options.policy, num_steps, execute, precision=precision, backend=backend
        )
        played = play_all(tasks, options.episodes, config, prompts, options.workers)
        name = f"{precision}, {backend}, {num_steps} steps, {execute} actions a call"
        episodes = track(played, name, len(tasks) * options.episodes)
        settings.append(Setting(config, _sorted(episodes)))
    _report(settings, options.json, options.output)


def _arithmetic(options: Eval) -> list[tuple[Precision, Backend]]:
    """Every precision, with what computes it."""
    precisions, backends = options.precision, options.backend
    if len(backends) == 1:
        backends *= len(precisions)
    if len(backends) != len(precisions):
        raise ValueError(
            f"--backend must be one for all or one for each of {len(precisions)} precisions, "
            f"got {len(backends)}"
        )
    return list(zip(precisions, backends, strict=True))


def _sorted(episodes: Any) -> tuple[Episode, ...]:
    return tuple(sorted(episodes, key=lambda episode: (episode.task, episode.seed)))


def _report(settings: list[Setting], as_json: bool, path: Path | None) -> None:
    if path is not None:
        save_summaries(settings, path)
    if as_json:
        print_json(summaries(settings))
        return
    for setting in settings:
        output.print(success_table(setting))
    if len(settings) > 1:
        output.print(comparison_table(settings))
