"""Rows of the benchmarks' tables, each from records made up for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from halfpi.perf.cases import ABLATION, Precision, standard_case
from halfpi.perf.records import Percentiles, Record
from halfpi.perf.summaries import (
    Summary,
    ablation,
    attention,
    cold,
    e2e,
    kernels,
    mlp,
    paced,
    standard,
)

H200 = "NVIDIA H200"


def measured(
    benchmark: str, engine: str, precision: Precision = "fp8", *, ms: float = 1.0, **changes: Any
) -> Record:
    record = Record(
        kind="measured",
        benchmark=benchmark,
        engine=engine,
        device=H200,
        case=dataclasses.asdict(standard_case(precision)),
        ms={"total": times(ms)},
        commit="0123456789",
        dirty=False,
    )
    return dataclasses.replace(record, **changes)


def times(p50: float) -> Percentiles:
    return Percentiles(p50, p50, 1.1 * p50)


def column(summary: Summary, name: str) -> list[str]:
    assert all(len(row) == len(summary.header) for row in summary.rows)
    return [row[summary.header.index(name)] for row in summary.rows]


def test_the_standard_case_has_floors_targets_and_everybody_in_order() -> None:
    stages = {name: times(1.0) for name in ("vision", "prefill", "denoise")}
    peer = measured("e2e", "peer", ms=17.06, kind="quoted", source="theirs")
    records = [
        measured("stages", "triton"),
        peer,
        dataclasses.replace(peer, engine="short", case={**peer.case, "prompt_tokens": 20}),
        dataclasses.replace(peer, engine="elsewhere", device="NVIDIA Thor"),
    ]
    records[0] = dataclasses.replace(records[0], ms={**stages, "total": times(7.5)})
    summary = standard(records)
    names = ["floor", "target (H200)"] * 2 + ["**halfpi, triton**", "peer"]
    assert column(summary, "") == names
    assert column(summary, "total ms")[1:] == ["11.50", "4.54", "7.80", "7.50", "17.06"]
    assert column(summary, "vision ms")[-2:] == ["1.00", ""]
    assert standard([peer]).rows == []


def test_paced_stages_have_their_rate() -> None:
    stages = {name: times(1.0) for name in ("vision", "prefill", "denoise")}
    records = [measured("paced", "triton", numbers={"rate_hz": rate}) for rate in (10.0, 20.0)]
    records.append(measured("stages", "triton"))
    records = [dataclasses.replace(each, ms={**stages, "total": times(3.1)}) for each in records]
    summary = paced(records)
    assert column(summary, "calls a second") == ["20"]
    assert column(summary, "total ms") == ["3.10"]


def test_a_cold_start_has_a_row_for_each_state_of_the_cache() -> None:
    numbers = {"import_s empty": 2.0, "import_s full": 1.0}
    ms = {"empty": times(30_000.0), "full": times(7_040.0)}
    record = dataclasses.replace(measured("cold", "triton", numbers=numbers), ms=ms)
    summary = cold([record])
    assert column(summary, "cache of kernels") == ["empty", "full"]
    assert column(summary, "total s") == ["30.0", "7.0"]
    assert column(summary, "imports s") == ["2.0", "1.0"]
    assert column(summary, "first call s") == ["", ""]


def test_end_to_end_tells_sizes_of_images_apart() -> None:
    numbers = {"image_height": 224.0, "image_width": 224.0, "p99_over_p50": 1.1}
    large = {**numbers, "image_height": 480.0, "image_width": 640.0, "over_graphs_ms": 0.5}
    records = [
        measured("e2e", "triton", ms=9.0, numbers=numbers),
        measured("e2e", "triton", ms=8.0, numbers=numbers),
        measured("e2e", "triton", ms=8.5, numbers=large),
    ]
    summary = e2e(records)
    assert column(summary, "images") == ["224 × 224", "480 × 640"]
    assert column(summary, "p50 ms") == ["8.00", "8.50"]
    assert column(summary, "p99 ms") == ["8.80", "9.35"]
    assert column(summary, "beyond graphs ms") == ["", "0.50"]


def test_kernels_have_their_share_and_error_ratio() -> None:
    record = measured(
        "kernels",
        "triton",
        floor_ms={"geglu/expert": 0.002},
        numbers={"error_ratio geglu/expert": 1.25},
    )
    summary = kernels([dataclasses.replace(record, ms={"geglu/expert": times(0.008)})])
    assert summary.rows == [(H200, "geglu/expert", "fp8", "2.0", "8.0", "25 %", "1.25")]


def test_the_mlp_is_compared_with_bf16() -> None:
    records = [
        measured("mlp", "bf16", "bf16", ms=0.32, error=0.003),
        measured("mlp", "fp8, separate", ms=0.40),
        measured("mlp", "fp8, hybrid", ms=0.16, floor_ms={"total": 0.08}),
    ]
    summary = mlp(records)
    assert column(summary, "× bf16") == ["1.00", "0.80", "2.00"]
    assert column(summary, "share") == ["", "", "50 %"]
    assert column(summary, "error") == ["0.0030", "", ""]


def test_attention_has_a_row_for_each_implementation() -> None:
    shapes = {"vision": 0.010, "prefill": 0.030, "expert": 0.006}
    ours = measured("attention", "halfpi", "bf16", floor_ms={"vision": 0.002, "expert": 0.001})
    ours = dataclasses.replace(ours, ms={name: times(ms) for name, ms in shapes.items()})
    flash = measured("attention", "flash", "bf16")
    flash = dataclasses.replace(flash, ms={"expert": times(0.0136)})
    summary = attention([ours, flash])
    assert column(summary, "implementation") == ["floor", "halfpi", "flash"]
    assert column(summary, "expert µs") == ["1.0", "6.0", "13.6"]
    assert column(summary, "prefill µs") == ["", "30.0", ""]


def test_the_waterfall_adds_up_in_its_order() -> None:
    milliseconds = dict(zip(ABLATION, (200.0, 40.0, 20.0, 25.0, 12.5, 10.0, 8.0), strict=True))
    records = [
        measured("ablation", name, ms=ms, numbers={"kernels": 9, "casts": 0, "copies": 1})
        for name, ms in reversed(milliseconds.items())
    ]
    summary = ablation(records)
    assert column(summary, "step") == list(ABLATION)
    assert column(summary, "Hz") == ["5.0", "25.0", "50.0", "40.0", "80.0", "100.0", "125.0"]
    gains = ["+0.0", "+20.0", "+25.0", "-10.0", "+40.0", "+20.0", "+25.0"]
    assert column(summary, "gain Hz") == gains
    assert column(summary, "gain so far Hz")[-1] == "+120.0"
    assert column(summary, "× so far")[-1] == "25.00"
    assert column(summary, "casts")[0] == "0"
    assert column(summary, "layouts")[0] == ""
