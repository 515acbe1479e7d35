"""The package's surface: what it exports, what importing it costs, what it ships and pins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module, resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import halfpi

ROOT = Path(__file__).parents[1]
HOMES = {
    "ActionChunk": "halfpi.types",
    "Observation": "halfpi.types",
    "Pi05Config": "halfpi.config",
    "Policy": "halfpi.policy",
    "accelerate": "halfpi.integrations.lerobot",
    "load_model": "halfpi.checkpoints",
    "load_policy": "halfpi.policy",
    "restore": "halfpi.integrations.lerobot",
}


def test_all_lists_the_public_names() -> None:
    assert set(halfpi.__all__) == {*HOMES, "__version__"}
    assert dir(halfpi) == sorted(halfpi.__all__)


@pytest.mark.parametrize(("name", "home"), HOMES.items())
def test_an_export_is_the_object_of_its_module(name: str, home: str) -> None:
    assert getattr(halfpi, name) is getattr(import_module(home), name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'halfpi' has no attribute 'load_polcy'"):
        getattr(halfpi, "load_polcy")  # noqa: B009 (mypy knows that it is not there)


def test_importing_halfpi_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, halfpi; print(*sorted({'numpy', 'torch'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == ""


def test_the_package_is_marked_as_typed() -> None:
    assert (resources.files("halfpi") / "py.typed").is_file()


def test_the_changelog_knows_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(halfpi.__version__)}\]", changelog, re.MULTILINE)


def test_every_requirement_is_pinned_inside_its_range() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            pin = re.fullmatch(r"([\w.-]+)==([\w.]+)", line)
            assert pin, f"not NAME==VERSION: {line}"
            pins[canonicalize_name(pin[1])] = pin[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text
