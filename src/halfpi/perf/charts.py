"""Charts of benchmarks, drawn from records.

`python -m halfpi.perf.charts` draws those of a checkout anew: docs/<benchmark>-<device>.svg for
every benchmark that has records of the full size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfpi.files import atomic_write
from halfpi.perf.cases import ABLATION, standard_case
from halfpi.perf.records import Record, newest, read_records, slug
from halfpi.perf.report import unit_of

RESULTS = Path("benchmarks/results")
_MODEL = standard_case().model


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw `records` of one benchmark into `path`; its suffix is the format.

    Raises ValueError without records, or with those of several benchmarks, and ModuleNotFoundError
    without matplotlib.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    benchmarks = {record.benchmark for record in records if record.kind == "measured"}
    if len(benchmarks) != 1:
        raise ValueError(f"a chart is of one benchmark, got {', '.join(benchmarks) or 'none'}")
    # Text stays text, and ids are the same every time: a chart changes when its numbers do.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "halfpi", "font.size": 9}):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        bars = _DRAWERS.get(benchmarks.pop(), _bars)(axes, records)
        figure.set_size_inches(8, 1.2 + 0.26 * bars)
        measured = next(record for record in records if record.kind == "measured")
        axes.set_title(f"{measured.benchmark}, {measured.device}")
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=path.suffix.removeprefix("."), metadata=metadata)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the charts of a checkout."""
    parser = argparse.ArgumentParser(prog="python -m halfpi.perf.charts", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="of the checkout")
    root = parser.parse_args(arguments).root
    records = [
        record for record in read_records(root / RESULTS) if record.case.get("model") == _MODEL
    ]
    for (benchmark, device), own in _groups(records).items():
        draw(own, root / "docs" / f"{slug(benchmark)}-{slug(device)}.svg")


def _groups(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The newest measured records of each benchmark and device; with stages, what others take."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in newest(records):
        groups.setdefault((record.benchmark, record.device), []).append(record)
    for (benchmark, device), own in groups.items():
        if benchmark == "stages":
            own.extend(
                record
                for record in records
                if record.kind == "quoted" and record.device == device and _is_standard(record)
            )
    return groups


def _is_standard(record: Record) -> bool:
    standard = standard_case()
    names = ("cameras", "prompt_tokens", "horizon", "steps")
    return all(record.case.get(name) == getattr(standard, name) for name in names)


def _bars(axes: Any, records: Sequence[Record]) -> int:
    """A bar for each time, with its floor as a mark; returns how many."""
    unit, scale, _ = unit_of(records[0].benchmark)
    names, lengths, floors = [], [], []
    for record in records:
        for name, times in record.ms.items():
            label = record.engine if name == "total" else f"{record.engine}, {name}"
            names.append(f"{label}, {record.case['precision']}")
            lengths.append(times.p50 * scale)
            floors.append((record.floor_ms or {}).get(name, 0) * scale)
    places = range(len(names))
    axes.barh(places, lengths, color="tab:blue")
    axes.bar_label(axes.containers[0], fmt="%.1f", padding=3)
    known = [(floor, place) for place, floor in zip(places, floors, strict=True) if floor]
    if known:
        axes.plot(*zip(*known, strict=True), "|", color="black", markersize=9, label="floor")
        axes.legend()
    _finish(axes, names, f"{unit}, median")
    return len(names)


def _stacks(axes: Any, records: Sequence[Record]) -> int:
    """A bar for each engine, stacked of its stages, slowest last; returns how many."""
    ordered = sorted(records, key=lambda record: record.ms["total"].p50)
    parts = dict.fromkeys(name for record in ordered for name in _parts(record))
    starts = [0.0] * len(ordered)
    for part in parts:
        lengths = [_parts(record).get(part, 0.0) for record in ordered]
        axes.barh(range(len(ordered)), lengths, left=starts, label=part)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for place, (record, end) in enumerate(zip(ordered, starts, strict=True)):
        axes.annotate(f" {record.ms['total'].p50:.1f}", (end, place), va="center")
    axes.legend(loc="upper right")
    names = [f"{record.engine}, {record.case.get('precision', '?')}" for record in ordered]
    if len(set(names)) < len(names):  # of several cases
        pairs = zip(names, ordered, strict=True)
        names = [f"{name}, {_workload(record)}" for name, record in pairs]
    _finish(axes, names, "ms, median")
    return len(names)


def _workload(record: Record) -> str:
    words = {"cameras": "cameras", "prompt_tokens": "tokens", "horizon": "actions"}
    return ", ".join(f"{record.case.get(name, '?')} {word}" for name, word in words.items())


def _waterfall(axes: Any, records: Sequence[Record]) -> int:
    """What each variant takes, and what it saves of the one before; returns how many there are."""
    before, order = None, list(ABLATION)
    records = sorted(records, key=lambda record: order.index(record.engine))
    for place, record in enumerate(records):
        now = record.ms["total"].p50
        axes.barh(place, now, color="tab:blue")
        if before is not None and before > now:
            axes.barh(place, before - now, left=now, color="tab:green", alpha=0.35)
        end = now if before is None else max(now, before)
        axes.annotate(f" {now:.1f} ms, {1000 / now:.1f} Hz", (end, place), va="center")
        before = now
    names = [record.engine for record in records]
    times = [record.ms["total"].p50 for record in records]
    axes.set_xscale("log")  # steps are factors; from the first to the last it is tens of times
    axes.set_xlim(min(times) / 2, max(times) * 3)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    _finish(axes, names, "ms, median; pale: saved by this step")
    return len(names)


_DRAWERS: Mapping[str, Callable[[Any, Sequence[Record]], int]] = {
    "ablation": _waterfall,
    "stages": _stacks,
    "paced": _stacks,
}


def _parts(record: Record) -> dict[str, float]:
    """The stages that `record` tells apart, or the total."""
    stages = {name: times.p50 for name, times in record.ms.items() if name != "total"}
    return stages or {"total": record.ms["total"].p50}


def _finish(axes: Any, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    if axes.get_xscale() == "linear":
        axes.margins(x=0.2)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
