"""Benchmark records: one JSON object a line, appended and never changed.

A record says what was run, where, from which commit, and what came out. Reading and writing check
alike, so a file holds nothing that its tables cannot show.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from halfpi.perf.cases import Case

SCHEMA = 2
Kind = Literal["measured", "predicted", "quoted"]


class RecordError(ValueError):
    """A record that does not follow the schema; the message names the field and what came."""


def commit_label(commit: str | None, dirty: bool | None) -> str:
    """A commit as tables show it, with a star if the code had changes."""
    return f"{(commit or '')[:7]}{'*' if dirty else ''}"


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds over many runs. A quoted time may be a median without the others."""

    p50: float
    p90: float | None = None
    p99: float | None = None


@dataclass(frozen=True)
class Record:
    """One benchmark of one case on one device.

    kind: "measured" here; "predicted" by a model; "quoted" from `source`, which others must name.
    benchmark: what was timed, such as "e2e" or "stages". engine: what ran, such as "eager".
    commit, dirty: of halfpi; an installed release is its version. A commit that nobody knows is
    None, and dirty. device: as torch or the operating system calls it. driver, torch, triton, cuda:
    versions, None where there is none.
    case: the fields of `Case`; of quoted and predicted ones, those that are known.
    ms: milliseconds by stage, or whatever the benchmark tells apart, and "total".
    floor_ms: by the same names, None where no floor is known. peak_bytes: of device memory.
    error: ‖result − reference‖ / ‖reference‖ against fp32, None if not compared.
    numbers: what else was measured, units in the names: "KEY NAME" belongs to the time NAME, a key
    alone to the total. Since schema 2.

    Raises RecordError for a field of a wrong type or value.
    """

    kind: Kind
    benchmark: str
    engine: str
    device: str
    case: Mapping[str, int | str]
    ms: Mapping[str, Percentiles]
    source: str | None = None
    commit: str | None = None
    dirty: bool | None = None
    driver: str | None = None
    torch: str | None = None
    triton: str | None = None
    cuda: str | None = None
    floor_ms: Mapping[str, float] | None = None
    peak_bytes: int | None = None
    error: float | None = None
    schema: int = SCHEMA
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(asdict(self), allow_nan=False, ensure_ascii=False)


def record_from_json(line: str) -> Record:
    """Rebuild a record. Raises RecordError for what is not JSON or not a record."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise RecordError(f"a record must be one JSON object, got {line[:80]!r}") from error
    if isinstance(data, dict) and data.get("schema") == 1:
        data = {"numbers": {}} | data | {"schema": SCHEMA}
    names = {field.name for field in fields(Record)}
    if not isinstance(data, dict) or set(data) != names:
        got = set(data) if isinstance(data, dict) else set()
        raise RecordError(
            f"a record must have exactly the fields of the schema; missing: "
            f"{_listed(names - got)}; unknown: {_listed(got - names)}"
        )
    ms = data["ms"]
    if not isinstance(ms, dict) or not all(isinstance(times, dict) for times in ms.values()):
        raise RecordError(f"ms must map names to percentiles, got {ms!r:.80}")
    try:
        data["ms"] = {name: Percentiles(**times) for name, times in ms.items()}
    except TypeError as error:
        raise RecordError(f"ms must have p50, p90 and p99 of each name, got {ms!r:.80}") from error
    return Record(**data)


def append_record(record: Record, results: Path) -> Path:
    """Append `record` to results/<device>/<benchmark>.jsonl, and return that file."""
    path = results / slug(record.device) / f"{slug(record.benchmark)}.jsonl"
    append_line(path, record.to_json())
    return path


def append_line(path: Path, line: str) -> None:
    """Append `line` to the file at `path`, which is made if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # One write to a file opened for appending: two benchmarks at once cannot mix their lines.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def read_records(results: Path) -> list[Record]:
    """All records below `results`, files in order of name.

    Raises RecordError that names file and line.
    """
    records = []
    for path in sorted(results.rglob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                records.append(record_from_json(line))
            except RecordError as error:
                raise RecordError(f"{path}:{number}: {error}") from error
    return records


def newest(records: Iterable[Record]) -> list[Record]:
    """The last measured record of each benchmark, device, engine, case and kernel.

    A kernel's times are called "kernel/shape"; what was no longer measured last time is gone.
    """
    found: dict[tuple[object, ...], Record] = {}
    for each in records:
        if each.kind == "measured":
            kernels = {name.partition("/")[0] for name in each.ms if "/" in name}
            measured = (each.benchmark, each.device, each.engine, *each.case.items())
            found[*measured, *sorted(kernels)] = each
    return list(found.values())


def _check(record: Record) -> None:
    _require("schema", record.schema, record.schema == SCHEMA, f"{SCHEMA}")
    _require("kind", record.kind, record.kind in get_args(Kind), f"one of {get_args(Kind)}")
    measured = record.kind == "measured"
    for name in ("benchmark", "engine", "device"):
        value = getattr(record, name)
        _require(name, value, bool(value) and isinstance(value, str), "a text")
    for name in ("driver", "torch", "triton", "cuda"):
        value = getattr(record, name)
        _require(name, value, value is None or isinstance(value, str), "a text or null")
    if measured:
        known = record.commit is not None
        is_text = isinstance(record.commit, str) or not known
        _require("commit", record.commit, is_text, "the commit measured, or null")
        fits = isinstance(record.dirty, bool) and (known or record.dirty)
        _require("dirty", record.dirty, fits, "a bool" if known else "true without a commit")
        _require("source", record.source, record.source is None, "null in a measured record")
    else:
        is_named = bool(record.source) and isinstance(record.source, str)
        _require("source", record.source, is_named, f"where a {record.kind} record is from")
    _check_case(record.case, complete=measured)
    _check_times(record.ms, complete=measured)
    floor_ms = record.floor_ms
    fits = floor_ms is None or (
        isinstance(floor_ms, Mapping) and all(map(_is_positive, floor_ms.values()))
    )
    _require("floor_ms", floor_ms, fits, "milliseconds by name, or null")
    peak, error = record.peak_bytes, record.error
    _require("peak_bytes", peak, peak is None or (type(peak) is int and peak > 0), "an int or null")
    _require("error", error, error is None or error == 0 or _is_positive(error), "≥ 0 or null")
    numbers = record.numbers
    fits = isinstance(numbers, Mapping) and all(map(_is_number, numbers.values()))
    _require("numbers", numbers, fits, "finite numbers by name")


def _check_case(case: Mapping[str, int | str], *, complete: bool) -> None:
    """A complete case must be a `Case`; of an incomplete one, what is there must be."""
    filler: dict[str, Any] = asdict(Case("", 1, 1, 1, 1, "bf16"))
    _require("case", case, isinstance(case, Mapping) and set(case) <= set(filler), "as in Case")
    if complete:
        _require("case", case, set(case) == set(filler), f"complete: {', '.join(filler)}")
    try:
        Case(**(filler | dict(case)))
    except ValueError as error:
        raise RecordError(f"case: {error}") from error


def _check_times(ms: Mapping[str, Percentiles], *, complete: bool) -> None:
    _require("ms", ms, bool(ms) and isinstance(ms, Mapping), "at least one time")
    for name, times in ms.items():
        known = [time for time in (times.p50, times.p90, times.p99) if time is not None]
        fits = all(map(_is_positive, known)) and known == sorted(known)
        _require(f"ms.{name}", times, fits and times.p50 is not None, "positive and ascending")
        if complete:
            _require(f"ms.{name}", times, len(known) == 3, "p50, p90 and p99")


def _require(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise RecordError(f"{name} must be {expected}, got {value!r:.120}")


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and _is_number(value) and value > 0


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def slug(text: str) -> str:
    """`text` as a file name: "NVIDIA H200" becomes nvidia-h200."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
