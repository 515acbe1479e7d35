"""Tables in documents: made from records, found when stale, and never half of one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from halfpi.perf.cases import standard_case
from halfpi.perf.records import Percentiles, Record, append_record
from halfpi.perf.run_tables import read_runs
from halfpi.perf.runs import keep_run
from halfpi.perf.tables import TABLES, TableError, main, render, stale_documents

ROOT = Path(__file__).parents[2]
TIMES = Percentiles(1.0, 2.0, 3.0)


def measured(total: float = 10.0, **changes: Any) -> Record:
    stages = dict.fromkeys(("vision", "prefill", "denoise"), TIMES)
    record = Record(
        kind="measured",
        benchmark="stages",
        engine="eager",
        device="NVIDIA H200",
        case=dataclasses.asdict(standard_case()),
        ms={**stages, "total": Percentiles(total, total, total)},
        commit="0123456789",
        dirty=False,
    )
    return dataclasses.replace(record, **changes)


def between(name: str, body: str = "") -> str:
    return f"before\n<!-- table:{name} -->\n{body}<!-- /table:{name} -->\nafter\n"


def quoted(source: str) -> Record:
    return Record(
        kind="quoted",
        benchmark="e2e",
        engine="other",
        device="NVIDIA Thor",
        case={"model": "pi05", "cameras": 2},
        ms={"total": Percentiles(27.17)},
        source=source,
    )


def test_without_records_a_table_is_empty() -> None:
    assert render(between("nano", "old\n"), []) == between("nano")


def test_what_is_outside_stays() -> None:
    text = "# Title\n" + between("nano") + between("peers", "old\n") + "end"
    rendered = render(text, [])
    assert rendered == "# Title\n" + between("nano") + between("peers") + "end"
    inline = "`<!-- table:nano -->` is only a marker when alone on its line"
    assert render(inline, []) == inline


def test_the_newest_measurement_of_a_case_is_shown() -> None:
    rendered = render(between("stages"), [measured(10.0), measured(9.5, dirty=True)])
    assert "| 9.50 | 0123456* |" in rendered
    assert "10.00" not in rendered
    assert "| device | engine | precision | cameras | prompt | chunk | steps |" in rendered


def test_a_model_has_a_table_of_its_own() -> None:
    nano = dataclasses.asdict(dataclasses.replace(standard_case(), model="nano"))
    records = [measured(10.0), measured(2.5, case=nano), measured(8.0, benchmark="e2e")]
    assert "2.50" in render(between("nano"), records)
    assert "10.00" not in render(between("nano"), records)
    assert "2.50" not in render(between("stages"), records)
    assert "8.00" not in render(between("stages"), records)


def test_peers_have_their_source_and_what_is_unknown_says_so() -> None:
    rendered = render(between("peers"), [measured(), quoted("a | b")])
    assert "| NVIDIA Thor | other | ? | 2 | ? | ? | ? | 27.17 | a \\| b |" in rendered
    assert "eager" not in rendered


def test_floors_need_no_record() -> None:
    rendered = render(between("floors"), [])
    assert rendered.count("\n| H200 |") == 2
    assert "| Thor | fp8 |" in rendered


def test_settings_of_an_evaluation_are_compared_to_its_first() -> None:
    config = {"precision": "fp32", "backend": "eager", "num_steps": 10, "execute": 8}
    paired = {"difference": -0.015, "interval": [-0.03, 0.0]}
    successes = {"successes": 390, "episodes": 400, "interval": [0.95512, 0.987]}
    first = {"config": config, "all": successes}
    second = {**first, "config": {**config, "precision": "fp8"}, "against_first": paired}
    rendered = render(between("settings-x"), [], {"x": [first, second]})
    assert "| fp32 | eager | 10 | 8 | 390/400 | 95.5–98.7 % | – | – |" in rendered
    assert (
        "| fp8 | eager | 10 | 8 | 390/400 | 95.5–98.7 % | -1.5 points | -3.0 to +0.0 |" in rendered
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (between("speed"), "no table is called speed; there are floors, nano, peers, stages, "),
        ("<!-- table:nano -->", "<!-- table:nano --> is not followed by its counterpart"),
        ("<!-- /table:nano -->", "<!-- /table:nano --> is not followed"),
        ("<!-- table:nano -->\n<!-- /table:peers -->", "table:nano --> is not followed"),
        ("<!-- table:nano -->\n<!-- table:nano -->", "table:nano --> is not followed"),
        (between("nano") + "<!-- /table:nano -->", "<!-- /table:nano --> is not followed"),
    ],
)
def test_markers_that_are_wrong_are_named(text: str, message: str) -> None:
    with pytest.raises(TableError, match=message):
        render(text, [])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one record and two documents of which one shows it."""
    append_record(measured(10.0), tmp_path / "benchmarks" / "results")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "speed.md").write_text(between("stages"))
    (tmp_path / "README.md").write_text("no table")
    return tmp_path


def test_check_fails_until_written(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--check", "--root", str(checkout)])
    assert "tables are stale in" in str(stop.value)
    assert "speed.md; run python -m halfpi.perf.tables --write" in str(stop.value)
    main(["--write", "--root", str(checkout)])
    main(["--check", "--root", str(checkout)])
    assert "| 10.00 |" in (checkout / "docs" / "speed.md").read_text()
    assert sorted(path.name for path in checkout.iterdir()) == ["README.md", "benchmarks", "docs"]


def test_a_new_record_makes_a_table_stale(checkout: Path) -> None:
    main(["--write", "--root", str(checkout)])
    append_record(measured(9.0), checkout / "benchmarks" / "results")
    assert list(stale_documents(checkout)) == [checkout / "docs" / "speed.md"]


def test_one_bad_document_stops_all_writing(checkout: Path) -> None:
    (checkout / "README.md").write_text("<!-- table:nano -->")
    before = (checkout / "docs" / "speed.md").read_text()
    with pytest.raises(SystemExit, match=r"README\.md: <!-- table:nano --> is not followed"):
        main(["--write", "--root", str(checkout)])
    assert (checkout / "docs" / "speed.md").read_text() == before


def test_a_bad_record_stops_it_too(checkout: Path) -> None:
    (checkout / "benchmarks" / "results" / "x.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match=r"x\.jsonl:1: a record must have exactly the fields"):
        main(["--check", "--root", str(checkout)])


def test_a_mode_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "--check" in capsys.readouterr().err


def test_the_repositorys_tables_are_fresh() -> None:
    assert list(stale_documents(ROOT)) == []


def test_every_table_is_shown_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    text = "".join(path.read_text(encoding="utf-8") for path in documents)
    assert all(f"<!-- table:{name} -->" in text for name in TABLES)


def test_runs_of_the_loop_and_the_server(tmp_path: Path) -> None:
    place = {"device": "a CPU", "cores": 2, "load": 1.26, "commit": "0123456789", "dirty": True}
    jitter = place | {
        "case": {"priority": None, "seconds": 60.0},
        "result": {
            "tick_error_p50_ms": 0.1, "tick_error_p99_ms": 1.5, "tick_error_max_ms": 3.25,
            "missed_ticks": 0, "stalls_visible": 7, "stalls_injected": 8, "held_ticks": 12,
        },
    }  # fmt: skip
    load = place | {
        "policy": "sleeps 20 ms", "max_batch": 1, "overhead_ms": {"p50": 1.234, "p99": 2.0},
        "clients": 32, "seconds": 60.0, "replies": {"least": 80, "most": 82, "all": 2600},
        "starved": 0, "disconnected": 1, "server_rss_mib": {"half_time": 500.4, "end": 501.0},
    }  # fmt: skip
    batching = place | {
        "policy": "nano",
        "threads": 2,
        "each_ms": {"1": {"p50": 30.0, "least": 25.0}, "8": {"p50": 12.0, "least": 11.0}},
    }
    reuse = place | {
        "precision": "fp8", "steps": 5, "executed": 4,
        "actions_per_second": {"1": 500.0, "2": 760.4},
    }  # fmt: skip
    every = {
        "loop-jitter": jitter, "serve-load": load, "batching": batching, "reuse-rate": reuse,
    }  # fmt: skip
    for name, record in every.items():
        keep_run(record, tmp_path / f"{name}.jsonl")
    runs = read_runs(tmp_path)
    shown = render("".join(map(between, every)), [], None, runs)
    assert "| 1.3 | – | 60 | 0.10 | 1.50 | 3.25 | 0 | 7/8 | 12 | 0123456* |" in shown
    assert "| 1 | 1.23 | 2.00 | 32 | 60 | 80–82 | 43.3 | 0 | 1 | 500 → 501 |" in shown
    assert "| device | load | policy | threads | 1 a pass | 8 a pass | commit |" in shown
    assert "| nano | 2 | 30.0 (25.0) | 12.0 (11.0) | 0123456* |" in shown
    assert "| fp8 | 5 | 4 | 500 (1.00 ×) | 760 (1.52 ×) | 0123456* |" in shown
    assert render(between("loop-jitter"), []) == between("loop-jitter")
