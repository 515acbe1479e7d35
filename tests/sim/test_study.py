from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from halfpi.policy import Policy, load_policy
from halfpi.sim import study
from halfpi.sim.environment import MAX_STEPS, MetaWorldEnvironment
from halfpi.sim.evaluate import EvalConfig, play_episode
from halfpi.sim.record import HELD_OUT_SEED
from halfpi.sim.rendering import RenderingUnavailableError
from halfpi.sim.study import Run, StudySetting
from halfpi.sim.study_report import markdown, write_report
from halfpi.sim.tasks import PRECISE, TASKS
from halfpi.types import ActionChunk, Observation, StageTimes

SEEDS = {"precise": 3, "all": 2}
SETTINGS = [StudySetting(), StudySetting("asynchronous", delay=4)]


class StubPolicy:
    """Chunks whose x is the number of the call, and whose gripper is closed."""

    horizon = 16

    def __init__(self, broken_call: int | None = None) -> None:
        self.broken_call = broken_call
        self.seed: int | None = None
        self.steps: list[int] = []
        self.given: list[int] = []

    def reseed(self, seed: int) -> None:
        self.seed = seed

    def reset(self) -> None:
        self.steps = []

    def rebase(self, normalized: NDArray[np.float32], *_: Observation) -> NDArray[np.float32]:
        return normalized

    def infer(
        self, observation: Observation, *, given: Any, guidance: Any, num_steps: int
    ) -> ActionChunk:
        if len(self.steps) == self.broken_call:
            raise ValueError("out of order")
        self.steps.append(num_steps)
        self.given.append(0 if given is None else len(given))
        actions = np.full((16, 4), len(self.steps), np.float32)
        actions[:, 3] = 1
        return ActionChunk(actions, actions, StageTimes(1.0, 0.5, 0.25, 0.25))


class StubEnvironment:
    """Solved by `needed` actions."""

    task = TASKS["push"]

    def __init__(self, needed: int = 10_000) -> None:
        self.needed = needed
        self.seed: int | None = None
        self.actions: list[NDArray[np.float32]] = []

    def reset(self, seed: int) -> None:
        self.seed = seed
        self.actions = []

    def observe(self) -> Observation:
        return Observation({}, np.zeros(4, np.float32), "push")

    def act(self, action: NDArray[np.float32]) -> bool:
        self.actions.append(action)
        return len(self.actions) >= self.needed


def play(policy: StubPolicy, environment: StubEnvironment, setting: StudySetting) -> study.Played:
    return study.play(cast("Policy", policy), cast("MetaWorldEnvironment", environment), 7, setting)


def test_a_delayed_chunk_leaves_the_hand_still_and_the_gripper_closed() -> None:
    policy, environment = StubPolicy(), StubEnvironment(needed=20)
    played = play(policy, environment, StudySetting(delay=4, num_steps=5))
    assert played.success
    assert (played.ticks, played.actions, played.held) == (24, 16, 4)  # and 4 ticks of waiting
    assert [action[0] for action in environment.actions] == [1] * 8 + [0] * 4 + [2] * 8
    assert {action[3] for action in environment.actions} == {1}
    assert policy.steps == [5, 5]
    assert (played.calls, played.call_ms) == (2, 4.0)
    assert policy.seed == environment.seed == 7


@pytest.mark.parametrize("scheduler", study.SCHEDULERS)
def test_every_scheduler_runs_at_every_delay(scheduler: str) -> None:
    for delay in (0, 1, 2, 4, 6):
        played = play(StubPolicy(), StubEnvironment(), StudySetting(scheduler, delay=delay))
        assert not played.success
        assert played.ticks == MAX_STEPS
        assert played.actions + played.held + delay == MAX_STEPS
        assert (played.held > 0) == (scheduler in ("synchronous", "receding") and delay > 0)


def test_schedulers_are_compared_at_the_same_number_of_calls() -> None:
    def actions_a_call(scheduler: str, delay: int) -> float:
        played = play(StubPolicy(), StubEnvironment(), StudySetting(scheduler, delay=delay))
        return played.actions / played.calls

    expected = actions_a_call("receding", 0)
    for scheduler in ("asynchronous", "guided", "trained"):
        assert actions_a_call(scheduler, 4) == pytest.approx(expected, rel=0.06)


def test_trained_is_given_as_many_actions_as_the_delay_uses_up() -> None:
    policy = StubPolicy()
    play(policy, StubEnvironment(), StudySetting("trained", delay=4))
    assert policy.given[:2] == [0, study.MAX_GIVEN]  # nothing planned; delay not known yet
    assert set(policy.given[2:]) == {4}


def test_a_call_that_fails_ends_the_study() -> None:
    with pytest.raises(RuntimeError, match=r"precise: receding, delay 0: .*out of order"):
        play(StubPolicy(broken_call=1), StubEnvironment(), StudySetting())


def test_without_delay_the_loop_plays_as_the_evaluation_does() -> None:
    if find_spec("metaworld") is None:  # importing it here would choose another OpenGL
        pytest.skip("needs the extra 'sim'")
    policy = load_policy("nano", device="cpu")
    try:
        environment = MetaWorldEnvironment(TASKS["drawer-close"], 112)
    except RenderingUnavailableError as error:
        pytest.skip(str(error))
    expected = play_episode(policy, environment, HELD_OUT_SEED, EvalConfig())
    played = study.play(policy, environment, HELD_OUT_SEED, StudySetting())
    reusing = study.play(policy, environment, HELD_OUT_SEED, StudySetting(camera_change=0.0))
    environment.close()
    assert (played.success, played.ticks) == (expected.success, expected.steps)
    assert played.success
    assert played.calls == len(expected.times)
    assert (reusing.success, reusing.ticks) == (expected.success, expected.steps)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The jobs that a study plays, here without a simulation: a job's outcome is its seed's."""
    seen: list[Any] = []

    def serially(
        play: Callable[[Any], Any], jobs: Sequence[Any], workers: int | None, run: int
    ) -> Iterator[Any]:
        return map(play, jobs)

    def record(job: Any) -> study.Played:
        seen.append(job)
        solved = job.seed != HELD_OUT_SEED + 1
        return study.Played(job.setting, job.task.name, job.seed, solved, 80, 78, 2, 10, 400.0)

    monkeypatch.setattr(study, "in_parallel", serially)
    monkeypatch.setattr(study, "_play", record)
    return seen


def test_a_finished_setting_is_one_line_with_all_its_outcomes(
    tmp_path: Path, jobs: list[Any]
) -> None:
    path = tmp_path / "results" / "study.jsonl"
    runs = list(study.run_study(SETTINGS, path, SEEDS))
    assert study.read_runs(path) == runs
    assert [run.setting for run in runs] == SETTINGS
    assert runs[0].outcomes == dict.fromkeys(sorted(PRECISE), "101")
    assert runs[0].solved["push", HELD_OUT_SEED + 1] is False
    assert (runs[0].ticks, runs[0].held, runs[0].calls) == (80 * 18, 2 * 18, 10 * 18)
    assert runs[0].effective_rate == pytest.approx(195.0)
    assert len(jobs) == len(SETTINGS) * len(PRECISE) * 3


def test_a_study_goes_on_where_it_stopped(tmp_path: Path, jobs: list[Any]) -> None:
    path = tmp_path / "study.jsonl"
    list(study.run_study(SETTINGS[:1], path, SEEDS))
    jobs.clear()
    assert [run.setting for run in study.run_study(SETTINGS, path, SEEDS)] == SETTINGS[1:]
    assert {job.setting for job in jobs} == {SETTINGS[1]}
    assert list(study.run_study(SETTINGS, path, SEEDS)) == []


def test_a_record_of_other_episodes_is_refused(tmp_path: Path, jobs: list[Any]) -> None:
    path = tmp_path / "study.jsonl"
    list(study.run_study(SETTINGS[:1], path, SEEDS))
    before = path.read_text()
    with pytest.raises(ValueError, match="write it to another file"):
        list(study.run_study(SETTINGS, path, {"precise": 4}))
    with pytest.raises(ValueError, match="of policy other"):
        list(study.run_study(SETTINGS, path, SEEDS, policy="other"))
    assert path.read_text() == before


def test_the_time_limit_drops_what_is_unfinished(tmp_path: Path, jobs: list[Any]) -> None:
    path = tmp_path / "study.jsonl"
    assert list(study.run_study(SETTINGS, path, SEEDS, minutes=0.0)) == []
    assert len(jobs) == 1
    assert not path.exists()


def test_a_line_that_is_no_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    write(path, [synthetic(StudySetting(), 9)])
    with path.open("a") as file:
        file.write('{"setting": {"scheduler"')
    with pytest.raises(ValueError, match=r"study\.jsonl:2 is not a run"):
        study.read_runs(path)


def test_the_settings_are_distinct_and_begin_with_the_baseline_and_delay_four() -> None:
    settings = study.standard_settings()
    assert len({setting.name for setting in settings}) == len(settings)
    assert settings[0] == settings[0].baseline
    assert {s.scheduler for s in settings[1:6]} > {"asynchronous", "guided", "trained"}
    assert {s.delay for s in settings[1:6]} == {4}
    for tasks in ("precise", "all"):
        crossed = {(s.scheduler, s.delay) for s in settings if s.tasks == tasks}
        assert crossed >= {(name, d) for name in study.SCHEDULERS for d in (0, 1, 2, 4, 6)}
        assert {s.num_steps for s in settings if s.tasks == tasks} == {10, 5, 3, 2, 1}


def synthetic(setting: StudySetting, solved: int, episodes: int = 100) -> Run:
    marks = "1" * solved + "0" * (episodes - solved)
    return Run(setting, "nano", {"push": marks}, 8000, 7800, 100, 1000, 50_000.0)


def write(path: Path, runs: Sequence[Run]) -> None:
    path.write_text("".join(json.dumps(dataclasses.asdict(run)) + "\n" for run in runs))


def test_the_report_compares_with_the_baseline_and_finds_the_cliff(tmp_path: Path) -> None:
    runs = [
        synthetic(StudySetting(), 96),
        synthetic(StudySetting("asynchronous", delay=2), 95),
        synthetic(StudySetting("asynchronous", delay=4), 60),
        synthetic(StudySetting("trained", delay=4), 95),
        dataclasses.replace(synthetic(StudySetting(num_steps=2), 94), call_ms=20_000.0),
        synthetic(StudySetting(camera_change=0.05), 90),
    ]
    record = tmp_path / "study.jsonl"
    write(record, runs)
    write_report(record, tmp_path / "docs")
    text = (tmp_path / "docs" / "study.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| asynchronous, delay 4 "))
    assert "60.0 % (60/100) | 50.2–69.1 % | -36.0 | -45.4 to -26.6 | 7.8 | 10.0 | 1.0 |" in row
    assert "| asynchronous | 2, 4 | 4 |" in text
    assert "| trained | 4 | none |" in text
    assert "Euler steps 2 | 94.0 % (94/100)" in text
    assert "| 390 | 2.50 |" in text
    assert text.index("### Reuse") < text.index("vision cache 0.05") < text.index("### Euler steps")
    assert (tmp_path / "docs" / "study.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "docs").iterdir()) == ["study.md", "study.png"]


def test_runs_of_different_episodes_are_not_compared() -> None:
    runs = [synthetic(StudySetting(), 9, 10), synthetic(StudySetting(num_steps=1), 9, 11)]
    with pytest.raises(ValueError, match="same episodes"):
        markdown(runs)


def test_there_is_no_report_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "study.jsonl").touch()
    with pytest.raises(ValueError, match="no runs to report"):
        write_report(tmp_path / "study.jsonl", tmp_path)
