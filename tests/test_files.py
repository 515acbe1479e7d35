"""A file is replaced whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfpi.files import atomic_write


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert not path.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
    assert path.read_text() == "new"


def write_half(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyError


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_half(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass  # nothing was written
    assert path.read_text() == "old"
