"""`halfpi inspect`, `convert` and `infer` on nano."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.commands.conftest import Halfpi, Mistake

from halfpi.checkpoints import load_model, open_checkpoint
from halfpi.policy import NANO, load_policy
from halfpi.types import Observation

Capture = pytest.CaptureFixture[str]
STATE = (-0.1, 0.6, 0.2, 1.0)
ASK = ("--prompt", "open the door", "--state", *STATE, "--num-steps", 2, "--device", "cpu")


def test_inspect_tells_format_sizes_and_processing(halfpi: Halfpi, capsys: Capture) -> None:
    halfpi("inspect", "nano")
    text = capsys.readouterr().out
    for expected in ("halfpi", "parameters", "bfloat16", "prefix_width", "metaworld", "tokenizer"):
        assert expected in text


def test_inspect_prints_json(halfpi: Halfpi, capsys: Capture) -> None:
    halfpi("inspect", "nano", "--json")
    printed = json.loads(capsys.readouterr().out)
    summary = open_checkpoint(NANO).describe()
    assert printed["format"] == "halfpi"
    assert printed["tensors"] == summary.tensors
    assert printed["parameters"] == dict(summary.parameters)
    assert printed["config"]["prefix_width"] == summary.config.prefix_width
    assert printed["processing"]["cameras"] == ["scene", "wrist"]
    assert Path(printed["tokenizer_path"]).name == "tokenizer.json"


def test_convert_writes_what_it_reads(halfpi: Halfpi, mistake: Mistake, tmp_path: Path) -> None:
    target = tmp_path / "converted"
    halfpi("convert", "nano", target)
    original, copied = (load_model(path).state_dict() for path in (NANO, target))
    for name, tensor in original.items():
        assert torch.equal(tensor, copied[name]), name
    assert load_policy(target, device="cpu").horizon == 16
    assert "exists" in mistake("convert", "nano", target)
    halfpi("convert", "nano", target, "--overwrite", "--dtype", "float32")
    assert [*open_checkpoint(target).describe().dtypes] == ["float32"]
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


def test_convert_does_not_replace_what_is_no_checkpoint(mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "not replaced" in mistake("convert", "nano", tmp_path, "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_infer_prints_what_the_policy_does(
    halfpi: Halfpi, images: list[str], capsys: Capture
) -> None:
    halfpi("infer", "nano", *ASK, "--seed", 3, "--images", *images, "--json")
    printed = json.loads(capsys.readouterr().out)
    seen = {}
    for option in images:
        camera, file = option.split("=")
        with Image.open(file) as image:
            seen[camera] = np.asarray(image)
    observation = Observation(seen, np.array(STATE, np.float32), "open the door")
    policy = load_policy("nano", device="cpu", num_steps=2, seed=3)
    np.testing.assert_allclose(printed["actions"], policy.infer(observation).actions, atol=1e-6)
    times = {"processing_ms", "vision_ms", "prefill_ms", "denoise_ms"}
    assert printed.keys() == {"actions", *times}
    assert all(printed[name] > 0 for name in times)

    halfpi("infer", "nano", *ASK, "--seed", 3, "--images", *images)
    rows = [[float(x) for x in line.split()] for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(rows, printed["actions"], atol=6e-5)


def test_a_camera_that_is_left_out_is_masked(
    halfpi: Halfpi, images: list[str], capsys: Capture
) -> None:
    chunks = []
    for given in (images, images[:1], images[1:]):
        halfpi("infer", "nano", *ASK, "--images", *given, "--json")
        chunks.append(json.loads(capsys.readouterr().out)["actions"])
    assert np.shape(chunks) == (3, 16, 4)
    assert chunks[0] != chunks[1] != chunks[2]


def test_infer_reads_any_mode_of_image(
    halfpi: Halfpi, images: list[str], tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "grey.png"
    Image.new("LA", (50, 40), (90, 255)).save(file)
    halfpi("infer", "nano", *ASK, "--images", f"scene={file}")
    assert len(capsys.readouterr().out.splitlines()) == 16


def test_a_missing_checkpoint_is_named(mistake: Mistake, images: list[str], tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for command in (
        ("inspect", absent),
        ("convert", absent, tmp_path / "target"),
        ("infer", absent, *ASK, "--images", *images),
    ):
        assert f"{absent} does not exist" in mistake(*command)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("text", ["depth", "=4", "depth="])
@pytest.mark.parametrize("option", ["--model", "--processing"])
def test_a_field_without_name_or_value_is_refused(mistake: Mistake, option: str, text: str) -> None:
    message = mistake("inspect", "nano", option, text)
    assert message == f"halfpi: expected NAME=VALUE, got {text!r}"


@pytest.mark.parametrize("option", ["--model", "--processing"])
def test_an_unknown_field_is_named(mistake: Mistake, option: str) -> None:
    assert "depht" in mistake("inspect", "nano", option, "depht=4")


def test_fields_reach_the_checkpoint(halfpi: Halfpi, capsys: Capture) -> None:
    halfpi("inspect", "nano", "--processing", "default_prompt=go on", "--json")
    assert json.loads(capsys.readouterr().out)["processing"]["default_prompt"] == "go on"


def test_an_unreadable_image_is_named(mistake: Mistake, images: list[str], tmp_path: Path) -> None:
    file = tmp_path / "broken.png"
    infer = ("infer", "nano", *ASK, "--images", f"scene={file}")
    said = f"halfpi: {file} cannot be read as an image: "
    assert mistake(*infer).startswith(said)
    file.write_text("no image")
    assert mistake(*infer).startswith(said)
    file.write_bytes(Path(images[0].partition("=")[2]).read_bytes()[:2000])
    assert mistake(*infer).startswith(said)


def test_an_unknown_camera_is_named(mistake: Mistake, images: list[str]) -> None:
    message = mistake("infer", "nano", *ASK, "--images", images[0].replace("scene", "ceiling", 1))
    assert "ceiling" in message


def test_a_state_of_another_length_is_refused(mistake: Mistake, images: list[str]) -> None:
    arguments = ("--prompt", "open the door", "--state", 0.1, 0.2, "--images", *images)
    assert "state must be (4,), got (2,)" in mistake("infer", "nano", *arguments)


def test_a_prompt_that_is_too_long_is_refused(mistake: Mistake, images: list[str]) -> None:
    arguments = ("--prompt", "open the door " * 30, "--state", *STATE, "--images", *images)
    message = mistake("infer", "nano", *arguments)
    assert "tokens, but the limit is 48" in message


def test_an_empty_prompt_is_refused(mistake: Mistake, images: list[str]) -> None:
    arguments = ("--prompt", " ", "--state", *STATE, "--images", *images)
    assert "the prompt is empty" in mistake("infer", "nano", *arguments)


def test_num_steps_must_be_positive(mistake: Mistake, images: list[str]) -> None:
    message = mistake("infer", "nano", *ASK, "--num-steps", 0, "--images", *images)
    assert "num_steps must be an int of at least 1, got 0" in message
