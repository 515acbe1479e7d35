"""The `halfpi` command as a user types it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from halfpi import cli

Halfpi = Callable[..., None]
Mistake = Callable[..., str]


@pytest.fixture
def halfpi(monkeypatch: pytest.MonkeyPatch) -> Halfpi:
    """Run the command with arguments."""

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["halfpi", *map(str, arguments)])
        cli.main()

    return run


@pytest.fixture
def mistake(halfpi: Halfpi) -> Mistake:
    """Run the command with arguments that it must refuse; returns the one line that it says."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            halfpi(*arguments)
        # A text as exit code is printed to standard error, and the status is 1.
        assert isinstance(stop.value.code, str)
        assert stop.value.code.startswith("halfpi: ")
        assert "\n" not in stop.value.code
        return stop.value.code

    return run


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """A file for each camera of nano, as the option wants them."""
    generator = np.random.default_rng(0)
    options = []
    for camera, size in (("scene", (112, 112)), ("wrist", (90, 160))):
        file = tmp_path / f"{camera}.png"
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(file)
        options.append(f"{camera}={file}")
    return options
