"""The page shows what the records say, and needs no other file."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tests.commands.conftest import Halfpi, Mistake
from tests.perf.test_records import MEASURED

from halfpi.perf.latency_report import write_report
from halfpi.runtime import Call, LoopReport, ReuseReport, Stall, save_run
from halfpi.types import StageTimes


def run_file(path: Path) -> Path:
    report = LoopReport(100.0, missed_ticks=2)
    for tick in range(60):
        report.tick_errors_ms.append(0.1 + tick % 3)
        report.ages_ms.append(50.0)
    for index in range(8):
        times = StageTimes(1.0, 10.0 + index, 20.0, 14.0)
        kept = ("camera base",) if index % 2 else ()
        report.calls.append(Call(6 * index, 45.0 + index, index == 0, 5, 5, None, times, kept))
    report.calls.append(Call(50, 400.0, False, 5, 5, "RuntimeError: <boom>"))
    report.stalls.append(Stall(52, 6, "failed"))
    reuse = ReuseReport()
    reuse.miss(10.0)
    reuse.hit(2)
    save_run(report, path, {"camera base": reuse})
    return path


def test_a_run(tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    write_report([run_file(tmp_path / "run.jsonl")], page)
    text = page.read_text()
    for shown in (
        "<h2>run.jsonl</h2>",
        "<td>missed_ticks</td><td>2</td>",
        "<td>held_ticks</td><td>6</td>",
        "call: p50 49.00 ms",  # without the warm-up and the failure
        "vision: p50 14.00 ms",
        "denoise: p50 14.00 ms",
        "tick error ms",
        "warm-up",
        "held",
        "<td>camera base</td><td>1</td><td>1</td><td>2</td><td>10</td>",
        "<td>50</td><td>RuntimeError: &lt;boom&gt;</td>",
    ):
        assert shown in text, shown
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 2
    for picture in pictures:
        ElementTree.fromstring(picture)
    assert not re.search(r'(src|href)="(?!#)', text)  # nothing is fetched
    assert [file.name for file in page.parent.iterdir()] == ["report.html"]


def test_benchmark_records_and_several_files(tmp_path: Path) -> None:
    records = tmp_path / "stages.jsonl"
    records.write_text(MEASURED.to_json() + "\n")
    write_report([records, run_file(tmp_path / "run.jsonl")], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "stages, eager on NVIDIA H200 (measured)" in text
    assert "<td>total</td><td>10</td><td>11</td><td>12</td><td>7.7</td>" in text
    assert text.index("<h2>stages.jsonl</h2>") < text.index("<h2>run.jsonl</h2>")


def test_a_run_without_calls(tmp_path: Path) -> None:
    save_run(LoopReport(10.0), tmp_path / "run.jsonl")
    write_report([tmp_path / "run.jsonl"], tmp_path / "report.html")
    assert "call: none" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: expected a run"),
        ("{}\n", "is neither a run of the control loop nor records: a record must have"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str, mistake: Mistake) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    assert message in mistake("report", path, "--output", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_the_command(tmp_path: Path, halfpi: Halfpi) -> None:
    halfpi("report", run_file(tmp_path / "run.jsonl"), "--output", tmp_path / "report.html")
    assert "call: p50 49.00 ms" in (tmp_path / "report.html").read_text()
