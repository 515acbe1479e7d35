"""Success against rate: schedulers, reuse and Euler steps when inference is slow.

The control loop plays Meta-World under a virtual clock on which every call takes `delay` control
steps. All settings play the same held-out episodes, so any two can be compared in pairs. A setting
is one JSON line, appended when it is complete: a run that is killed loses the unfinished one only.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfpi.model import Guidance
from halfpi.policy import Policy
from halfpi.runtime import (
    AdaptiveHorizon,
    Asynchronous,
    ControlLoop,
    GuidedRtc,
    RecedingHorizon,
    ReuseConfig,
    ReusingPolicy,
    Scheduler,
    SynchronousChunk,
    TemporalEnsemble,
    TrainedRtc,
    VirtualClock,
)
from halfpi.sim.environment import MAX_STEPS, STEP_SECONDS, MetaWorldEnvironment
from halfpi.sim.evaluate import EvalConfig, in_parallel, worker_for
from halfpi.sim.record import HELD_OUT_SEED
from halfpi.sim.tasks import TASKS, Task, select
from halfpi.types import ActionChunk, Observation

# Nano was trained with at most so many actions given.
MAX_GIVEN = 6
# Episodes of one task in a row in one process: a new environment costs about as much as one.
RUN = 12

# From the horizon and how many actions of a chunk are executed. An asynchronous call begins when
# horizon − execute actions are left: at every delay up to that, each chunk is used for `execute`
# steps, as with a receding horizon, and the settings differ in the seams alone.
SCHEDULERS: dict[str, Callable[[int, int], Scheduler]] = {
    "synchronous": lambda _horizon, _execute: SynchronousChunk(),
    "receding": lambda _horizon, execute: RecedingHorizon(execute),
    "asynchronous": lambda horizon, execute: Asynchronous(horizon - execute),
    "ensemble": lambda _horizon, _execute: TemporalEnsemble(),
    "guided": lambda horizon, execute: GuidedRtc(horizon - execute),
    "trained": lambda horizon, execute: TrainedRtc(horizon - execute, MAX_GIVEN),
    "adaptive": lambda horizon, execute: AdaptiveHorizon(horizon - execute),
}


@dataclass(frozen=True)
class StudySetting:
    """One way to run the policy on one group of tasks.

    tasks: a name or group for `sim.tasks.select`. delay: of every call, in control steps. execute:
    actions of a chunk, where the scheduler has that choice. camera_change: threshold of the scene
    camera's cache, None without. prefix_calls: calls that share a prefix.
    """

    scheduler: str = "receding"
    tasks: str = "precise"
    delay: int = 0
    num_steps: int = 10
    execute: int = 8
    camera_change: float | None = None
    prefix_calls: int = 1

    @property
    def name(self) -> str:
        """What is not as in the baseline, in words."""
        parts = [f"{self.scheduler}, delay {self.delay}"]
        if self.num_steps != StudySetting.num_steps:
            parts.append(f"Euler steps {self.num_steps}")
        if self.execute != StudySetting.execute:
            parts.append(f"{self.execute} actions a call")
        if self.camera_change is not None:
            parts.append(f"vision cache {self.camera_change}")
        if self.prefix_calls > 1:
            parts.append(f"prefix for {self.prefix_calls} calls")
        return f"{self.tasks}: " + ", ".join(parts)

    @property
    def baseline(self) -> StudySetting:
        """What it is compared with: a receding horizon without delay or reuse."""
        return StudySetting(tasks=self.tasks)


@dataclass(frozen=True)
class Run:
    """A setting and what happened in all its episodes.

    outcomes: by task, a character for each seed from `HELD_OUT_SEED` on, "1" if solved. ticks:
    control steps until success or the limit; of them `actions` executed an action of the policy,
    `held` stopped the hand because none was due, the rest waited for the first chunk. call_ms: real
    inference time of all calls.
    """

    setting: StudySetting
    policy: str
    outcomes: Mapping[str, str]
    ticks: int
    actions: int
    held: int
    calls: int
    call_ms: float

    @property
    def solved(self) -> dict[tuple[str, int], bool]:
        """Success by task and seed."""
        return {
            (task, HELD_OUT_SEED + index): mark == "1"
            for task, marks in self.outcomes.items()
            for index, mark in enumerate(marks)
        }

    @property
    def effective_rate(self) -> float:
        """Control steps that the policy paid for in one second of its inference, in Hz."""
        return self.actions / self.call_ms * 1000


@dataclass(frozen=True)
class _Job:
    policy: str
    setting: StudySetting
    task: Task
    seed: int


@dataclass(frozen=True)
class Played:
    """One episode; numbers as in `Run`."""

    setting: StudySetting
    task: str
    seed: int
    success: bool
    ticks: int
    actions: int
    held: int
    calls: int
    call_ms: float


def standard_settings() -> list[StudySetting]:
    """Every setting of the study, the most telling first."""
    at_four = ("asynchronous", "trained", "guided", "receding", "synchronous")
    settings = [
        StudySetting(),
        *(StudySetting(name, delay=4) for name in at_four),
        StudySetting("synchronous"),
        *(StudySetting(num_steps=steps) for steps in (5, 3, 2, 1)),
        *(StudySetting(camera_change=change) for change in (0.02, 0.05, 0.1)),
        *(StudySetting(execute=4, prefix_calls=calls) for calls in (1, 2, 3)),
        # Fewer steps make the prefix a larger part of a call, which sharing it then saves.
        *(StudySetting(num_steps=5, execute=4, prefix_calls=calls) for calls in (1, 2, 3)),
        *(StudySetting(name, delay=6) for name in at_four),
        *(StudySetting(name, delay=4) for name in ("adaptive", "ensemble")),
        *(StudySetting(name, delay=2) for name in at_four),
    ]
    everywhere = [dataclasses.replace(setting, tasks="all") for setting in settings]
    rest = [
        StudySetting(name, tasks, delay)
        for tasks in ("precise", "all")
        for delay in (6, 2, 1, 0)
        for name in SCHEDULERS
    ]
    return list(dict.fromkeys([*settings, *everywhere, *rest]))


def play(
    policy: Policy, environment: MetaWorldEnvironment, seed: int, setting: StudySetting
) -> Played:
    """Play the episode of `seed`. Raises RuntimeError if a call of the policy fails."""
    policy.reseed(seed)
    robot = _Robot(environment, seed)
    metered = _MeteredPolicy(_with_reuse(policy, setting), setting.num_steps)
    rate_hz = 1 / STEP_SECONDS
    loop = ControlLoop(
        metered,
        robot,
        rate_hz,
        SCHEDULERS[setting.scheduler](policy.horizon, setting.execute),
        clock=VirtualClock(repeat(setting.delay / rate_hz)),
        hold=stop_hand,
    )
    report = loop.run(MAX_STEPS)
    for call in report.calls:
        if call.error is not None:
            raise RuntimeError(f"{setting.name}: a call failed: {call.error}")
    return Played(
        setting,
        environment.task.name,
        seed,
        robot.success,
        report.ticks,
        len(report.ages_ms),
        report.held_ticks,
        len(metered.calls_ms),
        sum(metered.calls_ms),
    )


def stop_hand(action: NDArray[np.float32]) -> NDArray[np.float32]:
    """Hold: no displacement, and the gripper as it was."""
    return np.concatenate([np.zeros_like(action[:3]), action[3:]])


def run_study(
    settings: Sequence[StudySetting],
    path: Path,
    seeds: Mapping[str, int],
    *,
    policy: str = "nano",
    workers: int | None = None,
    minutes: float | None = None,
) -> Iterator[Run]:
    """Play `settings` that `path` does not have yet, append each there, and yield it.

    seeds: episodes a task, by group of tasks. minutes: when to stop, dropping unfinished settings.

    Raises ValueError if `path` has a setting with another number of episodes or another policy.
    """
    began = time.monotonic()
    done = {run.setting: run for run in read_runs(path)} if path.exists() else {}
    jobs = []
    for setting in settings:
        expected = {task.name: seeds[setting.tasks] for task in select([setting.tasks])}
        if setting in done:
            _require_same(done[setting], policy, expected, path)
            continue
        jobs += [
            _Job(policy, setting, TASKS[task], HELD_OUT_SEED + index)
            for task, count in expected.items()
            for index in range(count)
        ]
    if not jobs:
        return
    missing: dict[StudySetting, int] = defaultdict(int)
    for job in jobs:
        missing[job.setting] += 1
    collected: dict[StudySetting, list[Played]] = defaultdict(list)
    # One stream over all settings: no core waits for the slowest episode of each.
    for played in in_parallel(_play, jobs, workers, RUN):
        collected[played.setting].append(played)
        if len(collected[played.setting]) == missing[played.setting]:
            run = _summed(played.setting, policy, collected.pop(played.setting))
            _append(run, path)
            yield run
        if minutes is not None and time.monotonic() - began > minutes * 60:
            return


def read_runs(path: Path) -> list[Run]:
    """The runs in the JSON lines `path`. Raises ValueError naming a line that is not one."""
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            runs.append(Run(**{**fields, "setting": StudySetting(**fields["setting"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number} is not a run of the study: {error}") from error
    return runs


class _Robot:
    """One episode of `environment`."""

    def __init__(self, environment: MetaWorldEnvironment, seed: int) -> None:
        self.success = False
        self._environment = environment
        self._seed = seed

    def reset(self) -> None:
        self._environment.reset(self._seed)

    def observe(self) -> Observation:
        return self._environment.observe()

    def act(self, action: NDArray[np.float32]) -> bool:
        self.success = self._environment.act(action)
        return self.success


class _MeteredPolicy:
    """`policy` with `num_steps` Euler steps; keeps how long its calls really took."""

    def __init__(self, policy: Policy | ReusingPolicy, num_steps: int) -> None:
        self.horizon = policy.horizon
        self.reset = policy.reset
        self.rebase = policy.rebase
        self.calls_ms: list[float] = []
        self._policy = policy
        self._num_steps = num_steps

    def infer(
        self,
        observation: Observation,
        *,
        given: NDArray[np.float32] | None = None,
        guidance: Guidance | None = None,
    ) -> ActionChunk:
        chunk = self._policy.infer(
            observation, given=given, guidance=guidance, num_steps=self._num_steps
        )
        self.calls_ms.append(chunk.times.total_ms)
        return chunk


def _with_reuse(policy: Policy, setting: StudySetting) -> Policy | ReusingPolicy:
    config = ReuseConfig(
        setting.camera_change, always_encode=("wrist",), prefix_calls=setting.prefix_calls
    )
    off = setting.camera_change is None and setting.prefix_calls == 1
    return policy if off else ReusingPolicy(policy, config)


def _play(job: _Job) -> Played:
    worker = worker_for(EvalConfig(job.policy))
    return play(worker.policy, worker.prepare(job.task), job.seed, job.setting)


def _summed(setting: StudySetting, policy: str, episodes: list[Played]) -> Run:
    outcomes: dict[str, str] = defaultdict(str)
    for episode in sorted(episodes, key=lambda episode: (episode.task, episode.seed)):
        outcomes[episode.task] += str(int(episode.success))
    totals: dict[str, Any] = {
        name: sum(getattr(episode, name) for episode in episodes)
        for name in ("ticks", "actions", "held", "calls", "call_ms")
    }
    return Run(setting, policy, dict(outcomes), **totals)


def _append(run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(run)) + "\n")


def _require_same(run: Run, policy: str, expected: Mapping[str, int], path: Path) -> None:
    played = {task: len(marks) for task, marks in run.outcomes.items()}
    if run.policy != policy or played != expected:
        raise ValueError(
            f"{path} has {run.setting.name!r} of policy {run.policy} with episodes {played}, this "
            f"study is of policy {policy} with {dict(expected)}: write it to another file"
        )
