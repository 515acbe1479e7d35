"""Every command explains itself; mistakes in a command line are refused before anything runs."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tests.commands.conftest import Halfpi

from halfpi import cli

SRC = Path(__file__).parents[2] / "src"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(
    command: str, halfpi: Halfpi, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        halfpi(command, "--help")
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert f"usage: halfpi {command}" in text
    options = cli.COMMANDS[command][0]
    assert options.__doc__ is not None
    assert " ".join(options.__doc__.split()[:4]) in text


@pytest.mark.parametrize(
    "arguments", [(), ("dance",), ("inspect",), ("infer", "nano"), ("eval", "--episodes", "some")]
)
def test_a_wrong_command_line_is_refused(
    arguments: tuple[str, ...], halfpi: Halfpi, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        halfpi(*arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().out == ""


def test_the_exit_status_of_a_mistake_is_one(tmp_path: Path) -> None:
    code = "from halfpi.cli import main; main()"
    child = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path / "absent")],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 1
    assert child.stdout == ""
    assert child.stderr.splitlines() == [
        f"halfpi: {tmp_path / 'absent'} does not exist; a checkpoint is a directory"
    ]


def test_warnings_are_notes_of_one_line(
    halfpi: Halfpi, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(options: object) -> None:
        warnings.warn("vision_heads is assumed to be 16", UserWarning, stacklevel=1)

    monkeypatch.setattr("halfpi.commands.checkpoint.inspect", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        halfpi("inspect", "nano")
    assert capsys.readouterr().err == "halfpi: note: vision_heads is assumed to be 16\n"
