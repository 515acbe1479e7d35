"""π0.5's three attentions by everybody who offers one: torch's backends, xformers, halfpi.

Query heads that share their keys are rows of one product in halfpi's kernel. A library gets them as
heads, and in its variants that are called packed as rows of a single head, which is the same sum.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from halfpi.kernels.attention import SPEC
from halfpi.kernels.spec import Case, Device, Problem
from halfpi.perf.bench import known_device, measured_record
from halfpi.perf.bench_kernels import floor_of, problems_of
from halfpi.perf.cases import standard_case
from halfpi.perf.records import Percentiles, Record
from halfpi.perf.timing import Call, measure_short

# Runs one problem → (b, t, q, k).
Attend = Callable[[Problem], Tensor]

# In an engine the kernel before has just written what attention reads: it is in the L2.
_ROTATION = 4
_BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def bench_attention(
    device: torch.device,
    limits: Device,
    cases: tuple[Case, ...] = SPEC.cases,
    *,
    repeats: int = 200,
) -> list[Record]:
    """Time the real bf16 `cases` by each implementation, a record each.

    A record's error is the largest of its shapes, against fp32. An implementation that does not run
    a shape is left out there, with a warning.
    """
    times: dict[str, dict[str, Percentiles]] = {}
    errors: dict[str, float] = {}
    floors: dict[str, float] = {}
    known = known_device(device)
    for own in cases:
        if not own.real or {own.dtype, own.out_dtype} != {torch.bfloat16}:
            continue
        # Libraries have no place for the bias that the engine's vision leaves to the kernel.
        case = dataclasses.replace(own, sizes={**own.sizes, "bias": 0})
        problems = problems_of(SPEC, case, device, limits, count=_ROTATION)
        truth, calls = problems[0].truth()[0], dict[str, Call]()
        for name, attend in attentions(shared_keys=case["kv"] == 1).items():
            try:
                out = attend(problems[0]).float()
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                warnings.warn(f"{name} does not run {case.name}: {reason}", stacklevel=2)
                continue
            errors[name] = max(errors.get(name, 0.0), float((out - truth).norm() / truth.norm()))
            calls[name] = _in_rotation(problems, attend)
        for name, measured in measure_short(calls, device, repeats=repeats).items():
            times.setdefault(name, {})[case.name] = measured
        if known is not None:
            floors[case.name] = floor_of(problems[0], case, known)
    return [
        measured_record(
            "attention",
            name,
            standard_case("bf16"),
            device,
            measured,
            floor_ms={shape: floors[shape] for shape in measured} if floors else None,
            error=errors[name],
        )
        for name, measured in times.items()
    ]


def attentions(*, shared_keys: bool) -> dict[str, Attend]:
    """All implementations by name; packed ones only where all query heads share one key head."""
    found: dict[str, Attend] = {"halfpi": _halfpi}
    for name, backend in _BACKENDS.items():
        found[name] = partial(_torch, backend)
        if shared_keys:
            found[f"{name}, packed"] = partial(_torch_packed, backend)
    if find_spec("xformers") is not None:
        found["xformers"] = partial(_xformers, importlib.import_module("xformers.ops"))
    return found


def _halfpi(problem: Problem) -> Tensor:
    problem.run()
    return problem.outputs[0].tensor


def _torch(backend: SDPBackend, problem: Problem) -> Tensor:
    query, keys, values = (tensor.transpose(1, 2) for tensor in _operands(problem))
    grouped = query.shape[1] != keys.shape[1]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)
    return out.transpose(1, 2)


def _torch_packed(backend: SDPBackend, problem: Problem) -> Tensor:
    query, keys, values = _operands(problem)
    rows = query.flatten(1, 2)[:, None]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(rows, keys.transpose(1, 2), values.transpose(1, 2))
    return out.view(query.shape)


def _xformers(ops: Any, problem: Problem) -> Tensor:
    query, keys, values = _operands(problem)
    rows = query.flatten(1, 2)[:, :, None] if keys.shape[2] == 1 else query
    out: Tensor = ops.memory_efficient_attention(rows, keys, values)
    return out.view(query.shape)


def _operands(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (b, t, q, k), and keys and values (b, s, kv, k), all of them valid."""
    return problem.inputs["query"], problem.inputs["keys"], problem.inputs["values"]


def _in_rotation(problems: list[Problem], attend: Attend) -> Call:
    return lambda index: attend(problems[index % len(problems)])
