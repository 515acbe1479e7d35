"""The table of measured launches: what it holds can be launched, and the nearest entry serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.kernels.conftest import HOPPER

from halfpi.kernels import specs, tuned
from halfpi.kernels.spec import FP8, Case, Device

pytest.importorskip("triton", reason="Triton is not installed")

from halfpi.kernels.tile import TileLaunch

TABLES = sorted((Path(tuned.__file__).parent / "tuned").glob("sm_*.json"))
ENTRIES = [
    pytest.param(Device(int(path.stem[3:]), 232_448), entry, id=f"{path.stem}-{number}")
    for path in TABLES
    for number, entry in enumerate(json.loads(path.read_text()))
]


@pytest.mark.parametrize(("device", "fields"), ENTRIES)
def test_entries_serve_their_own_case(device: Device, fields: dict[str, object]) -> None:
    entry = tuned.Entry(**fields)  # type: ignore[arg-type]
    dtype, out_dtype = (
        getattr(torch, name.removeprefix("torch.")) for name in (entry.dtype, entry.out_dtype)
    )
    launch = tuned.best(entry.kernel, entry.sizes, dtype, out_dtype, device)
    case = Case("", entry.sizes, dtype, out_dtype)
    assert type(launch) is type(specs()[entry.kernel].candidates(case, device)[0])
    assert vars(launch) == entry.launch


def entry(m: int, n: int, block_m: int) -> tuned.Entry:
    return tuned.Entry(
        "linear", {"m": m, "n": n, "k": 64}, "torch.bfloat16", "torch.bfloat16",
        {"block_m": block_m}, 1.0, "a GPU", "2026-01-01",
    )  # fmt: skip


def block_m(m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> int:
    sizes = {"m": m, "n": n, "k": 64}
    launch = tuned.best("linear", sizes, dtype, torch.bfloat16, HOPPER)
    assert isinstance(launch, TileLaunch)
    return launch.block_m


def test_nearest_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (entry(256, 96, 16), entry(1024, 96, 32), entry(1024, 128, 256))
    monkeypatch.setattr(tuned, "entries", lambda capability: table if capability == 90 else ())
    assert [block_m(m, 96) for m in (100, 256, 500, 600, 4000)] == [16, 16, 16, 32, 32]
    assert block_m(256, 128) == 256  # the width decides before the rows
    assert block_m(128, 128) == 256
    assert block_m(127, 128) == 128  # too far: the default


def test_what_was_not_measured_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "entries", lambda capability: (entry(256, 96, 16),))
    sizes = {"m": 256, "n": 160, "k": 64}
    default = specs()["linear"].candidates(Case("", sizes), HOPPER)[0]
    assert tuned.best("linear", sizes, torch.bfloat16, torch.bfloat16, HOPPER) == default
    assert block_m(256, 96, FP8) == 128


def test_devices_without_a_table_use_defaults() -> None:
    assert tuned.entries(1) == ()
