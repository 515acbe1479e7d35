"""The demo in simulation, and on recorded frames where nothing can be rendered."""

from __future__ import annotations

import ctypes.util
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from halfpi import cli
from halfpi.policy import Policy, load_policy
from halfpi.runtime import RerunLog
from halfpi.sim import demo, environment
from halfpi.sim.environment import MetaWorldEnvironment
from halfpi.sim.evaluate import EvalConfig
from halfpi.sim.record import HELD_OUT_SEED, Frames
from halfpi.sim.rendering import RenderingUnavailableError, choose_gl
from halfpi.sim.tasks import PRECISE, TASKS
from halfpi.types import Observation


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("nano", device="cpu", num_steps=2)


def observation(brightness: int) -> Observation:
    image = np.full((112, 112, 3), brightness, np.uint8)
    return Observation({"scene": image, "wrist": 255 - image}, np.zeros(4, np.float32))


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 5), (12, 12), (40, 12)])
def test_a_contact_sheet_has_a_column_a_call_and_a_row_a_camera(count: int, columns: int) -> None:
    observations = [observation(6 * index) for index in range(count)]
    sheet = demo.contact_sheet(observations)
    assert sheet.size == (112 * columns, 224)
    pixels = np.asarray(sheet)
    assert pixels[0, 0, 0] == 0
    assert pixels[0, -1, 0] == 6 * (count - 1)  # the last call is shown
    assert pixels[-1, 0, 0] == 255


def test_an_episode_comes_with_its_sheet(
    environment: MetaWorldEnvironment, policy: Policy, tmp_path: Path
) -> None:
    config = EvalConfig(num_steps=2, max_steps=16)
    ((episode, sheet),) = demo.play(policy, [environment.task], 1, config, tmp_path / "new")
    assert episode.seed == HELD_OUT_SEED
    assert sheet == tmp_path / "new" / f"window-close-{HELD_OUT_SEED}.png"
    with Image.open(sheet) as image:
        assert image.size == (2 * 112, 2 * 112)


def test_a_recording_has_every_call(
    environment: MetaWorldEnvironment, policy: Policy, tmp_path: Path
) -> None:
    chunks = pytest.importorskip("rerun.chunk")
    path = tmp_path / "demo.rrd"
    config = EvalConfig(num_steps=2, max_steps=16)
    with RerunLog(path) as log:
        list(demo.play(policy, [environment.task], 1, config, tmp_path, log))
    rows: dict[str, int] = {}
    for chunk in chunks.RrdReader(path).stream():
        rows[chunk.entity_path] = rows.get(chunk.entity_path, 0) + chunk.num_rows
    assert rows["/camera/scene"] == rows["/chunk"] == rows["/stage/denoise_ms"] == 2
    assert rows["/events"] == 1


def test_recorded_frames_are_compared_with_the_expert(policy: Policy) -> None:
    policy.reseed(0)
    results = list(demo.play_frames(policy))
    assert [result.task for result in results] == [*PRECISE]
    frames = Frames.load(demo.RECORDED_FRAMES)
    images = dict(zip(("scene", "wrist"), frames.images[0], strict=True))
    policy.reseed(0)
    sentence = TASKS[PRECISE[0]].instruction
    actions = policy.infer(Observation(images, frames.states[0], sentence)).actions
    error = np.abs(actions.clip(-1, 1) - frames.chunks[0]).mean()
    # The policy and the expert agree: full scale is 2.
    assert all(result.action_error < 0.15 for result in results)
    assert results[0].action_error == pytest.approx(float(error), abs=1e-6)
    assert all(result.times.total_ms > 0 for result in results)


def fail_to_choose() -> str:
    raise RenderingUnavailableError("no library")


def fail_to_render(*_: object) -> None:
    raise RenderingUnavailableError("no context")


@pytest.mark.parametrize(
    ("name", "failure"), [("choose_gl", fail_to_choose), ("SceneRenderer", fail_to_render)]
)
def test_without_rendering_the_demo_runs_on_recorded_frames(
    name: str,
    failure: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name == "SceneRenderer":
        try:
            choose_gl()  # what comes before the renderer imports mujoco
        except RenderingUnavailableError as error:
            pytest.skip(str(error))
    monkeypatch.setattr(environment, name, failure)
    output = ["--output", str(tmp_path / "sheets")]
    monkeypatch.setattr(sys, "argv", ["halfpi", "demo", "--num-steps", "1", "--json", *output])
    cli.main()
    printed = capsys.readouterr()
    assert [row["task"] for row in json.loads(printed.out)["recorded_frames"]] == [*PRECISE]
    notes = " ".join(printed.err.split())
    assert "apt-get install libegl1" in notes
    assert "recorded frames instead" in notes


def test_without_a_library_the_error_names_the_debian_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(RenderingUnavailableError, match=r"apt-get install libegl1.*libosmesa6"):
        choose_gl()


@pytest.mark.parametrize(
    ("found", "backend"), [({"EGL", "OpenGL", "OSMesa"}, "egl"), ({"EGL", "OSMesa"}, "osmesa")]
)
def test_the_first_complete_backend_is_chosen(
    found: set[str], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})  # what is chosen here stays here
    os.environ.pop("MUJOCO_GL", None)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: name if name in found else None)
    assert choose_gl() == os.environ["MUJOCO_GL"] == backend


def test_the_users_backend_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "MUJOCO_GL": "glfw"})
    assert choose_gl() == "glfw"
