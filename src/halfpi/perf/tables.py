"""Tables of documents, generated from records.

`python -m halfpi.perf.tables --check` fails when a table is not what the records say, `--write`
makes all of them anew. Where a table belongs, a document has `<!-- table:NAME -->` and
`<!-- /table:NAME -->`, each on a line; what stands between is nobody's to write.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from halfpi.config import PRESETS
from halfpi.files import atomic_write
from halfpi.perf.cases import standard_case
from halfpi.perf.devices import devices
from halfpi.perf.records import Record, commit_label, newest, read_records
from halfpi.perf.roofline import floors
from halfpi.perf.run_tables import RUN_TABLES, read_runs
from halfpi.perf.summaries import (
    TIMES,
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

# Name → the settings of one evaluation, as 'halfpi eval --output' writes them; or the records of
# one script.
Successes = Mapping[str, Sequence[Mapping[str, Any]]]

RESULTS = Path("benchmarks/results")
SUCCESSES = Path("benchmarks/success")
RUNS = Path("benchmarks/runs")
_FULL_SIZE = set(PRESETS).difference(["nano"])
_MARKER = re.compile(r"^<!-- (?P<end>/?)table:(?P<name>[\w-]+) -->$", re.MULTILINE)
# Fields of a case → column.
_CASE = {
    "precision": "precision",
    "cameras": "cameras",
    "prompt_tokens": "prompt",
    "horizon": "chunk",
    "steps": "steps",
}


class TableError(ValueError):
    """A document whose table markers do not pair up, or name no table."""


def render(
    text: str,
    records: Sequence[Record],
    successes: Successes | None = None,
    runs: Successes | None = None,
) -> str:
    """`text` with every table made anew. Raises TableError naming the marker that is wrong."""
    tables = {name: partial(make, records) for name, make in TABLES.items()}
    for name, settings in (successes or {}).items():
        tables[f"success-{name}"] = partial(_success, settings)
        tables[f"settings-{name}"] = partial(_settings, settings)
    tables |= {name: partial(_run_table, name, (runs or {}).get(name, ())) for name in RUN_TABLES}
    markers = list(_MARKER.finditer(text))
    parts, reached = [], 0
    for begin, end in zip(markers[::2], [*markers[1::2], None], strict=False):
        name = begin["name"]
        if begin["end"] or end is None or not end["end"] or end["name"] != name:
            raise TableError(f"{begin[0]} is not followed by its counterpart")
        if name not in tables:
            raise TableError(f"no table is called {name}; there are {', '.join(tables)}")
        parts += [text[reached : begin.end()], "\n", tables[name]()]
        reached = end.start()
    return "".join(parts) + text[reached:]


def stale_documents(root: Path) -> dict[Path, str]:
    """Documents below `root` whose tables are not what the records say → what they should be.

    Documents are the Markdown files in `root` and its docs. Raises TableError naming the document,
    and RecordError.
    """
    records, successes = read_records(root / RESULTS), _read_successes(root / SUCCESSES)
    runs = read_runs(root / RUNS)
    stale = {}
    for path in [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        try:
            rendered = render(text, records, successes, runs)
        except TableError as error:
            raise TableError(f"{path}: {error}") from error
        if rendered != text:
            stale[path] = rendered
    return stale


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the documents of a checkout, or write them. Exits with a message if any is stale."""
    parser = argparse.ArgumentParser(prog="python -m halfpi.perf.tables", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--check", action="store_true", help="fail when a table is stale")
    mode.add_argument("--write", action="store_true", help="make every table anew")
    parser.add_argument("--root", type=Path, default=Path(), help="of the checkout")
    options = parser.parse_args(arguments)
    try:
        stale = stale_documents(options.root)
    except ValueError as error:
        sys.exit(str(error))
    if options.check and stale:
        names = ", ".join(str(path) for path in stale)
        sys.exit(f"tables are stale in {names}; run python -m halfpi.perf.tables --write")
    for path, text in stale.items():
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _floors(_: Sequence[Record]) -> str:
    """The floors of the standard case on every known device."""
    rows = []
    for name, device in devices().items():
        for precision in ("bf16", "fp8"):
            case = standard_case(precision)
            ms = floors(device, PRESETS[case.model], case)
            kinds = {device.bf16_tflops.kind, device.fp8_tflops.kind, device.bandwidth_tbs.kind}
            shown = [f"{ms[stage]:.2f}" for stage in TIMES]
            rows.append((name, precision, *shown, " and ".join(sorted(kinds))))
    return _table(("device", "precision", *_milliseconds(TIMES), "limits are"), rows)


def _stages(records: Sequence[Record]) -> str:
    """Our times of the stages of π0.5."""
    return _own(record for record in records if record.case.get("model") in _FULL_SIZE)


def _nano(records: Sequence[Record]) -> str:
    """Our times of the stages of the small policy."""
    return _own(record for record in records if record.case.get("model") == "nano")


def _own(records: Iterable[Record]) -> str:
    """The newest measurement of each device, engine and case."""
    rows = [
        (
            record.device,
            record.engine,
            *_case_cells(record),
            *(f"{record.ms[stage].p50:.2f}" for stage in TIMES),
            commit_label(record.commit, record.dirty),
        )
        for record in newest(records)
        if record.benchmark == "stages"
    ]
    return _table(("device", "engine", *_CASE.values(), *_milliseconds(TIMES), "commit"), rows)


def _peers(records: Sequence[Record]) -> str:
    """What other engines say, or what we saw them do."""
    quoted = [record for record in records if record.kind == "quoted"]
    rows = [
        (
            record.device,
            record.engine,
            *_case_cells(record),
            f"{record.ms['total'].p50:.2f}",
            record.source or "",
        )
        for record in sorted(quoted, key=lambda record: (record.device, record.ms["total"].p50))
    ]
    return _table(("device", "engine", *_CASE.values(), "total ms", "source"), rows)


def _run_table(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    return _table(*RUN_TABLES[name](records))


def _read_successes(directory: Path) -> Successes:
    return {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}


def _settings(settings: Sequence[Mapping[str, Any]]) -> str:
    """Success of every setting over all episodes, and its paired difference to the first."""
    rows = []
    for setting in settings:
        config, success = setting["config"], setting["all"]
        paired = setting.get("against_first")
        rows.append(
            (
                *(str(config[f]) for f in ("precision", "backend", "num_steps", "execute")),
                f"{success['successes']}/{success['episodes']}",
                "{:.1f}–{:.1f} %".format(*(100 * bound for bound in success["interval"])),
                *(("–", "–") if paired is None else _difference_cells(paired)),
            )
        )
    what = ("precision", "backend", "steps", "actions a call")
    return _table((*what, "success", "95 %", "difference", "95 %"), rows)


def _difference_cells(paired: Mapping[str, Any]) -> tuple[str, str]:
    low, high = (100 * bound for bound in paired["interval"])
    return f"{100 * paired['difference']:+.1f} points", f"{low:+.1f} to {high:+.1f}"


def _success(settings: Sequence[Mapping[str, Any]]) -> str:
    """Success of the first setting, task by task, with its 95 % interval."""
    rows = [
        (
            task,
            row["prompt"],
            f"{row['successes']}/{row['episodes']}",
            "{:.0f}–{:.0f} %".format(*(100 * bound for bound in row["interval"])),
            "–" if row["median_steps"] is None else f"{row['median_steps']:.0f}",
        )
        for task, row in settings[0]["tasks"].items()
    ]
    means = [
        (f"**{name}**", "", f"**{100 * mean:.1f} %**", "", "")
        for name, mean in settings[0]["means"].items()
    ]
    return _table(("task", "instruction", "success", "95 %", "steps"), [*rows, *means])


def _summarised(summary: Callable[[Sequence[Record]], Summary], records: Sequence[Record]) -> str:
    return _table(*summary([each for each in records if each.case.get("model") in _FULL_SIZE]))


TABLES: Mapping[str, Callable[[Sequence[Record]], str]] = {
    "floors": _floors,
    "nano": _nano,
    "peers": _peers,
    "stages": _stages,
    **{
        summary.__name__: partial(_summarised, summary)
        for summary in (standard, paced, e2e, cold, kernels, mlp, attention, ablation)
    },
}


def _case_cells(record: Record) -> list[str]:
    return [str(record.case.get(field, "?")) for field in _CASE]


def _milliseconds(stages: Iterable[str]) -> list[str]:
    return [f"{stage} ms" for stage in stages]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; empty without rows."""
    if not rows:
        return ""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *escaped]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
