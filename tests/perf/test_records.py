"""Records: what is written is read again, and nothing that breaks the schema is either."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from halfpi.perf.cases import standard_case
from halfpi.perf.records import (
    Percentiles,
    Record,
    RecordError,
    append_record,
    newest,
    read_records,
    record_from_json,
)

ROOT = Path(__file__).parents[2]

MEASURED = Record(
    kind="measured",
    benchmark="stages",
    engine="eager",
    device="NVIDIA H200",
    case=dataclasses.asdict(standard_case()),
    ms={"total": Percentiles(10.0, 11.0, 12.0)},
    commit="0123abc",
    dirty=False,
    torch="2.13.0",
    floor_ms={"total": 7.7},
    peak_bytes=7_000_000_000,
    error=0.004,
    numbers={"cold_start_s": 12.5},
)
QUOTED = Record(
    kind="quoted",
    benchmark="e2e",
    engine="other",
    device="NVIDIA Thor",
    case={"model": "pi05", "cameras": 2},
    ms={"total": Percentiles(27.2)},
    source="its authors",
)


def test_a_round_trip_changes_nothing(tmp_path: Path) -> None:
    path = append_record(MEASURED, tmp_path)
    assert path == tmp_path / "nvidia-h200" / "stages.jsonl"
    append_record(QUOTED, tmp_path)
    append_record(dataclasses.replace(MEASURED, error=None), tmp_path)
    assert read_records(tmp_path) == [MEASURED, dataclasses.replace(MEASURED, error=None), QUOTED]


def test_appending_keeps_what_is_there(tmp_path: Path) -> None:
    path = append_record(MEASURED, tmp_path)
    before = path.read_bytes()
    append_record(MEASURED, tmp_path)
    assert path.read_bytes() == before * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "guessed"}, "kind must be one of .*, got 'guessed'"),
        ({"schema": 3}, "schema must be 2, got 3"),
        ({"benchmark": ""}, "benchmark must be a text, got ''"),
        ({"engine": None}, "engine must be a text, got None"),
        ({"device": 5}, "device must be a text, got 5"),
        ({"torch": 2.13}, "torch must be a text or null, got 2.13"),
        ({"commit": 5}, "commit must be the commit measured, or null, got 5"),
        ({"commit": None}, "dirty must be true without a commit, got False"),
        ({"dirty": None}, "dirty must be a bool, got None"),
        ({"source": "me"}, "source must be null in a measured record, got 'me'"),
        ({"case": {"model": "pi05"}}, "case must be complete: model, cameras, .*, got"),
        ({"case": {"batch": 1}}, "case must be as in Case, got"),
        ({"case": None}, "case must be as in Case, got None"),
        ({"ms": {}}, "ms must be at least one time, got {}"),
        ({"ms": {"total": Percentiles(3.0)}}, r"ms\.total must be p50, p90 and p99, got"),
        ({"ms": {"total": Percentiles(3.0, 2.0, 4.0)}}, r"ms\.total must be positive and asc"),
        ({"ms": {"total": Percentiles(0.0, 2.0, 4.0)}}, r"ms\.total must be positive and asc"),
        ({"ms": {"total": Percentiles(math.nan, 2.0, 4.0)}}, r"ms\.total must be positive"),
        ({"floor_ms": {"total": math.inf}}, "floor_ms must be milliseconds by name, or null"),
        ({"floor_ms": 7.7}, "floor_ms must be milliseconds by name, or null, got 7.7"),
        ({"peak_bytes": 0}, "peak_bytes must be an int or null, got 0"),
        ({"peak_bytes": 7e9}, "peak_bytes must be an int or null"),
        ({"error": -0.1}, "error must be ≥ 0 or null, got -0.1"),
        ({"numbers": {"copies": math.nan}}, "numbers must be finite numbers by name"),
        ({"numbers": [1]}, r"numbers must be finite numbers by name, got \[1\]"),
    ],
)
def test_a_field_that_breaks_the_schema_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        dataclasses.replace(MEASURED, **changes)


def test_a_wrong_field_of_the_case_is_named() -> None:
    with pytest.raises(RecordError, match=r"case: Case\.cameras must be an int .*, got 0"):
        dataclasses.replace(MEASURED, case={**MEASURED.case, "cameras": 0})
    with pytest.raises(RecordError, match=r"case: Case\.precision must be one of"):
        dataclasses.replace(QUOTED, case={"precision": "int8"})


def test_what_a_copy_without_history_measured_is_dirty() -> None:
    assert dataclasses.replace(MEASURED, commit=None, dirty=True).commit is None


def test_a_line_of_the_first_schema_has_no_numbers() -> None:
    line = json.loads(MEASURED.to_json()) | {"schema": 1}
    del line["numbers"]
    read = record_from_json(json.dumps(line))
    assert read == dataclasses.replace(MEASURED, numbers={})
    del line["error"]
    with pytest.raises(RecordError, match="missing: error"):
        record_from_json(json.dumps(line))


def test_the_newest_record_of_each_case_counts() -> None:
    later = dataclasses.replace(MEASURED, error=0.5)
    other = dataclasses.replace(MEASURED, engine="triton")
    assert newest([MEASURED, QUOTED, other, later]) == [later, other]


def test_a_shape_that_a_kernel_no_longer_has_is_gone() -> None:
    def of(*names: str) -> Record:
        ms = dict.fromkeys(names, Percentiles(0.01, 0.01, 0.01))
        return dataclasses.replace(MEASURED, benchmark="kernels", ms=ms, floor_ms=None)

    other, later = of("geglu/prefill"), of("linear/wide")
    assert newest([of("linear/wide", "linear/gone"), other, later]) == [later, other]


def test_what_others_measured_has_a_source() -> None:
    with pytest.raises(RecordError, match="source must be where a quoted record is from, got None"):
        dataclasses.replace(QUOTED, source=None)


def edited(**changes: Any) -> str:
    return json.dumps(json.loads(MEASURED.to_json()) | changes)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "must be one JSON object, got ''"),
        ('{"kind": "meas', "must be one JSON object, got"),
        ("[]", "missing: benchmark, .*; unknown: none"),
        ('{"kind": "measured"}', "missing: benchmark"),
        (edited(speed=1), "missing: none; unknown: speed"),
        (edited(ms=[1.0]), r"ms must map names to percentiles, got \[1.0\]"),
        (edited(ms={"total": 1.0}), "ms must map names to percentiles"),
        (edited(ms={"total": {"p95": 1.0}}), "ms must have p50, p90 and p99 of each name"),
        (edited(ms={"total": {"p50": "1"}}), r"ms\.total must be positive and ascending"),
        (edited(ms={"total": {"p50": None}}), r"ms\.total must be positive and ascending"),
        (edited(kind=["measured"]), "kind must be one of"),
    ],
)
def test_a_line_that_is_no_record_says_why(line: str, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        record_from_json(line)


def test_reading_names_file_and_line(tmp_path: Path) -> None:
    path = append_record(MEASURED, tmp_path)
    path.write_text(path.read_text() + "half a rec")
    with pytest.raises(RecordError, match=r"stages\.jsonl:2: a record must be one JSON object"):
        read_records(tmp_path)


def test_the_records_of_the_repository_are_valid() -> None:
    records = read_records(ROOT / "benchmarks" / "results")
    assert {"quoted", "predicted"} <= {record.kind for record in records}
