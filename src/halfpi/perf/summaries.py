"""What the tables of benchmarks show: rows from records, for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from halfpi.config import PRESETS
from halfpi.perf.cases import ABLATION, STAGES, TARGETS, standard_case
from halfpi.perf.devices import NoFloorError, find_device
from halfpi.perf.records import Record, commit_label, newest
from halfpi.perf.report import number_of
from halfpi.perf.roofline import floors

TIMES = (*STAGES, "total")
_CASE = ("cameras", "prompt_tokens", "horizon", "steps")


class Summary(NamedTuple):
    """The header and the rows of a table."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def standard(records: Sequence[Record]) -> Summary:
    """The standard case on each device where an engine of ours ran: floor, target, ours, others."""
    own = _of("stages", records)
    rows: list[tuple[str, ...]] = []
    for device in dict.fromkeys(record.device for record in own if _is_standard(record)):
        rows += _bounds(device)
        compared = [
            record
            for record in (*own, *(each for each in records if each.kind == "quoted"))
            if record.device == device and _is_standard(record)
        ]
        for record in sorted(compared, key=lambda record: record.ms["total"].p50):
            name = record.engine if record.kind == "quoted" else f"**halfpi, {record.engine}**"
            precision = str(record.case["precision"])
            measured_at = commit_label(record.commit, record.dirty)
            rows.append((device, name, precision, *_times(record), measured_at))
    header = ("device", "", "precision", *(f"{name} ms" for name in TIMES), "commit")
    return Summary(header, rows)


def paced(records: Sequence[Record]) -> Summary:
    """Stages of an engine that is asked at a rate."""
    header = ("device", "engine", "precision", "cameras", "prompt", "chunk", "calls a second")
    rows: list[tuple[str, ...]] = [
        (
            record.device,
            record.engine,
            str(record.case["precision"]),
            *(str(record.case[name]) for name in _CASE[:3]),
            f"{record.numbers['rate_hz']:g}",
            *_times(record),
            commit_label(record.commit, record.dirty),
        )
        for record in _of("paced", records)
    ]
    return Summary((*header, *(f"{name} ms" for name in TIMES), "commit"), rows)


def e2e(records: Sequence[Record]) -> Summary:
    """From images to actions, and what that takes beyond the graphs."""
    header = (
        "device", "engine", "precision", "cameras", "prompt", "chunk", "images", "p50 ms", "p99 ms",
        "p99 / p50", "beyond graphs ms",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [
        (
            record.device,
            record.engine,
            str(record.case["precision"]),
            *(str(record.case[name]) for name in _CASE[:3]),
            "{image_height:.0f} × {image_width:.0f}".format(**record.numbers),
            f"{record.ms['total'].p50:.2f}",
            f"{record.ms['total'].p99:.2f}",
            f"{record.numbers['p99_over_p50']:.2f}",
            _shown(record.numbers.get("over_graphs_ms"), 2),
        )
        for record in _newest_images(records)
    ]
    return Summary(header, rows)


def cold(records: Sequence[Record]) -> Summary:
    """From the start of a process to its first actions, with a cache of kernels in both states."""
    parts = ("import_s", "load_s", "call_s")
    rows: list[tuple[str, ...]] = [
        (
            record.device,
            record.engine,
            str(record.case["precision"]),
            cache,
            *(_shown(number_of(record, part, cache), 1) for part in parts),
            f"{times.p50 / 1000:.1f}",
            _shown(None if record.peak_bytes is None else record.peak_bytes / 1e9, 2),
            commit_label(record.commit, record.dirty),
        )
        for record in _of("cold", records)
        for cache, times in record.ms.items()
    ]
    what = ("imports s", "loading s", "first call s", "total s", "memory GB")
    header = ("device", "engine", "precision", "cache of kernels", *what, "commit")
    return Summary(header, rows)


def kernels(records: Sequence[Record]) -> Summary:
    """Each kernel at each shape: floor, time, share, and error over that of plain torch."""
    header = (
        "device", "kernel", "precision", "floor µs", "p50 µs", "share", "error ratio",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    for record in _of("kernels", records):
        for name in record.ms:
            error = number_of(record, "error_ratio", name)
            case = (record.device, name, str(record.case["precision"]))
            rows.append((*case, *_against_floor(record, name), _shown(error, 2)))
    return Summary(header, sorted(rows))


def mlp(records: Sequence[Record]) -> Summary:
    """The MLP's variants, and how much faster than bf16 each is."""
    header = ("device", "variant", "floor µs", "p50 µs", "share", "× bf16", "error")
    found = _of("mlp", records)
    bf16 = {record.device: record.ms["total"].p50 for record in found if record.engine == "bf16"}
    rows: list[tuple[str, ...]] = [
        (
            record.device,
            record.engine,
            *_against_floor(record, "total"),
            _ratio(bf16.get(record.device), record.ms["total"].p50),
            _shown(record.error, 4),
        )
        for record in found
    ]
    return Summary(header, rows)


def attention(records: Sequence[Record]) -> Summary:
    """Microseconds of each implementation at the three shapes."""
    shapes = ("vision", "prefill", "expert")
    found = _of("attention", records)
    rows: list[tuple[str, ...]] = []
    for device in dict.fromkeys(record.device for record in found):
        own = [record for record in found if record.device == device]
        bounds = {name: ms for record in own for name, ms in (record.floor_ms or {}).items()}
        rows.append((device, "floor", *(_micros(bounds.get(shape)) for shape in shapes), ""))
        for record in own:
            medians = {name: times.p50 for name, times in record.ms.items()}
            times = (_micros(medians.get(shape)) for shape in shapes)
            rows.append((device, record.engine, *times, _shown(record.error, 4)))
    header = ("device", "implementation", *(f"{shape} µs" for shape in shapes), "error")
    return Summary(header, rows)


def ablation(records: Sequence[Record]) -> Summary:
    """The waterfall: what each step takes, what it gave, and what is left of moving data."""
    header = (
        "device", "step", "precision", "ms", "Hz", "gain Hz", "gain so far Hz", "× so far",
        "kernels", "casts", "copies", "layouts", "error",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = []
    found = sorted(_of("ablation", records), key=lambda record: list(ABLATION).index(record.engine))
    for device in dict.fromkeys(record.device for record in found):
        rows += _waterfall([record for record in found if record.device == device])
    return Summary(header, rows)


def _waterfall(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    first = before = 1000 / records[0].ms["total"].p50
    for record in records:
        hertz = 1000 / record.ms["total"].p50
        yield (
            record.device,
            record.engine,
            str(record.case["precision"]),
            f"{record.ms['total'].p50:.2f}",
            f"{hertz:.1f}",
            f"{hertz - before:+.1f}",
            f"{hertz - first:+.1f}",
            f"{hertz / first:.2f}",
            *(_shown(record.numbers.get(key), 0) for key in ("kernels", "casts", "copies")),
            _shown(record.numbers.get("layouts"), 0),
            _shown(record.error, 4),
        )
        before = hertz


def _bounds(device: str) -> Iterator[tuple[str, ...]]:
    """Floors and targets of the standard case on `device`."""
    for precision, target in TARGETS.items():
        case = standard_case(precision)
        try:
            least = floors(find_device(device), PRESETS[case.model], case)
            yield (device, "floor", precision, *(f"{least[name]:.2f}" for name in TIMES), "")
        except NoFloorError:
            pass
        yield (device, "target (H200)", precision, *(f"{target[name]:.2f}" for name in TIMES), "")


def _is_standard(record: Record) -> bool:
    case = standard_case()
    return record.case.get("model") == case.model and all(
        record.case.get(name) == getattr(case, name) for name in _CASE
    )


def _times(record: Record) -> Iterator[str]:
    for name in TIMES:
        yield f"{record.ms[name].p50:.2f}" if name in record.ms else ""


def _of(benchmark: str, records: Iterable[Record]) -> list[Record]:
    return [record for record in newest(records) if record.benchmark == benchmark]


def _newest_images(records: Iterable[Record]) -> list[Record]:
    """The newest end-to-end records of each device, engine, case and size of images."""
    by_size: dict[tuple[float, float], list[Record]] = {}
    for record in records:
        if record.kind == "measured" and record.benchmark == "e2e":
            size = (record.numbers["image_height"], record.numbers["image_width"])
            by_size.setdefault(size, []).append(record)
    return [record for own in by_size.values() for record in newest(own)]


def _against_floor(record: Record, name: str) -> tuple[str, str, str]:
    floor, median = (record.floor_ms or {}).get(name), record.ms[name].p50
    share = "" if floor is None else f"{100 * floor / median:.0f} %"
    return _micros(floor), _micros(median), share


def _ratio(reference: float | None, value: float) -> str:
    return "" if reference is None else f"{reference / value:.2f}"


def _micros(milliseconds: float | None) -> str:
    return _shown(None if milliseconds is None else 1000 * milliseconds, 1)


def _shown(number: float | None, digits: int) -> str:
    return "" if number is None else f"{number:.{digits}f}"
