"""`halfpi demo`, `eval`, `record` and `train`; episodes are stood in for by known outcomes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.commands.conftest import Halfpi, Mistake

from halfpi.commands import simulation
from halfpi.sim.evaluate import Episode, EvalConfig
from halfpi.sim.rendering import RenderingUnavailableError
from halfpi.sim.tasks import SHARED_SCENE, TASKS, Task
from halfpi.types import StageTimes

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[EvalConfig]:
    """The settings played. An episode succeeds if its seed is even or it has four steps a call."""
    configs: list[EvalConfig] = []

    def evaluate(
        tasks: list[Task],
        episodes: int,
        config: EvalConfig,
        prompts: dict[str, str],
        workers: int | None,
    ) -> Iterator[Episode]:
        configs.append(config)
        for seed in reversed(range(episodes)):
            for task in tasks:
                success = seed % 2 == 0 or config.num_steps == 4
                prompt = prompts.get(task.name, task.instruction)
                times = (StageTimes(1, 1, 1, 1),)
                yield Episode(task.name, prompt, seed, success, 10, 0.1, times)

    monkeypatch.setattr(simulation, "play_all", evaluate)
    return configs


def test_eval_prints_json_and_writes_it(
    halfpi: Halfpi, played: list[EvalConfig], tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "results.json"
    options = ("--episodes", 2, "--num-steps", 2, 4, "--execute", 8, "--output", path, "--json")
    halfpi("eval", "--tasks", "push", "door-open", *options)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(path.read_text())
    assert [entry["config"]["num_steps"] for entry in printed] == [2, 4]
    assert [entry["means"]["mean"] for entry in printed] == [0.5, 1.0]
    assert [*printed[0]["tasks"]] == ["door-open", "push"]
    assert played == [EvalConfig(num_steps=2), EvalConfig(num_steps=4)]


def test_eval_compares_precisions_on_the_same_episodes(
    halfpi: Halfpi, played: list[EvalConfig], capsys: Capture
) -> None:
    halfpi("eval", "--tasks", "push", "--episodes", 2, "--precision", "fp32", "fp8", "--json")
    first, second = json.loads(capsys.readouterr().out)
    assert played == [EvalConfig(precision="fp32"), EvalConfig(precision="fp8")]
    assert "against_first" not in first
    assert second["against_first"]["pairs"] == 2


def test_eval_runs_each_precision_by_its_backend(
    halfpi: Halfpi, played: list[EvalConfig], mistake: Mistake
) -> None:
    options = ("eval", "--tasks", "push", "--episodes", 1, "--precision", "fp32", "bf16", "fp8")
    halfpi(*options, "--backend", "eager", "compile", "triton")
    assert played == [
        EvalConfig(precision="fp32", backend="eager"),
        EvalConfig(precision="bf16", backend="compile"),
        EvalConfig(precision="fp8", backend="triton"),
    ]
    said = "--backend must be one for all or one for each of 3 precisions, got 2"
    assert said in mistake(*options, "--backend", "eager", "triton")


def test_eval_prints_tables(halfpi: Halfpi, played: list[EvalConfig], capsys: Capture) -> None:
    halfpi("eval", "--tasks", "push", "--episodes", 2, "--num-steps", 2, 4)
    text = capsys.readouterr().out
    assert "push" in text
    assert "paired by episode" in text
    assert "+50.0" in text


def test_a_wrong_instruction_is_that_of_the_other_task(
    halfpi: Halfpi, played: list[EvalConfig], capsys: Capture
) -> None:
    options = ("--wrong-instruction", "--episodes", 1, "--json")
    halfpi("eval", "--tasks", "push", "door-open", "faucet-close", *options)
    ((tasks),) = (entry["tasks"] for entry in json.loads(capsys.readouterr().out))
    assert {name: row["prompt"] for name, row in tasks.items()} == {
        name: TASKS[SHARED_SCENE[name]].instruction for name in ("door-open", "faucet-close")
    }


def test_a_wrong_instruction_needs_a_shared_scene(mistake: Mistake) -> None:
    message = mistake("eval", "--tasks", "push", "hammer", "--wrong-instruction")
    assert "no task that shares a scene" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--episodes", 0), "no episodes"),
        (("--num-steps", 0), "num_steps must be at least 1, got 0"),
        (("--execute", 0), "execute must be at least 1, got 0"),
    ],
)
def test_eval_refuses_to_play_nothing(
    mistake: Mistake, options: tuple[object, ...], said: str
) -> None:
    assert said in mistake("eval", "--tasks", "push", *options)


@pytest.mark.parametrize("command", [("eval",), ("demo",), ("record", "nowhere")])
def test_an_unknown_task_is_named(command: tuple[str, ...], mistake: Mistake) -> None:
    message = mistake(*command, "--tasks", "push", "juggle")
    assert message.startswith("halfpi: unknown task 'juggle'; expected all, precise or one of")


def test_demo_refuses_to_play_nothing(mistake: Mistake) -> None:
    assert "no episodes" in mistake("demo", "--episodes", 0)


def test_eval_without_rendering_names_the_package(
    mistake: Mistake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Iterator[Episode]:
        raise RenderingUnavailableError("no library")

    monkeypatch.setattr(simulation, "play_all", fail)
    assert "apt-get install libegl1" in mistake("eval", "--tasks", "push")


def test_train_needs_recordings(mistake: Mistake, tmp_path: Path) -> None:
    message = mistake("train", tmp_path, tmp_path / "output")
    assert f"no recordings (*.npz) in {tmp_path}" in message
    assert not (tmp_path / "output").exists()


def test_train_names_a_damaged_recording(mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "push-000000.npz").write_bytes(b"PK\x03\x04 not a zip")
    message = mistake("train", tmp_path, tmp_path / "output")
    assert "push-000000.npz is not a recording by 'halfpi record'" in message
