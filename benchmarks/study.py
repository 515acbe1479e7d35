"""How slow may inference be, and what may it leave out, before the robot fails?

    python benchmarks/study.py [--record FILE] [--minutes M] [--workers N] [--settings REGEX]
    python benchmarks/study.py --report [--record FILE]

Plays nano in Meta-World: each scheduler × simulated inference delay, reuse modes × threshold and
Euler steps, on the precise tasks and on all. A finished setting is appended to FILE as a JSON line;
started again, the study goes on where it stopped. `--report` plays nothing and writes docs/study.md
and docs/study.png from FILE.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from halfpi.sim.statistics import Proportion
from halfpi.sim.study import run_study, standard_settings
from halfpi.sim.study_report import write_report


def main() -> None:
    options = _options()
    try:
        if options.report:
            write_report(options.record, options.docs)
        else:
            _run(options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"study: {error}") from error


def _run(options: argparse.Namespace) -> None:
    settings = [s for s in standard_settings() if re.search(options.settings, s.name)]
    if not settings:
        raise ValueError(f"no setting matches {options.settings!r}")
    began = time.monotonic()
    seeds = {"precise": options.precise_seeds, "all": options.all_seeds}
    runs = run_study(
        settings,
        options.record,
        seeds,
        policy=options.policy,
        workers=options.workers,
        minutes=options.minutes,
    )
    for run in runs:
        success = Proportion.of(run.solved.values())
        print(
            f"{time.monotonic() - began:6.0f} s  {run.setting.name}: {success.successes}/"
            f"{success.trials}, {run.effective_rate:.0f} Hz, held {run.held}",
            file=sys.stderr,
            flush=True,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, default=Path("benchmarks/study.jsonl"))
    parser.add_argument("--minutes", type=float, help="stop then, dropping what is unfinished")
    parser.add_argument("--workers", type=int, help="processes; one a core by default")
    parser.add_argument("--settings", default="", help="only those whose name matches this regex")
    parser.add_argument("--precise-seeds", type=int, default=72, help="episodes a precise task")
    parser.add_argument("--all-seeds", type=int, default=24, help="episodes a task of all")
    parser.add_argument("--policy", default="nano")
    parser.add_argument("--report", action="store_true", help="write the document from the record")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the report goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
