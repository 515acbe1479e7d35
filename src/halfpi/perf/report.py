"""What a terminal shows of records: floors, what was measured, and the share of the floor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from halfpi.perf.records import Record

# Benchmark → unit, how many are in a millisecond, and digits, where it is not of milliseconds.
_UNITS = {
    **dict.fromkeys(("kernels", "mlp", "attention"), ("µs", 1000.0, 1)),
    "cold": ("s", 0.001, 1),
}


def report(records: Sequence[Record]) -> RenderableType:
    """One table of `records` of one benchmark on one device, and a line of the other numbers each.

    Raises ValueError without any.
    """
    if not records:
        raise ValueError("there is nothing to report: no record was measured")
    first = records[0]
    unit, scale, digits = unit_of(first.benchmark)
    table = Table(title=f"{first.benchmark}, {first.device}", caption=_caption(first))
    table.add_column("engine")
    table.add_column("")
    known, keys = any(record.floor_ms for record in records), _keys(records)
    times = ["floor"] * known + ["p50", "p90", "p99"]
    for column in (*(f"{name} {unit}" for name in times), *["share"] * known, *keys):
        table.add_column(column, justify="right")
    for record in records:
        for name, measured in record.ms.items():
            floor = (record.floor_ms or {}).get(name)
            milliseconds = [floor] * known + [measured.p50, measured.p90, measured.p99]
            shown = (_shown(None if ms is None else ms * scale, digits) for ms in milliseconds)
            share = "" if floor is None else f"{floor / measured.p50:.0%}"
            numbers = (_shown(number_of(record, key, name), 2) for key in keys)
            table.add_row(_engine(record), name, *shown, *[share] * known, *numbers)
    notes = [line for record in records for line in _others(record)]
    if not known:
        notes.append(f"No floor is known on {first.device} (devices.toml).")
    return Group(table, *notes)


def unit_of(benchmark: str) -> tuple[str, float, int]:
    """In which times of `benchmark` are shown, how many are in a millisecond, and digits."""
    return _UNITS.get(benchmark, ("ms", 1.0, 2))


def number_of(record: Record, key: str, name: str) -> float | None:
    """The number `key` that belongs to the time `name` of `record`, if there is one."""
    return record.numbers.get(key if name == "total" else f"{key} {name}")


def _keys(records: Sequence[Record]) -> list[str]:
    """Of the numbers that belong to a time."""
    pairs = (number.split(" ", 1) for record in records for number in record.numbers)
    return list(dict.fromkeys(pair[0] for pair in pairs if len(pair) == 2))


def _engine(record: Record) -> str:
    return f"{record.engine}, {record.case['precision']}"


def _others(record: Record) -> Iterator[str]:
    """What a record has beside times, as a line if there is anything."""
    found = {name: f"{number:.4g}" for name, number in record.numbers.items() if " " not in name}
    if record.error is not None:
        found["error"] = f"{record.error:.2g}"
    if record.peak_bytes is not None:
        found["peak_gb"] = f"{record.peak_bytes / 1e9:.2f}"
    if found:
        said = ", ".join(f"{name} {value}" for name, value in found.items())
        yield f"{_engine(record)}: {said}"


def _caption(record: Record) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.case.items() if key != "precision")


def _shown(number: float | None, digits: int) -> str:
    return "" if number is None else f"{number:.{digits}f}"
