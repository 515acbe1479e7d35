"""What a loop did, as it is kept: the file of a run, and the recording for rerun."""

from __future__ import annotations

import builtins
import json
from collections import defaultdict
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfpi.runtime import Asynchronous, LoopReport, RerunLog, ReuseReport, load_run, save_run
from halfpi.runtime.report import kept_names
from halfpi.types import ActionChunk, Keep, Observation, StageTimes

Simulate = Callable[..., Any]
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def eventful(simulate: Simulate, watcher: RerunLog | None = None) -> LoopReport:
    """A run at 10 Hz with a call that is late, one that fails, and one that keeps a camera."""
    simulation = simulate(Asynchronous(2), chain([0.0, 0.5], repeat(0.1)))
    policy, infer = simulation.policy, simulation.policy.infer

    def called(observation: Observation, **options: Any) -> ActionChunk:
        chunk = infer(observation, **options)
        if len(policy.requests) == 3:
            raise RuntimeError("no power")
        kept = Keep(frozenset({"base"}), prefix=len(policy.requests) == 4)
        return ActionChunk(chunk.actions, chunk.normalized, StageTimes(1, 2, 3, 4), kept=kept)

    policy.infer = called
    simulation.robot.observe = lambda: Observation({"base": PICTURE}, np.zeros(1, np.float32))
    simulation.loop.watcher = watcher
    report: LoopReport = simulation.run(30)
    return report


def test_what_is_kept_has_the_names_of_the_reports() -> None:
    assert kept_names(Keep(frozenset({"wrist", "base"}), True)) == (
        "prefix", "camera base", "camera wrist",
    )  # fmt: skip
    assert kept_names(Keep()) == ()


def test_a_run_is_read_as_it_was(simulate: Simulate, tmp_path: Path) -> None:
    report, reuse = eventful(simulate), ReuseReport()
    reuse.miss(4.0)
    reuse.hit(age=3)
    path = tmp_path / "new" / "run.jsonl"
    save_run(report, path, {"camera base": reuse})
    again, modes = load_run(path)
    assert again.summary() == report.summary()
    assert again.stalls == report.stalls
    assert [call.kept for call in again.calls] == [call.kept for call in report.calls]
    assert [call.times for call in again.calls] == [call.times for call in report.calls]
    assert again.calls[0].kept == ("camera base",)
    assert again.calls[2].error == "RuntimeError: no power"
    assert again.calls[2].times is None
    assert modes == {"camera base": {"hits": 1, "misses": 1, "max_age": 3, "saved_ms": 4.0}}
    assert [file.name for file in path.parent.iterdir()] == ["run.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda lines: lines[1:],
            ":1: not a line of a run: expected schema halfpi.run/1",
        ),
        (
            lambda lines: [*lines[:2], "{", *lines[2:]],
            ":3: not a line of a run: Expecting",
        ),
        (lambda lines: [*lines, '{"colours": []}'], "unknown series 'colours'"),
        (lambda lines: [lines[0], '{"call": {"tick": 1}}'], ":2: not a line of a run: 'times'"),
        (lambda lines: [], "rate_hz must be positive"),
    ],
)
def test_what_is_no_run_is_refused(
    simulate: Simulate, tmp_path: Path, change: Callable[[list[str]], list[str]], message: str
) -> None:
    path = tmp_path / "run.jsonl"
    save_run(eventful(simulate), path)
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=message) as caught:
        load_run(path)
    assert str(path) in str(caught.value)


def test_a_run_is_json_lines(simulate: Simulate, tmp_path: Path) -> None:
    report, path = eventful(simulate), tmp_path / "run.jsonl"
    save_run(report, path)
    head, *lines = map(json.loads, path.read_text().splitlines())
    assert head == {"schema": "halfpi.run/1", "summary": report.summary()}
    assert sum("call" in line for line in lines) == len(report.calls)
    assert len(lines[-2]["tick_errors_ms"]) == report.ticks


def rows_of(path: Path) -> dict[str, list[Any]]:
    """The rows of each entity, as rerun reads them."""
    chunks = pytest.importorskip("rerun.chunk")
    rows: dict[str, list[Any]] = defaultdict(list)
    for chunk in chunks.RrdReader(path).stream():
        if chunk.entity_path.startswith("/__"):
            continue
        batch = chunk.to_record_batch()
        names = [name for name in batch.schema.names if ":" in name]
        names.sort(key=lambda name: not name.endswith(":text"))  # of an event, not its level
        values = batch.select(names[:1]).column(0).to_pylist()
        assert "time" in chunk.timeline_names
        rows[chunk.entity_path] += values
    return rows


def test_a_recording_holds_the_run(simulate: Simulate, tmp_path: Path) -> None:
    pytest.importorskip("rerun")
    path = tmp_path / "new" / "run.rrd"
    with RerunLog(path) as log:
        report = eventful(simulate, log)
        assert not path.exists()
    assert [file.name for file in path.parent.iterdir()] == ["run.rrd"]
    rows = rows_of(path)
    done = len(report.calls) - report.failed_calls
    assert report.failed_calls == 1
    assert len(rows["/camera/base"]) == len(rows["/state"]) == len(report.calls)
    assert len(rows["/chunk"]) == len(rows["/call/latency_ms"]) == done
    assert rows["/stage/prefill_ms"] == [[3.0]] * done
    assert rows["/reuse/camera/base"] == [[1.0]] * done
    assert rows["/reuse/prefix"].count([1.0]) == 1
    assert len(rows["/queue"]) == report.ticks
    assert rows["/held"].count([1.0]) == report.held_ticks > 0
    assert len(rows["/action"]) == report.ticks - report.waiting_ticks
    texts = [text for row in rows["/events"] for text in row]
    assert "call failed: RuntimeError: no power" in texts
    assert "holding: a call is late" in texts


def test_what_cannot_be_recorded_is_raised_at_the_end(tmp_path: Path) -> None:
    pytest.importorskip("rerun")
    log = RerunLog(tmp_path / "run.rrd")
    bad: Any = Observation({"base": None}, np.zeros(1, np.float32))  # type: ignore[dict-item]
    log.inferred(0.0, 1.0, bad, "failed")
    log.note(2.0, "goes on")
    with pytest.raises(AttributeError):
        log.close()
    assert rows_of(tmp_path / "run.rrd")["/events"] == [["goes on"]]


def test_the_extra_is_named_where_rerun_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "rerun":
            raise ModuleNotFoundError("No module named 'rerun'", name=name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'rerun-sdk: pip install "halfpi\[rerun\]"'):
        RerunLog(tmp_path / "run.rrd")
    assert list(tmp_path.iterdir()) == []
