"""Tables of the scripts that measure a control loop and a server, from their own records."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfpi.perf.records import commit_label

Rows = tuple[Sequence[str], Sequence[Sequence[str]]]


def read_runs(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of each file of JSON lines in `directory`, by its name without ending."""
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(directory.glob("*.jsonl"))
    }


def _loop_jitter(records: Sequence[Mapping[str, Any]]) -> Rows:
    """Tick errors, and what became of the stalls, of each run of benchmarks/loop_jitter.py."""
    header = (
        "device", "load", "priority", "seconds", "tick error p50 ms", "p99 ms", "max ms",
        "missed ticks", "stalls seen", "held ticks", "commit",
    )  # fmt: skip
    rows = []
    for record in records:
        case, result = record["case"], record["result"]
        rows.append(
            (
                *_place(record),
                "–" if case["priority"] is None else str(case["priority"]),
                f"{case['seconds']:g}",
                *(f"{result[f'tick_error_{rank}_ms']:.2f}" for rank in ("p50", "p99", "max")),
                str(result["missed_ticks"]),
                f"{result['stalls_visible']}/{result['stalls_injected']}",
                str(result["held_ticks"]),
                commit_label(record["commit"], record["dirty"]),
            )
        )
    return header, rows


def _serve_load(records: Sequence[Mapping[str, Any]]) -> Rows:
    """What serving adds to a call, and how clients fared, of each run of serve_load.py."""
    header = (
        "device", "load", "policy", "batch", "overhead p50 ms", "p99 ms", "clients", "seconds",
        "replies each", "a second", "starved", "lost", "memory MiB", "commit",
    )  # fmt: skip
    rows = []
    for record in records:
        overhead, replies = record["overhead_ms"], record["replies"]
        memory = record["server_rss_mib"]
        rows.append(
            (
                *_place(record),
                record["policy"],
                str(record["max_batch"]),
                f"{overhead['p50']:.2f}",
                f"{overhead['p99']:.2f}",
                str(record["clients"]),
                f"{record['seconds']:g}",
                f"{replies['least']}–{replies['most']}",
                f"{replies['all'] / record['seconds']:.1f}",
                str(int(record["starved"])),
                str(record["disconnected"]),
                f"{memory['half_time']:.0f} → {memory['end']:.0f}",
                commit_label(record["commit"], record["dirty"]),
            )
        )
    return header, rows


def _batching(records: Sequence[Mapping[str, Any]]) -> Rows:
    """Milliseconds an observation by the size of its pass, median and least."""
    sizes = list(records[0]["each_ms"]) if records else []
    header = (
        "device",
        "load",
        "policy",
        "threads",
        *(f"{size} a pass" for size in sizes),
        "commit",
    )
    rows = []
    for record in records:
        each = (record["each_ms"][size] for size in sizes)
        shown = (f"{ms['p50']:.1f} ({ms['least']:.1f})" for ms in each)
        rows.append(
            (
                *_place(record),
                record["policy"],
                str(record["threads"]),
                *shown,
                commit_label(record["commit"], record["dirty"]),
            )
        )
    return header, rows


def _reuse_rate(records: Sequence[Mapping[str, Any]]) -> Rows:
    """Actions a second by calls a prefix, and against one, of each run of reuse_rate.py."""
    settings = list(records[0]["actions_per_second"]) if records else []
    header = (
        "device", "load", "precision", "steps", "executed",
        *(f"{calls} a prefix, actions/s" for calls in settings), "commit",
    )  # fmt: skip
    rows = []
    for record in records:
        rates = record["actions_per_second"]
        rows.append(
            (
                *_place(record),
                record["precision"],
                str(record["steps"]),
                str(record["executed"]),
                *(f"{rate:.0f} ({rate / rates['1']:.2f} ×)" for rate in rates.values()),
                commit_label(record["commit"], record["dirty"]),
            )
        )
    return header, rows


RUN_TABLES: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], Rows]] = {
    "batching": _batching,
    "loop-jitter": _loop_jitter,
    "reuse-rate": _reuse_rate,
    "serve-load": _serve_load,
}


def _place(record: Mapping[str, Any]) -> tuple[str, str]:
    return f"{record['device']}, {record['cores']} cores", f"{record['load']:.1f}"
