"""One HTML page, with its pictures inside, that shows where the time of a run went.

It reads runs of the control loop (`halfpi.runtime.save_run`) and benchmark records. Needs the extra
`report`.
"""

from __future__ import annotations

import html
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from halfpi.perf.records import Record, record_from_json
from halfpi.runtime.report import Call, LoopReport
from halfpi.runtime.run_file import SCHEMA, load_run
from halfpi.types import StageTimes

_STAGES = ("processing", "vision", "prefill", "denoise")
_COLOURS = {"call": "#4477aa", "warm-up": "#bbbbbb", "failed": "#ee6677", "held": "#ccbb44"}
_STYLE = """body { font: 15px/1.45 system-ui, sans-serif; max-width: 60em; margin: 2em auto; }
table { border-collapse: collapse; } td, th { padding: .15em .8em; text-align: right; }
th:first-child, td:first-child { text-align: left; } svg { max-width: 100%; height: auto; }"""


def write_report(paths: Sequence[Path], output: Path) -> None:
    """Draw the files `paths`, a section each, into `output`, which appears whole or not at all.

    Raises ValueError naming the file that is neither a run nor benchmark records.
    """
    sections = [f"<h2>{_text(path.name)}</h2>{_of(path)}" for path in paths]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>latency</title>'
        f"<style>{_STYLE}</style><h1>Latency</h1>{''.join(sections)}</html>\n"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(output)


def _of(path: Path) -> str:
    """The section of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise ValueError(f"{path} is empty: expected a run of the control loop, or records")
    if SCHEMA in lines[0]:
        return _run(*load_run(path))
    try:
        return _records([record_from_json(line) for line in lines])
    except ValueError as error:
        message = f"{path} is neither a run of the control loop nor records: {error}"
        raise ValueError(message) from error


def _run(report: LoopReport, reuse: Mapping[str, Mapping[str, float]]) -> str:
    parts = [
        _table(("of the run", ""), [(k, _number(v)) for k, v in report.summary().items()]),
        "<h3>Latency of calls and their stages</h3>",
        _svg(_histograms(report)),
        "<h3>Timeline</h3>",
        _svg(_timeline(report)),
    ]
    if reuse:
        rows = [
            (name, *(_number(mode[key]) for key in ("hits", "misses", "max_age", "saved_ms")))
            for name, mode in reuse.items()
        ]
        parts.append("<h3>Reuse</h3>")
        parts.append(_table(("what", "hits", "misses", "oldest", "saved ms"), rows))
    failures = [(call.tick, call.error) for call in report.calls if call.error]
    if failures:
        rows = [(str(tick), str(error)) for tick, error in failures]
        parts += ["<h3>Failed calls</h3>", _table(("tick", "error"), rows)]
    return "".join(parts)


def _histograms(report: LoopReport) -> Figure:
    series = {"call": report.latencies_ms}
    times = [call.times for call in report.calls if call.times is not None and not call.warm_up]
    for stage in _STAGES:
        series[stage] = [_stage_ms(one, stage) for one in times]
    figure = Figure(figsize=(9, 2.4 * 2), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(2, 3).flat, series.items(), strict=False):
        axes.hist(values, bins=40, color=_COLOURS["call"])
        median = f"p50 {np.median(values):.2f} ms" if values else "none"
        axes.set_title(f"{name}: {median}", fontsize=10)
        axes.set_xlabel("ms")
    figure.axes[-1].hist(
        report.tick_errors_ms, bins=40, color=_COLOURS["call"], log=report.ticks > 0
    )
    figure.axes[-1].set_title("tick error", fontsize=10)
    figure.axes[-1].set_xlabel("ms")
    return figure


def _timeline(report: LoopReport) -> Figure:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    calls, reuse, ticks = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 2))
    _draw_calls(calls, report)
    _draw_reuse(reuse, report)
    times = np.arange(report.ticks) / report.rate_hz
    ticks.plot(times, report.tick_errors_ms, linewidth=0.6, color=_COLOURS["call"])
    ticks.set_ylabel("tick error ms")
    ticks.set_xlabel("s")
    return figure


def _draw_calls(axes: Axes, report: LoopReport) -> None:
    for kind in ("call", "warm-up", "failed"):
        found = [call for call in report.calls if _kind(call) == kind]
        if found:
            begins = [call.tick / report.rate_hz for call in found]
            latencies_ms = [call.latency_ms for call in found]
            axes.vlines(begins, 0, latencies_ms, color=_COLOURS[kind], label=kind)
    for index, stall in enumerate(report.stalls):
        begin = stall.tick / report.rate_hz
        label = "held" if index == 0 else None
        end = begin + stall.ticks / report.rate_hz
        axes.axvspan(begin, end, color=_COLOURS["held"], alpha=0.6, label=label)
    axes.set_ylabel("call ms")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", fontsize=8)


def _draw_reuse(axes: Axes, report: LoopReport) -> None:
    """A row for each thing that calls took over, a mark for each call that did."""
    names = sorted({name for call in report.calls for name in call.kept})
    for row, name in enumerate(names):
        begins = [call.tick / report.rate_hz for call in report.calls if name in call.kept]
        axes.plot(begins, [row] * len(begins), "|", color=_COLOURS["call"])
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("kept" if names else "nothing kept", fontsize=8)


def _kind(call: Call) -> str:
    if call.error is not None:
        return "failed"
    return "warm-up" if call.warm_up else "call"


def _stage_ms(times: StageTimes, stage: str) -> float:
    ms: float = getattr(times, f"{stage}_ms")
    return ms


def _records(records: Iterable[Record]) -> str:
    parts = []
    for record in records:
        case = ", ".join(f"{name} {value}" for name, value in record.case.items())
        title = f"{record.benchmark}, {record.engine} on {record.device} ({record.kind})"
        floors = record.floor_ms or {}
        rows = [
            (name, *map(_number, (t.p50, t.p90, t.p99, floors.get(name))))
            for name, t in record.ms.items()
        ]
        parts += [f"<h3>{_text(title)}</h3><p>{_text(case)}</p>"]
        parts += [_table(("ms", "p50", "p90", "p99", "floor"), rows), _svg(_bars(record))]
    return "".join(parts)


def _bars(record: Record) -> Figure:
    names = list(record.ms)
    figure = Figure(figsize=(7, 0.5 + 0.35 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [record.ms[name].p50 for name in names], color=_COLOURS["call"], label="p50")
    for row, name in enumerate(names):
        if record.floor_ms and name in record.floor_ms:
            axes.plot([record.floor_ms[name]] * 2, [row - 0.4, row + 0.4], color=_COLOURS["failed"])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    return figure


def _svg(figure: Figure) -> str:
    """The figure as an SVG element whose text stays text; the same figure gives the same bytes."""
    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "halfpi"}):
        figure.savefig(target, format="svg", metadata={"Date": None})
    picture = target.getvalue()
    return picture[picture.index("<svg") :]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [("th", header), *(("td", row) for row in rows)]
    body = "".join(
        f"<tr>{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in row)}</tr>" for tag, row in lines
    )
    return f"<table>{body}</table>"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _text(value: str) -> str:
    return html.escape(value)
