"""The plugin's tests with the real LeRobot, in the environment that `make test-lerobot` makes.

LeRobot wants Python 3.12 and brings five gigabytes, so nobody gets it without asking.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-lerobot" / "bin" / "python"


@pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-lerobot; `make test-lerobot` makes it")
def test_in_the_real_lerobot() -> None:
    child = subprocess.run(
        [PYTHON, "-m", "pytest", "-q"],
        cwd=ROOT / "plugins" / "lerobot_policy_halfpi",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout
