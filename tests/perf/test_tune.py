"""The parts of benchmarks/tune.py that need no GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from halfpi.perf.timing import measure

pytest.importorskip("triton", reason="Triton is not installed")
from halfpi.kernels import specs, tuned
from halfpi.kernels.spec import Device
from halfpi.kernels.tile import TileLaunch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tune.py"
HOPPER = Device(capability=90, shared_bytes=232_448)


@pytest.fixture(scope="module")
def tune() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("rows", "cameras", "tokens"), [(968, 3, 200), (560, 2, 48), (768, 3, 200), (256, 1, 200)]
)
def test_rows_are_cameras_and_prompt_tokens(
    tune: ModuleType, rows: int, cameras: int, tokens: int
) -> None:
    case = tune.engine_case("geglu", tune.with_rows(specs()["geglu"].cases[0], rows))
    assert (case.cameras, case.prompt_tokens, case.precision) == (cameras, tokens, "bf16")


def test_denoising_has_too_few_rows(tune: ModuleType) -> None:
    expert = next(case for case in specs()["geglu"].cases if case.sizes["m"] == 50)
    with pytest.raises(ValueError, match="rows must be 256 or more, got geglu expert"):
        tune.engine_case("geglu", expert)


def test_launches_are_ranked_in_engines_that_use_them(
    tune: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = specs()["geglu"].cases[0]
    before = tuned.best("geglu", case.sizes, case.dtype, case.out_dtype, HOPPER)
    slow, fast = (dataclasses.replace(before, programs=programs) for programs in (1, 2))
    entries = [
        tuned.Entry("geglu", tuned.kept_sizes(case), str(case.dtype), str(case.out_dtype),
                    dataclasses.asdict(launch), 1.0, "", "")
        for launch in (slow, fast)
    ]  # fmt: skip

    def make_subject(*_: object) -> TileLaunch:
        launch = tuned.best("geglu", case.sizes, case.dtype, case.out_dtype, HOPPER)
        assert isinstance(launch, TileLaunch)
        return launch

    def sleeping(seconds: float, _: int) -> None:
        time.sleep(seconds)

    def stage_calls(launch: TileLaunch, _: object) -> dict[str, Callable[[int], None]]:
        seconds = {"vision": 0.001, "prefill": 0.001, "denoise": 0.008}
        if launch == slow:  # which denoise, where it happens to be faster, must not hide
            seconds |= {"prefill": 0.004, "denoise": 0.001}
        return {stage: partial(sleeping, pause) for stage, pause in seconds.items()}

    fakes: dict[str, Any] = {
        "random_model": lambda *_, **__: None,
        "make_subject": make_subject,
        "stage_calls": stage_calls,
        "measure": lambda calls, _, **rest: measure(calls, "host", **rest),
        "RUNS": 3,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(tune, name, fake)
    ranked = tune.ranked_between(entries, tune.engine_case("geglu", case), HOPPER)
    assert [entry.launch["programs"] for entry in ranked] == [2, 1]
    assert tuned.best("geglu", case.sizes, case.dtype, case.out_dtype, HOPPER) == before
