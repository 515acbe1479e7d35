"""Recordings: what they hold, how they are written and read, and what a label may contain."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from numpy.typing import NDArray
from tests.sim.conftest import SIZE

from halfpi.sim import record as recording
from halfpi.sim.environment import MAX_STEPS, MetaWorldEnvironment
from halfpi.sim.record import (
    EPISODES_PER_SHARD,
    FULFILLED_STEPS,
    HELD_OUT_SEED,
    BurstConfig,
    Frames,
    RecordConfig,
    burst_noise,
    load_recordings,
    record,
    record_episode,
    record_fulfilled,
)
from halfpi.sim.tasks import select

CONFIG = RecordConfig(SIZE, horizon=6, stride=8, bursts=BurstConfig(start_chance=1, chance=0.2))


def frames_of(count: int, seed: int = 0) -> Frames:
    generator = np.random.default_rng(seed)
    return Frames(
        images=generator.integers(0, 256, (count, 2, 8, 8, 3), np.uint8),
        states=generator.normal(size=(count, 4)).astype(np.float32),
        chunks=generator.uniform(-1, 1, (count, 6, 4)).astype(np.float32),
        full_states=generator.normal(size=(count, 39)).astype(np.float32),
        episodes=np.full(count, seed, np.int64),
    )


def assert_equal_frames(first: Frames, second: Frames) -> None:
    for field in dataclasses.fields(Frames):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert one.dtype == other.dtype
        assert_array_equal(one, other)


def test_burst_noise_follows_from_its_generator() -> None:
    first, again, other = (
        burst_noise(BurstConfig(), MAX_STEPS, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert str(first) == str(again)
    assert str(first) != str(other)


@pytest.mark.parametrize("steps", [1, 2, 17, MAX_STEPS])
def test_burst_noise_is_as_long_as_the_episode(steps: int) -> None:
    for seed in range(30):
        assert len(burst_noise(BurstConfig(), steps, np.random.default_rng(seed))) == steps


def test_without_chances_nothing_is_disturbed() -> None:
    config = BurstConfig(start_chance=0, chance=0)
    assert burst_noise(config, 50, np.random.default_rng(0)) == [None] * 50


def bursts(config: BurstConfig, seed: int) -> list[tuple[int, int, NDArray[np.float32]]]:
    """Start, length and push of every burst that ends before the episode does."""
    noise = burst_noise(config, MAX_STEPS, np.random.default_rng(seed))
    found: list[tuple[int, int, NDArray[np.float32]]] = []
    start = 0
    for step in range(1, MAX_STEPS):
        if noise[step] is not noise[start]:
            if (push := noise[start]) is not None:
                found.append((start, step - start, push))
            start = step
    return found


def test_a_burst_holds_one_push_for_its_length() -> None:
    config = BurstConfig(start_chance=0.5, start_steps=20, chance=0.05, steps=8)
    first: list[int] = []
    later: list[int] = []
    for seed in range(100):
        for start, length, push in bursts(config, seed):
            (later if start else first).append(length)
            assert push.dtype == np.float32
            assert np.abs(push[:3]).max() <= 1
            assert push[3] in (-1, 1)
    assert (min(first), max(first)) == (3, 20)
    assert (min(later), max(later)) == (3, 8)
    assert 30 < len(first) < 70


def test_only_bursts_on_the_way_flip_the_gripper() -> None:
    config = BurstConfig(start_chance=1, chance=0.1, flip_gripper_chance=0.5)
    flips = [(start, push[3]) for seed in range(50) for start, _, push in bursts(config, seed)]
    assert {sign for start, sign in flips if start == 0} == {1}
    later = [sign for start, sign in flips if start]
    assert 0.4 < np.mean(np.array(later) == -1) < 0.6


def test_labels_are_what_the_expert_would_do_from_there(environment: MetaWorldEnvironment) -> None:
    frames = record_episode(environment, 0, CONFIG)
    assert frames is not None
    actions = recording._solve(environment, 0, CONFIG.bursts)
    assert actions is not None
    environment.reset(0)
    disturbed = 0
    for step, action in enumerate(actions):
        row, rest = divmod(step, CONFIG.stride)
        if not rest:
            assert_array_equal(frames.full_states[row], environment.full_state.astype(np.float32))
            assert_array_equal(frames.states[row], environment.observe().state)
            assert_array_equal(frames.images[row, 0], environment.observe().images["scene"])
            assert_array_equal(frames.chunks[row], environment.expert_chunk(CONFIG.horizon))
            disturbed += bool((frames.chunks[row, 0] != action).any())
        environment.act(action)
    assert len(frames.states) == -(-len(actions) // CONFIG.stride)
    assert disturbed  # noise was played in some recorded frame, and the label has none of it
    assert set(frames.episodes) == {0}


def test_a_demonstration_that_fails_is_left_out(
    environment: MetaWorldEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MAX_STEPS", 3)
    assert record_episode(environment, 0, CONFIG) is None


def test_frames_survive_a_round_trip(tmp_path: Path) -> None:
    frames = frames_of(3)
    frames.save(tmp_path / "push-000000.npz")
    assert_equal_frames(Frames.load(tmp_path / "push-000000.npz"), frames)
    assert [path.name for path in tmp_path.iterdir()] == ["push-000000.npz"]


def test_a_write_that_fails_leaves_no_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: object, **arrays: object) -> None:
        raise OSError("disk full")

    path = tmp_path / "push-000000.npz"
    frames_of(2).save(path)
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        frames_of(3).save(path)
    assert path.read_bytes() == before
    assert [*tmp_path.glob("*.npz")] == [path]


def test_frames_are_concatenated_in_order() -> None:
    joined = Frames.concatenate([frames_of(2, seed=7), frames_of(3, seed=1)])
    assert joined.episodes.tolist() == [7, 7, 1, 1, 1]
    assert_array_equal(joined.images[2:], frames_of(3, seed=1).images)


def test_a_damaged_recording_is_named(tmp_path: Path) -> None:
    path = tmp_path / "push-000000.npz"
    frames_of(2).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"push-000000\.npz is not a recording by 'halfpi record'"):
        Frames.load(path)


@pytest.mark.parametrize("kind", ["text", "foreign", "pickled", "missing"])
def test_a_foreign_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.npz"
    if kind == "text":
        path.write_text("hello")
    if kind == "foreign":
        np.savez(path, images=np.zeros(3))
    if kind == "pickled":
        names = [field.name for field in dataclasses.fields(Frames)]
        arrays: dict[str, Any] = {name: np.array([{}], dtype=object) for name in names}
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"x\.npz is not a recording"):
        Frames.load(path)


def test_recordings_are_listed_by_task(tmp_path: Path) -> None:
    for name in ("push-000010", "door-open-000000", "push-000000"):
        frames_of(1).save(tmp_path / f"{name}.npz")
    listed = {task: [p.stem for p in shards] for task, shards in load_recordings(tmp_path).items()}
    assert listed == {"door-open": ["door-open-000000"], "push": ["push-000000", "push-000010"]}


def test_a_directory_without_recordings_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recordings"):
        load_recordings(tmp_path)


def test_a_recording_of_another_task_is_an_error(tmp_path: Path) -> None:
    frames_of(1).save(tmp_path / "juggle-000000.npz")
    with pytest.raises(ValueError, match=r"juggle-000000\.npz is of no known task"):
        load_recordings(tmp_path)


def test_recording_goes_on_where_it_stopped(
    environment: MetaWorldEnvironment, tmp_path: Path
) -> None:
    tasks = select(["handle-press"])
    config = dataclasses.replace(CONFIG, stride=50)
    ready = tmp_path / "handle-press-000000.npz"
    frames_of(1, seed=5).save(ready)
    before = ready.read_bytes()
    made = list(record(tasks, 2 * EPISODES_PER_SHARD, tmp_path, config, workers=1))
    assert [path.name for path, _, _ in made] == ["handle-press-000010.npz"]
    assert ready.read_bytes() == before
    path, solved, count = made[0]
    frames = Frames.load(path)
    assert len(frames.states) == count
    assert len(set(frames.episodes)) == solved
    assert set(frames.episodes) <= set(range(EPISODES_PER_SHARD, 2 * EPISODES_PER_SHARD))
    assert max(frames.episodes) < HELD_OUT_SEED
    assert frames.images.shape[1:] == (2, SIZE, SIZE, 3)
    assert frames.chunks.shape[1:] == (CONFIG.horizon, 4)
    assert [*record(tasks, 2 * EPISODES_PER_SHARD, tmp_path, config)] == []
    assert len([*tmp_path.iterdir()]) == 2


def test_what_is_done_already_is_recorded_as_keeping_still(
    environment: MetaWorldEnvironment,
) -> None:
    frames = record_fulfilled(environment, 3, CONFIG)
    assert len(frames.states) == FULFILLED_STEPS // CONFIG.stride
    assert (frames.chunks == np.array([0, 0, 0, -1], np.float32)).all()
    # The first burst, certain in this configuration, has moved the hand and then let it rest.
    assert np.abs(frames.states[1, :3] - frames.states[0, :3]).max() > 0.005
    again = record_fulfilled(environment, 3, CONFIG)
    np.testing.assert_array_equal(again.images, frames.images)


def test_a_scene_that_is_done_belongs_to_the_task_that_is_asked_for(
    environment: MetaWorldEnvironment, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, stride=100)
    made = record(select(["window-open"]), EPISODES_PER_SHARD, tmp_path, config, workers=1)
    names = sorted(path.name for path, _, _ in made)
    assert names == ["window-open-000000.npz", "window-open.fulfilled-000000.npz"]
    assert [*load_recordings(tmp_path)] == ["window-open"]
    assert len(load_recordings(tmp_path)["window-open"]) == 2
