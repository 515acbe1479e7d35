"""Timing kernels one by one, at the shapes that π0.5 runs and the launches of its engine.

A kernel runs in a row of its own kind in one graph, as it would among others in an engine, on
inputs in rotation: neither a launch nor a weight left in the L2 is in its time.
"""

from __future__ import annotations

from typing import Any

import torch

from halfpi.kernels.spec import FP8, Case, Device, KernelSpec, Problem, error_ratio
from halfpi.kernels.tuned import best
from halfpi.perf import devices
from halfpi.perf.bench import known_device, measured_record
from halfpi.perf.cases import Precision, standard_case
from halfpi.perf.records import Percentiles, Record
from halfpi.perf.roofline import Cost
from halfpi.perf.timing import Call, measure_short, rotation


def bench_kernel(
    spec: KernelSpec[Any], device: torch.device, limits: Device, *, repeats: int = 200
) -> list[Record]:
    """Time all real cases of a kernel; a record for each precision.

    limits: what launches depend on. The numbers of a record have the error of each case over that
    of plain torch in the same precision.
    """
    by_precision: dict[Precision, list[Case]] = {}
    for case in spec.cases:
        if case.real:
            by_precision.setdefault(_precision(case), []).append(case)
    known = known_device(device)
    records = []
    for precision, cases in by_precision.items():
        times: dict[str, Percentiles] = {}
        floors: dict[str, float] = {}
        ratios: dict[str, float] = {}
        names = [case.name for case in cases]
        for case in cases:
            # Dtypes tell cases apart where their names do not.
            own = case.name if names.count(case.name) == 1 else str(case)
            name, problems = f"{spec.name}/{own}", problems_of(spec, case, device, limits)
            problems[0].run()
            ratios[f"error_ratio {name}"] = error_ratio(problems[0])
            times |= measure_short({name: in_rotation(problems)}, device, repeats=repeats)
            if known is not None:
                floors[name] = floor_of(problems[0], case, known)
        record = measured_record(
            "kernels",
            "triton",
            standard_case(precision),
            device,
            times,
            floor_ms=floors or None,
            numbers=ratios,
        )
        records.append(record)
    return records


def problems_of(
    spec: KernelSpec[Any],
    case: Case,
    device: torch.device,
    limits: Device,
    count: int | None = None,
) -> list[Problem]:
    """`count` problems of `case` at its launch, or as many as memory must serve."""
    launch = best(spec.name, case.sizes, case.dtype, case.out_dtype, limits)
    first = spec.problem(case, launch, device)
    count = rotation(device, first.bytes) if count is None else count
    return [first, *(spec.problem(case, launch, device) for _ in range(count - 1))]


def in_rotation(problems: list[Problem]) -> Call:
    """A call that runs the problem whose turn it is."""
    return lambda index: problems[index % len(problems)].run()


def floor_of(problem: Problem, case: Case, device: devices.Device) -> float:
    """The floor of one kernel in milliseconds; every operand comes from memory."""
    precision = "fp8" if case.dtype == FP8 else "bf16"
    return Cost(problem.flops, 0, problem.bytes, 0).floor_ms(device, precision)


def _precision(case: Case) -> Precision:
    """Of the engine that runs it; what an engine keeps in fp32 belongs to bf16."""
    return "fp8" if FP8 in (case.dtype, case.out_dtype) else "bf16"
