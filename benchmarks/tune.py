"""Measure the launches of kernels on this GPU and write the fastest into the table that ships.

    python benchmarks/tune.py linear geglu --only prefill
    python benchmarks/tune.py linear split_linear --only vision --rows 512
    python benchmarks/tune.py geglu --only prefill --between

Candidates are first compiled, run and held to the error rule, in processes of their own: one that
does not fit, is wrong or crashes is left out with a note. Then each is timed in a CUDA graph, with
weights rotated so that they come from memory, as in a model; activations stay in the L2, as there.
With `--between` the fastest few of them are then compared where they will run, in the stages of an
engine that never rests: there the clock depends on the power that all stages take.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from halfpi.config import PRESETS
from halfpi.kernels import specs, tuned
from halfpi.kernels.spec import FP8, Case, Device, KernelSpec, Launch, Problem, error_ratio
from halfpi.perf import cases
from halfpi.perf.bench import stage_calls
from halfpi.perf.engines import engine_config, make_subject
from halfpi.perf.synthetic import random_model
from halfpi.perf.timing import measure

TABLES = Path(tuned.__file__).parent / "tuned"
# Weights in rotation: more than the L2 of any GPU holds.
ROTATED_BYTES = 160_000_000
# Launches in one graph, and replays of it.
LAUNCHES, REPLAYS = 60, 7
MAX_ERROR_RATIO = 2.0
# Launches that are compared between stages, how often in turn, and runs of all stages each time:
# before those as many again, in which the clock follows.
FINALISTS, TURNS, RUNS = 5, 5, 40
# Kernel, index of the case, its rows if not its own; and index of the launch.
CaseKey = tuple[str, int, int | None]
Candidate = tuple[str, int, int | None, int]


def main() -> None:
    options = _options()
    torch.cuda.init()
    device = Device.of(torch.device("cuda"))
    todo = list(candidates(options.kernels, options.only, options.rows, device))
    keys = {one[:3] for one in todo} if options.between else set()
    engine_cases = {key: engine_case(key[0], case_of(key)) for key in keys}
    print(f"{len(todo)} candidates on {torch.cuda.get_device_name()}", flush=True)
    good = [one for one, note in checked(todo, options.processes) if note is None]
    results = []
    for case_key, group in itertools.groupby(good, key=lambda one: one[:3]):
        entries = ranked(case_key, group, device)
        if options.between:
            entries = ranked_between(entries[:FINALISTS], engine_cases[case_key], device)
        results.append(entries[0])
        write_table(device.capability, results)


def candidates(
    names: list[str], only: str, rows: int | None, device: Device
) -> Iterator[Candidate]:
    """All launches of the real cases, of the kernels called `names`, that `only` is a part of.

    rows: of tokens, instead of those that a case has.
    """
    for name, spec in specs().items():
        for index, case in enumerate(spec.cases):
            if case.real and only in str(case) and (not names or name in names):
                launches = spec.candidates(with_rows(case, rows), device)
                yield from ((name, index, rows, number) for number in range(len(launches)))


def with_rows(case: Case, rows: int | None) -> Case:
    """`case` with `rows` rows, all valid, if it is a case of rows."""
    if rows is None or "m" not in case.sizes:
        return case
    return dataclasses.replace(case, sizes={**case.sizes, "m": rows, "valid": rows})


def case_of(key: CaseKey) -> Case:
    """The case that `key` numbers."""
    name, index, rows = key
    return with_rows(specs()[name].cases[index], rows)


def found(candidate: Candidate, device: Device) -> tuple[KernelSpec[Any], Case, Launch]:
    """The kernel, case and launch that `candidate` numbers."""
    spec, case = specs()[candidate[0]], case_of(candidate[:3])
    return spec, case, spec.candidates(case, device)[candidate[3]]


def check(candidate: Candidate) -> str | None:
    """What is wrong with a candidate, if anything is; compiles it into Triton's cache."""
    cuda = torch.device("cuda")
    spec, case, launch = found(candidate, Device.of(cuda))
    torch.manual_seed(0)
    try:
        problem = spec.problem(case, launch, cuda)
        problem.run()
        ratio = error_ratio(problem)
    except Exception as error:  # noqa: BLE001 - whatever it is, this launch is out
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    return None if ratio <= MAX_ERROR_RATIO else f"errs {ratio:.2f} × plain torch"


def checked(todo: list[Candidate], processes: int) -> Iterator[tuple[Candidate, str | None]]:
    """Each candidate with what is wrong with it; a crash costs those that ran beside it a retry."""
    device = Device.of(torch.device("cuda"))
    left = dict.fromkeys(todo, 0)
    notes: dict[Candidate, str | None] = {}
    while left:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            futures = {one: pool.submit(check, one) for one in left}
            for one, future in futures.items():
                try:
                    notes[one] = future.result()
                except BrokenProcessPool:
                    left[one] += 1
        for one in [one for one in left if one in notes or left[one] > 2]:
            notes.setdefault(one, "crashed")
            del left[one]
    for one in todo:
        if notes[one] is not None:
            _, case, launch = found(one, device)
            print(f"left out: {one[0]} {case} {launch}: {notes[one]}", flush=True)
    return ((one, notes[one]) for one in todo)


def ranked(case_key: CaseKey, group: Iterable[Candidate], device: Device) -> list[tuned.Entry]:
    """The launches of one case as entries of the table, the fastest first."""
    name, case, entries = case_key[0], case_of(case_key), []
    for candidate in group:
        spec, _, launch = found(candidate, device)
        problem = spec.problem(case, launch, torch.device("cuda"))
        entries.append(entry_of(name, case, launch, microseconds(problem)))
    entries.sort(key=lambda entry: entry.microseconds)
    for entry in entries[:4] + entries[4:][-1:]:
        print(f"{name:12} {case!s:44} {entry.microseconds:8.2f} µs  {_knobs(entry)}", flush=True)
    return entries


def entry_of(name: str, case: Case, launch: Launch, measured: float) -> tuned.Entry:
    """What the table says of `launch`, which took `measured` microseconds."""
    return tuned.Entry(
        kernel=name,
        sizes=tuned.kept_sizes(case),
        dtype=str(case.dtype),
        out_dtype=str(case.out_dtype),
        launch=dataclasses.asdict(launch),
        microseconds=round(measured, 2),
        device=torch.cuda.get_device_name(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def ranked_between(
    entries: list[tuned.Entry], case: cases.Case, device: Device
) -> list[tuned.Entry]:
    """`entries` by the time of vision and prefill in an engine of `case`, the least first.

    Denoise runs, too, but differs by more between engines, with where its buffers lie.
    """
    model = random_model(PRESETS[case.model], device="cuda", dtype="bfloat16")
    calls = []
    for entry in entries:
        table = table_with(device.capability, [entry])
        with mock.patch.object(tuned, "entries", lambda _, table=table: table):
            subject = make_subject(model, case, engine_config(case, "triton"))
        stages = stage_calls(subject, case)
        calls.append({stage: stages[stage] for stage in cases.STAGES})
    turns: list[list[float]] = [[] for _ in entries]
    for _ in range(TURNS):
        for times, call in zip(turns, calls, strict=True):
            timed = measure(call, "cuda", repeats=RUNS, warm_ups=RUNS)
            times.append(timed["vision"].p50 + timed["prefill"].p50)
    totals = [statistics.median(times) for times in turns]
    order = sorted(range(len(entries)), key=totals.__getitem__)
    for index in order:
        entry = entries[index]
        print(
            f"{entry.kernel:12} {totals[index]:8.3f} ms of both stages  {_knobs(entry)}", flush=True
        )
    return [entries[index] for index in order]


def engine_case(kernel: str, case: Case) -> cases.Case:
    """What an engine runs that has `kernel` at `case`: its rows are cameras and prompt tokens.

    Raises ValueError when they are not even one camera's, as those of denoising.
    """
    standard = cases.standard_case("fp8" if case.dtype == FP8 else "bf16")
    rows, per_camera = case.sizes.get("m", 0), PRESETS[standard.model].tokens_per_image
    if rows < per_camera:
        raise ValueError(f"between stages rows must be {per_camera} or more, got {kernel} {case}")
    cameras, tokens = divmod(rows, per_camera)
    return dataclasses.replace(
        standard, cameras=cameras, prompt_tokens=tokens or standard.prompt_tokens
    )


def microseconds(problem: Problem) -> float:
    """The time of one launch of `problem` among others, its weights from memory."""
    weight = problem.inputs.get("weight")
    rotated = isinstance(weight, Tensor) and weight.ndim == 2
    copies = [weight] if rotated else []
    if rotated:
        count = min(math.ceil(ROTATED_BYTES / weight.nbytes), LAUNCHES)
        copies += [weight.clone() for _ in range(count - 1)]

    def launches() -> None:
        for number in range(LAUNCHES):
            if rotated:
                weight.data = copies[number % len(copies)]
            problem.run()

    return graph_milliseconds(launches) * 1e3 / LAUNCHES


def graph_milliseconds(run: Callable[[], None]) -> float:
    """Median time of one replay of `run` as a CUDA graph."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def write_table(capability: int, results: list[tuned.Entry]) -> None:
    """Put `results` in the place of what the table had for the same cases."""
    path = TABLES / f"sm_{capability}.json"
    lines = (json.dumps(dataclasses.asdict(entry)) for entry in table_with(capability, results))
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    unfinished.replace(path)


def table_with(capability: int, results: list[tuned.Entry]) -> tuple[tuned.Entry, ...]:
    """The table in order, with `results` in the place of what it had for the same cases."""
    kept = {_place(entry): entry for entry in (*tuned.entries(capability), *results)}
    return tuple(kept[place] for place in sorted(kept))


def _place(entry: tuned.Entry) -> tuple[str, str, str, str]:
    return entry.kernel, json.dumps(entry.sizes), entry.dtype, entry.out_dtype


def _knobs(entry: tuned.Entry) -> str:
    return " ".join(f"{name}={value}" for name, value in entry.launch.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("kernels", nargs="*", help="names of kernels, all without any")
    parser.add_argument("--only", default="", help="a part of the names of cases")
    parser.add_argument("--rows", type=int, help="of tokens, instead of those of the cases")
    parser.add_argument(
        "--between", action="store_true", help="compare the fastest few between an engine's stages"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    return parser.parse_args()


if __name__ == "__main__":
    main()
