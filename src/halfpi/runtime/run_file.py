"""A run of a control loop as JSON lines, to be looked at later: `halfpi report` draws it.

The first line says what it is, with the summary; then come a line for each call, stall and mode of
reuse, and one each for the series of the ticks.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from halfpi.runtime.report import Call, LoopReport, Stall
from halfpi.runtime.reuse import ReuseReport
from halfpi.types import StageTimes

SCHEMA = "halfpi.run/1"
_SERIES = ("tick_errors_ms", "ages_ms")


def save_run(
    report: LoopReport, path: Path, reuse: Mapping[str, ReuseReport] | None = None
) -> None:
    """Write `report` to `path`, which appears whole or not at all.

    reuse: `ReusingPolicy.reports`.
    """
    lines = [json.dumps(line, allow_nan=False) for line in _lines(report, reuse or {})]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)


def load_run(path: Path) -> tuple[LoopReport, dict[str, dict[str, float]]]:
    """What `save_run` wrote: the report, and the counts of each mode of reuse.

    Raises ValueError naming the file and the line that is wrong.
    """
    report, reuse = LoopReport(0.0), dict[str, dict[str, float]]()
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            if number == 1 and line.get("schema") != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}, got {line.get('schema')!r}")
            _read(line, report, reuse)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a line of a run: {error}") from error
    if not report.rate_hz > 0:
        raise ValueError(f"{path}: rate_hz must be positive, got {report.rate_hz}")
    return report, reuse


def _lines(report: LoopReport, reuse: Mapping[str, ReuseReport]) -> list[dict[str, Any]]:
    head = {"schema": SCHEMA, "summary": report.summary()}
    calls = [{"call": asdict(call)} for call in report.calls]
    stalls = [{"stall": asdict(stall)} for stall in report.stalls]
    modes = [
        {
            "reuse": name,
            "hits": mode.hits,
            "misses": mode.misses,
            "max_age": mode.max_age,
            "saved_ms": mode.saved_ms,
        }
        for name, mode in reuse.items()
    ]
    series = [{name: list(getattr(report, name))} for name in _SERIES]
    return [head, *calls, *stalls, *modes, *series]


def _read(line: dict[str, Any], report: LoopReport, reuse: dict[str, dict[str, float]]) -> None:
    if "schema" in line:
        summary = line["summary"]
        report.rate_hz = float(summary["rate_hz"])
        report.missed_ticks = int(summary["missed_ticks"])
        report.waiting_ticks = int(summary["waiting_ticks"])
    elif "call" in line:
        call = dict(line["call"])
        times = call.pop("times")
        kept = tuple(call.pop("kept"))
        stages = None if times is None else StageTimes(**times)
        report.calls.append(Call(**call, times=stages, kept=kept))
    elif "stall" in line:
        report.stalls.append(Stall(**line["stall"]))
    elif "reuse" in line:
        mode = line.pop("reuse")
        reuse[mode] = {name: float(value) for name, value in line.items()}
    else:
        [(name, values)] = line.items()
        if name not in _SERIES:
            raise ValueError(f"unknown series {name!r}")
        setattr(report, name, array("d", values))
