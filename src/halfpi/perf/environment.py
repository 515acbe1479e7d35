"""Where a benchmark runs: the part of a record that no caller should have to fill in."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import halfpi

_CHECKOUT = Path(__file__).parents[3]
# What `git describe --always --abbrev=40 --dirty --exclude '*'` says, for a copy without history.
_COMMIT_VARIABLE = "HALFPI_COMMIT"
_DIRTY = "-dirty"


@dataclass(frozen=True)
class Environment:
    """Fields of a `Record`, by the same names."""

    commit: str | None
    dirty: bool
    device: str
    driver: str | None
    torch: str
    triton: str | None
    cuda: str | None


def environment(device: torch.device) -> Environment:
    """What a benchmark on `device` runs on and from.

    Raises ValueError when nvidia-smi is needed and fails.
    """
    on_gpu = device.type == "cuda"
    commit, dirty = _source()
    return Environment(
        commit=commit,
        dirty=dirty,
        device=torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        driver=_driver() if on_gpu else None,
        torch=torch.__version__,
        triton=_version("triton"),
        cuda=torch.version.cuda,
    )


def _source() -> tuple[str | None, bool]:
    """The commit of the checkout and whether src differs, or the version of an installation.

    HALFPI_COMMIT says it for a copy of a checkout; one without history or that is None and dirty.
    """
    told = os.environ.get(_COMMIT_VARIABLE)
    if told:
        return told.removesuffix(_DIRTY), told.endswith(_DIRTY)
    if not (_CHECKOUT / "pyproject.toml").exists():
        return halfpi.__version__, False
    # Whoever owns the checkout: its code is running already.
    git = ("git", "-c", f"safe.directory={_CHECKOUT}", "-C", str(_CHECKOUT))
    try:
        changes = _output(*git, "status", "--porcelain", "--", "src")
        return _output(*git, "rev-parse", "--verify", "HEAD"), bool(changes)
    except ValueError:
        return None, True


def _driver() -> str:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return _output(*query).splitlines()[0]


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown CPU"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise ValueError(f"`{' '.join(command)}` failed: {reason}") from error
    return done.stdout.strip()
