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
    for name in ("src/code.py", "benchmarks/record.jsonl"):
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
    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    here = environment(CPU)
    assert (here.commit, here.dirty) == (halfpi.__version__, False)


def test_a_broken_checkout_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    with pytest.raises(ValueError, match=r"`git .* status .*` failed: .*not a git repository"):
        environment(CPU)


def test_a_cpu_has_a_name_and_no_driver() -> None:
    here = environment(CPU)
    assert here.device
    assert here.driver is None
    assert here.torch == torch.__version__
