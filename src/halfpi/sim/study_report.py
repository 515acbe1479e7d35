"""The document of the study, made from its records alone."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from halfpi.files import atomic_write
from halfpi.sim.statistics import PairedDifference, Proportion
from halfpi.sim.study import SCHEDULERS, Run, StudySetting, read_runs

GROUPS = {"precise": "The precise tasks", "all": "All tasks"}
_COLUMNS = (
    "setting",
    "success",
    "95 %",
    "against the baseline",
    "95 %",
    "actions a call",
    "calls an episode",
    "held ticks an episode",
)
_RATE_COLUMNS = ("effective Hz", "× baseline")
_INTRODUCTION = """# Success against rate

<!-- Written by `python benchmarks/study.py --report`; what is changed by hand is lost. -->

How slow may inference be, and what may it leave out, before the robot fails? Nano plays Meta-World
in the control loop (`halfpi.runtime`) under a virtual clock, on which each call takes as many
control steps as the setting's *delay*; the hand stands still while no action is due.

```
python benchmarks/study.py            # plays; appends to benchmarks/study.jsonl
python benchmarks/study.py --report   # this document
```

- Every setting plays the same held-out episodes, with the same seeds of the noise. An episode is
  lost after 300 control steps, waiting and holding included.
- *Success* is the share of episodes solved, with its Wilson interval. *Against the baseline* is the
  paired difference in percentage points to the baseline, a receding horizon without delay (10 Euler
  steps, 8 actions a call, no reuse), with its Wald interval.
- *Actions a call* are those executed. Calls of schedulers cost the same, but for the guided one's,
  which cost a little more.
- *Effective Hz* is the number of the policy's actions executed, over the real time its calls took:
  the control rate at which inference would be busy all the time. It is given where settings differ
  in what a call costs, on the precise tasks, whose settings of that kind were played one after
  another on cores that did nothing else. The times are those of nano in fp32 on one core of a CPU,
  so only ratios say something about other machines, and those of reuse depend on how large a part
  of a call is vision there. Simulated delay is no part of it.
- Asynchronous schedulers begin a call when 8 of 16 actions are left, so that up to a delay of 8 a
  chunk serves for 8 steps, as with the receding horizon.
"""


def write_report(record: Path, folder: Path) -> None:
    """Write study.md and study.png in `folder` from the JSON lines `record`.

    Raises ValueError if `record` has no runs, or runs that cannot be compared.
    """
    runs = read_runs(record)
    if not runs:
        raise ValueError(f"{record} has no runs to report")
    text = markdown(runs)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "study.png") as temporary:
        temporary.write_bytes(plot(runs))
    with atomic_write(folder / "study.md") as temporary:
        temporary.write_text(text)


def markdown(runs: Sequence[Run]) -> str:
    """The document."""
    parts = [_INTRODUCTION]
    for tasks, title in GROUPS.items():
        group = [run for run in runs if run.setting.tasks == tasks]
        if group:
            parts += [f"## {title}\n", _counts(group)]
            parts += _sections(group)
    return "\n".join(parts)


def plot(runs: Sequence[Run]) -> bytes:
    """Success against delay for each scheduler, a panel for each group of tasks, as PNG."""
    from matplotlib.figure import Figure

    groups = [tasks for tasks in GROUPS if any(run.setting.tasks == tasks for run in runs)]
    figure = Figure(figsize=(6 * len(groups), 4.5), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for tasks, axes in zip(groups, panels, strict=True):
        for place, name in enumerate(SCHEDULERS):
            line = _line([run for run in runs if run.setting.tasks == tasks], name)
            rates = [100 * _success(run).rate for run in line]
            bounds = [[100 * bound for bound in _success(run).interval] for run in line]
            errors = [
                [rate - low for rate, (low, _) in zip(rates, bounds, strict=True)],
                [high - rate for rate, (_, high) in zip(rates, bounds, strict=True)],
            ]
            if line:
                aside = 0.05 * (place - len(SCHEDULERS) // 2)  # or error bars hide each other
                delays = [run.setting.delay + aside for run in line]
                axes.errorbar(delays, rates, errors, marker="o", capsize=3, label=name)
        axes.set(title=GROUPS[tasks], xlabel="delay of a call (control steps)")
        axes.set_xticks(sorted({run.setting.delay for run in runs}))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("success (%), Wilson 95 %")
    panels[0].legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    return image.getvalue()


def _sections(group: Sequence[Run]) -> Iterable[str]:
    delayed = [run for name in SCHEDULERS for run in _line(group, name)]
    steps = [run for run in group if run.setting == _steps_only(run.setting)]
    reuse = [run for run in group if run not in delayed and run not in steps]
    if delayed:
        yield "### Schedulers × delay\n"
        yield "![success against delay](study.png)\n"
        yield _table(delayed, group, rates=False)
        yield _cliffs(group)
    for title, chosen in (("Reuse", reuse), ("Euler steps", steps)):
        if len(chosen) > 1 or (chosen and chosen[0] not in delayed):
            yield f"### {title}\n"
            yield _table(chosen, group, rates=chosen[0].setting.tasks == "precise")


def _steps_only(setting: StudySetting) -> StudySetting:
    return replace(setting.baseline, num_steps=setting.num_steps)


def _line(group: Sequence[Run], scheduler: str) -> list[Run]:
    """The runs of `scheduler` that differ in the delay alone, by delay."""
    found = [
        run
        for run in group
        if run.setting == StudySetting(scheduler, run.setting.tasks, run.setting.delay)
    ]
    return sorted(found, key=lambda run: run.setting.delay)


def _counts(group: Sequence[Run]) -> str:
    counts = {(len(run.outcomes), len(run.solved)) for run in group}
    said = " or ".join(f"{episodes} episodes of {tasks} tasks" for tasks, episodes in counts)
    policies = ", ".join(sorted({run.policy for run in group}))
    return f"{said} in each setting; policy {policies}.\n"


def _table(runs: Sequence[Run], group: Sequence[Run], rates: bool) -> str:
    columns = _COLUMNS + _RATE_COLUMNS if rates else _COLUMNS
    header = [" | ".join(columns), "---" + "|---:" * (len(columns) - 1)]
    rows = []
    for run in runs:
        baseline = _baseline(run, group)
        rows.append(" | ".join(_row(run, baseline) + (_rate(run, baseline) if rates else [])))
    return "\n".join(f"| {line} |" for line in (*header, *rows)) + "\n"


def _row(run: Run, baseline: Run | None) -> list[str]:
    success, episodes = _success(run), len(run.solved)
    low, high = success.interval
    difference = interval = "–"
    if baseline is not None and baseline is not run:
        paired = PairedDifference.of(baseline.solved, run.solved)
        difference = f"{100 * paired.difference:+.1f}"
        interval = "{:+.1f} to {:+.1f}".format(*(100 * bound for bound in paired.interval))
    return [
        run.setting.name.removeprefix(f"{run.setting.tasks}: "),
        f"{100 * success.rate:.1f} % ({success.successes}/{episodes})",
        f"{100 * low:.1f}–{100 * high:.1f} %",
        difference,
        interval,
        f"{run.actions / run.calls:.1f}",
        f"{run.calls / episodes:.1f}",
        f"{run.held / episodes:.1f}",
    ]


def _rate(run: Run, baseline: Run | None) -> list[str]:
    if baseline is None or baseline is run:
        return [f"{run.effective_rate:.0f}", "–"]
    return [f"{run.effective_rate:.0f}", f"{run.effective_rate / baseline.effective_rate:.2f}"]


def _cliffs(group: Sequence[Run]) -> str:
    """Where each scheduler's success is surely below the baseline's."""
    rows = []
    for name in SCHEDULERS:
        line = [(run, _baseline(run, group)) for run in _line(group, name)]
        below = [
            run.setting.delay
            for run, baseline in line
            if baseline is not None
            and PairedDifference.of(baseline.solved, run.solved).interval[1] < 0
        ]
        if line:
            tried = ", ".join(str(run.setting.delay) for run, _ in line)
            rows.append(f"| {name} | {tried} | {min(below) if below else 'none'} |")
    header = "| scheduler | delays tried | first that is worse than the baseline |\n|---|---|---|\n"
    return (
        "The cliff: the smallest delay at which the whole interval of the paired difference is "
        f"below zero.\n\n{header}" + "\n".join(rows) + "\n"
    )


def _baseline(run: Run, group: Sequence[Run]) -> Run | None:
    return next((other for other in group if other.setting == run.setting.baseline), None)


def _success(run: Run) -> Proportion:
    return Proportion.of(run.solved.values())
