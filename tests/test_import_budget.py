"""`halfpi --help` answers at once: no torch, and less than half a second of CPU time.

What loads a policy imports torch, and nothing else that is slow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SRC = Path(__file__).parents[1] / "src"

# What the installed `halfpi` script does, with a report after it on standard error.
HELP = """
import json, sys, time
sys.argv = ["halfpi", "--help"]
try:
    from halfpi.cli import main
    main()
except SystemExit as stop:
    report = {"code": stop.code or 0, "torch": "torch" in sys.modules, "cpu_s": time.process_time()}
    json.dump(report, sys.stderr)
"""


# Each takes seconds to import, and a robot waits for them.
LOAD = """
import sys
from halfpi import load_policy
load_policy("nano", device="cpu")
print(*{"sympy", "torch._dynamo", "torch.distributed.fsdp", "triton"}.intersection(sys.modules))
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=True,
    )


def run_help() -> tuple[str, dict[str, float]]:
    child = run(HELP)
    return child.stdout, json.loads(child.stderr)


def test_help_names_the_commands_without_importing_torch() -> None:
    text, report = run_help()
    assert report["code"] == 0
    assert not report["torch"]
    for command in ("demo", "eval", "bench", "serve", "convert", "inspect", "calibrate", "report"):
        assert command in text


def test_help_stays_within_its_cpu_budget() -> None:
    # The least of three: noise from the machine only ever adds.
    assert min(run_help()[1]["cpu_s"] for _ in range(3)) < 0.5


def test_loading_imports_nothing_slow() -> None:
    assert run(LOAD).stdout.split() == []
