"""Charts: the same records give the same file, and every benchmark has one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the extra report is not installed")

from halfpi.perf.cases import ABLATION, standard_case
from halfpi.perf.charts import draw, main
from halfpi.perf.records import Percentiles, Record, append_record

TIMES = Percentiles(1.0, 2.0, 3.0)


def measured(benchmark: str, engine: str, **changes: Any) -> Record:
    record = Record(
        kind="measured",
        benchmark=benchmark,
        engine=engine,
        device="NVIDIA H200",
        case=dataclasses.asdict(standard_case()),
        ms={"total": TIMES},
        commit="0123456789",
        dirty=False,
    )
    return dataclasses.replace(record, **changes)


def records_of(benchmark: str) -> list[Record]:
    if benchmark == "ablation":
        return [measured(benchmark, name) for name in reversed(list(ABLATION))]
    stages = {"vision": TIMES, "prefill": TIMES, "total": TIMES}
    return [measured(benchmark, "triton", ms=stages, floor_ms={"total": 0.5, "vision": 0.2})]


@pytest.mark.parametrize("benchmark", ["kernels", "stages", "e2e", "mlp", "attention", "ablation"])
def test_a_chart_is_the_same_every_time(benchmark: str, tmp_path: Path) -> None:
    charts = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for chart in charts:
        draw(records_of(benchmark), chart)
    first, second = (chart.read_text() for chart in charts)
    assert first == second
    assert f"{benchmark}, NVIDIA H200" in first
    assert sorted(tmp_path.iterdir()) == charts


def test_the_waterfall_keeps_its_order_and_says_hertz(tmp_path: Path) -> None:
    draw(records_of("ablation"), tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text()
    places = [text.index(f">{name}<") for name in ABLATION]
    assert places == sorted(places)
    assert "1.0 ms, 1000.0 Hz" in text


def test_a_chart_is_of_one_benchmark(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a chart is of one benchmark, got none"):
        draw([], tmp_path / "chart.svg")
    with pytest.raises(ValueError, match="a chart is of one benchmark, got"):
        draw([measured("mlp", "bf16"), measured("e2e", "eager")], tmp_path / "chart.svg")


def test_a_checkouts_charts_compare_with_others(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    peer = measured("e2e", "peer", kind="quoted", source="theirs", commit=None, dirty=None)
    nano = measured("mlp", "bf16", case={**peer.case, "model": "nano"})
    for record in (measured("stages", "triton"), peer, nano):
        append_record(record, results)
    main(["--root", str(tmp_path)])
    assert [path.name for path in (tmp_path / "docs").iterdir()] == ["stages-nvidia-h200.svg"]
    assert "peer" in (tmp_path / "docs" / "stages-nvidia-h200.svg").read_text()
