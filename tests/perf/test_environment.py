"""The environment of a record, from a checkout and from an installation."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import halfpi
from halfpi.perf import environment as module
from halfpi.perf.environment import environment

CPU = torch.device("cpu")


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    done = subprocess.run(
        ["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a source and a record, taken for halfpi's."""
    monkeypatch.delenv("HALFPI_COMMIT", raising=False)
    for name in ("pyproject.toml", "src/code.py", "benchmarks/record.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "All")
    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    return tmp_path


def test_the_commit_is_that_of_the_checkout(checkout: Path) -> None:
    here = environment(CPU)
    assert here.commit == git(checkout, "rev-parse", "HEAD")
    assert not here.dirty


def test_changed_code_makes_it_dirty_and_a_new_record_does_not(checkout: Path) -> None:
    (checkout / "benchmarks" / "record.jsonl").write_text("2\n")
    assert not environment(CPU).dirty
    (checkout / "src" / "new.py").write_text("1\n")
    assert environment(CPU).dirty


def test_an_installation_has_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALFPI_COMMIT", raising=False)
    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    here = environment(CPU)
    assert (here.commit, here.dirty) == (halfpi.__version__, False)


@pytest.mark.parametrize("git_directory", [True, False])
def test_a_copy_without_history_has_no_commit(
    git_directory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HALFPI_COMMIT", raising=False)
    (tmp_path / "pyproject.toml").touch()
    if git_directory:
        (tmp_path / ".git").mkdir()
    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    here = environment(CPU)
    assert (here.commit, here.dirty) == (None, True)


def test_a_repository_without_commits_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HALFPI_COMMIT", raising=False)
    (tmp_path / "pyproject.toml").touch()
    git(tmp_path, "init", "--quiet")
    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    assert environment(CPU).commit is None


@pytest.mark.parametrize("dirty", [True, False])
def test_a_copy_can_be_told_its_commit(
    dirty: bool, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFPI_COMMIT", "0123abc" + dirty * "-dirty")
    here = environment(CPU)
    assert (here.commit, here.dirty) == ("0123abc", dirty)


def test_a_cpu_has_a_name_and_no_driver() -> None:
    here = environment(CPU)
    assert here.device
    assert here.driver is None
    assert here.torch == torch.__version__
