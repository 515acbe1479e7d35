"""What a terminal shows of records: floors, what was measured, and the share of the floor."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from halfpi.perf.records import Record

# Benchmarks of work that takes microseconds.
SHORT = ("kernels", "mlp", "attention")


def report(records: Sequence[Record]) -> RenderableType:
    """One table of `records` of one benchmark on one device.

    Raises ValueError without any.
    """
    if not records:
        raise ValueError("there is nothing to report: no record was measured")
    first = records[0]
    unit, scale, digits = ("µs", 1000.0, 1) if first.benchmark in SHORT else ("ms", 1.0, 2)
    keys = list(dict.fromkeys(_key(key, record) for record in records for key in record.numbers))
    table = Table(title=f"{first.benchmark}, {first.device}", caption=_caption(first))
    for column in ("engine", "precision", ""):
        table.add_column(column)
    times = (f"floor {unit}", *(f"{name} {unit}" for name in ("p50", "p90", "p99")))
    for column in (*times, "share of floor", "error", *keys):
        table.add_column(column, justify="right")
    for record in records:
        for name, measured in record.ms.items():
            floor = (record.floor_ms or {}).get(name)
            milliseconds = (floor, measured.p50, measured.p90, measured.p99)
            table.add_row(
                record.engine,
                str(record.case["precision"]),
                name,
                *(_shown(None if ms is None else ms * scale, digits) for ms in milliseconds),
                "" if floor is None else f"{floor / measured.p50:.0%}",
                _shown(record.error if name == "total" else None, 5),
                *(_shown(number_of(record, key, name), 2) for key in keys),
            )
    if any(record.floor_ms for record in records):
        return table
    return Group(table, f"No floor is known on {first.device} (devices.toml).")


def number_of(record: Record, key: str, name: str) -> float | None:
    """The number `key` that belongs to the time `name` of `record`, if there is one."""
    return record.numbers.get(key if name == "total" else f"{key} {name}")


def _key(number: str, record: Record) -> str:
    key, _, name = number.partition(" ")
    return key if name in record.ms or not name else number


def _caption(record: Record) -> str:
    return ", ".join(f"{key} {value}" for key, value in record.case.items() if key != "precision")


def _shown(number: float | None, digits: int) -> str:
    return "" if number is None else f"{number:.{digits}f}"
