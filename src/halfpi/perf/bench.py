"""Timing a model's stages, or a policy from end to end, into a record.

`bench_stages` times vision, prefill and denoise apart, each on inputs that are ready on the device,
and the three together. `bench_e2e` times `Policy.infer`, arrays in and arrays out, on the host's
clock.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor

from halfpi.model import Pi05, PrefixCache
from halfpi.perf.cases import STAGES, Case, Precision
from halfpi.perf.devices import NoFloorError, find_device
from halfpi.perf.environment import environment
from halfpi.perf.records import Percentiles, Record
from halfpi.perf.roofline import floors
from halfpi.perf.synthetic import random_inputs
from halfpi.perf.timing import Call, measure, percentiles
from halfpi.policy import Policy
from halfpi.processing.images import to_model
from halfpi.processing.pipeline import ModelInputs
from halfpi.quant import FakeQuantPi05
from halfpi.types import Observation

# Inputs in rotation.
_ROTATION = 4
_PRECISIONS: Mapping[torch.dtype, Precision] = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def bench_stages(model: Pi05, case: Case, *, repeats: int = 200) -> Record:
    """Time the stages of `model` in plain torch, on random inputs of `case`.

    Raises ValueError when `model` is of another precision than `case`, or fake-quantised.
    """
    if precision_of(model) != case.precision:
        raise ValueError(f"the model is {precision_of(model)}, the case {case.precision}")
    device = model.action_in.weight.device
    _reset_peak(device)
    with torch.inference_mode():
        calls = _stage_calls(model, case)
        ms = measure(calls, "cuda" if device.type == "cuda" else "host", repeats=repeats)
    peak_bytes = _peak_bytes(device)
    return _record("stages", device, model, case, ms, peak_bytes, _error(model, case))


def bench_e2e(
    policy: Policy, observations: Sequence[Observation], *, name: str, repeats: int = 200
) -> Record:
    """Time `policy.infer` on `observations` in rotation; the case is what they hold.

    name: the model's, for the record. "total" is the whole call; stages are as the engine says.
    Raises ValueError without observations, with some that differ in cameras or prompt length, and
    for a model that is fake-quantised.
    """
    model = policy.engine.model
    cameras, prompt_tokens = _common_size(policy, observations)
    case = Case(name, cameras, prompt_tokens, policy.horizon, policy.num_steps, precision_of(model))
    times = []

    def infer(index: int) -> None:
        times.append(policy.infer(observations[index % len(observations)]).times)

    _reset_peak(policy.engine.device)
    total = measure({"total": infer}, "host", repeats=repeats)
    parts = {
        stage: percentiles([getattr(each, f"{stage}_ms") for each in times[-repeats:]])
        for stage in ("processing", *STAGES)
    }
    peak_bytes = _peak_bytes(policy.engine.device)
    return _record("e2e", policy.engine.device, model, case, parts | total, peak_bytes, None)


def precision_of(model: Pi05) -> Precision:
    """The precision in which `model` can be timed.

    Raises ValueError for fake quantisation, which is slower than what it imitates.
    """
    if isinstance(model, FakeQuantPi05):
        raise ValueError("fake quantisation shows what fp8 does to actions; its time means nothing")
    return _PRECISIONS[model.dtype]


def report(record: Record) -> RenderableType:
    """What a terminal shows of `record`: floors first, then what was measured, then the share."""
    case = ", ".join(f"{name} {value}" for name, value in record.case.items())
    table = Table(title=f"{record.benchmark}, {record.engine}, {record.device}", caption=case)
    table.add_column("")
    for column in ("floor ms", "p50 ms", "p90 ms", "p99 ms", "share of floor"):
        table.add_column(column, justify="right")
    for name, times in record.ms.items():
        floor = (record.floor_ms or {}).get(name)
        numbers = (floor, times.p50, times.p90, times.p99)
        shown = ("" if number is None else f"{number:.2f}" for number in numbers)
        table.add_row(name, *shown, "" if floor is None else f"{floor / times.p50:.0%}")
    if record.floor_ms is not None:
        return table
    precision = record.case["precision"]
    return Group(table, f"No floor is known on {record.device} in {precision} (devices.toml).")


def _stage_calls(model: Pi05, case: Case) -> dict[str, Call]:
    """Stage → a call that runs it on one of a few inputs; "total" runs all three."""
    rotation = [_device_inputs(model, case, seed) for seed in range(_ROTATION)]
    images = [inputs.images for inputs, _ in rotation]
    noises = [noise for _, noise in rotation]
    tokens = [model.vision(image) for image in images]

    def prefill(index: int, image_tokens: Tensor) -> PrefixCache:
        inputs, _ = rotation[index % _ROTATION]
        return model.prefill(image_tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)

    def denoise(index: int, cache: PrefixCache) -> Tensor:
        return model.denoise(cache, noises[index % _ROTATION], case.steps)

    caches = [prefill(index, tokens[index]) for index in range(_ROTATION)]
    return {
        "vision": lambda index: model.vision(images[index % _ROTATION]),
        "prefill": lambda index: prefill(index, tokens[index % _ROTATION]),
        "denoise": lambda index: denoise(index, caches[index % _ROTATION]),
        "total": lambda index: denoise(
            index, prefill(index, model.vision(images[index % _ROTATION]))
        ),
    }


def _device_inputs(model: Pi05, case: Case, seed: int) -> tuple[ModelInputs, Tensor]:
    """Random inputs and noise fp32 (1, h, a), on the device of `model`."""
    device = model.action_in.weight.device
    inputs, noise = random_inputs(model.config, case, seed)
    moved = {name: tensor.to(device) for name, tensor in vars(inputs).items()}
    moved["images"] = to_model(moved["images"])
    return ModelInputs(**moved), noise[None].to(device)


def _error(model: Pi05, case: Case) -> float:
    """‖actions − reference‖ / ‖reference‖ of `model` against itself in fp32."""
    if case.precision == "fp32":
        return 0.0
    inputs, noise = _device_inputs(model, case, seed=0)
    reference = copy.deepcopy(model).to_dtype(torch.float32)
    actions, expected = (
        each.sample_actions(**vars(inputs), noise=noise, num_steps=case.steps)
        for each in (model, reference)
    )
    return float((actions - expected).norm() / expected.norm())


def _common_size(policy: Policy, observations: Sequence[Observation]) -> tuple[int, int]:
    """Cameras and prompt tokens of each of `observations`."""
    inputs = [policy.processor.inputs(observation) for observation in observations]
    sizes = {(int(each.image_mask.sum()), int(each.token_mask.sum())) for each in inputs}
    if len(sizes) != 1:
        raise ValueError(
            "observations must be of one number of cameras and prompt tokens, "
            f"got {sorted(sizes) or 'none'}"
        )
    return sizes.pop()


def _record(
    benchmark: str,
    device: torch.device,
    model: Pi05,
    case: Case,
    ms: Mapping[str, Percentiles],
    peak_bytes: int | None,
    error: float | None,
) -> Record:
    where = environment(device)
    try:
        floor_ms = floors(find_device(where.device), model.config, case)
    except NoFloorError:
        floor_ms = None
    return Record(
        kind="measured",
        benchmark=benchmark,
        engine="eager",
        case=asdict(case),
        ms=ms,
        floor_ms=floor_ms,
        peak_bytes=peak_bytes,
        error=error,
        **asdict(where),
    )


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
