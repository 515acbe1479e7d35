"""Timing an engine's stages, or a policy from end to end, into a record.

`bench_stages` times vision, prefill and denoise apart, each on inputs that are ready on the device,
and the three together. `bench_e2e` times `Policy.infer`, arrays in and arrays out, on the host's
clock.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, cast

import torch
from torch import Tensor

from halfpi.config import Pi05Config
from halfpi.engine import EagerEngine
from halfpi.model import Pi05, PrefixCache
from halfpi.perf.cases import STAGES, Case
from halfpi.perf.devices import Device, NoFloorError, find_device
from halfpi.perf.engines import GraphEngine, Subject
from halfpi.perf.environment import environment
from halfpi.perf.records import Percentiles, Record
from halfpi.perf.roofline import floors
from halfpi.perf.synthetic import random_inputs
from halfpi.perf.timing import Call, measure, percentiles
from halfpi.policy import Policy
from halfpi.processing.images import to_model
from halfpi.processing.pipeline import ModelInputs
from halfpi.types import Observation

# Inputs in rotation.
_ROTATION = 4


def bench_stages(
    subject: Subject, case: Case, *, repeats: int = 200, rate_hz: float | None = None
) -> Record:
    """Time the stages of an engine on random inputs of `case`; its error is against fp32.

    rate_hz: how often a second they run, as a benchmark of its own, "paced"; None is one after
    another.
    """
    engine, device = subject.engine, subject.engine.device
    inputs, noise = random_inputs(engine.config, case)
    actions, _ = engine.run(inputs, noise, case.steps)
    with torch.inference_mode():
        calls = stage_calls(subject, case)
        clock, launched = clock_of(device), tuple(calls) if isinstance(engine, EagerEngine) else ()
        # At a rate the stages of a call are apart from a call as a whole, or there would be two.
        rounds = [{name: calls[name] for name in STAGES}, {"total": calls["total"]}]
        ms: dict[str, Percentiles] = {}
        for some in [calls] if rate_hz is None else rounds:
            ms |= measure(some, clock, repeats=repeats, launched=launched, rate_hz=rate_hz)
    return _record(
        "stages" if rate_hz is None else "paced",
        subject,
        case,
        ms,
        error=relative_error(actions, reference_actions(subject.model, case)),
        numbers={} if rate_hz is None else {"rate_hz": rate_hz},
    )


def bench_e2e(
    subject: Subject,
    policy: Policy,
    observations: Sequence[Observation],
    case: Case,
    *,
    repeats: int = 200,
) -> Record:
    """Time `policy.infer`, on the engine of `subject`, on `observations` of `case` in rotation.

    "total" is the whole call; stages are as the engine says. Of an engine with graphs, the numbers
    have what the call takes beyond them.
    Raises ValueError without observations, and with some that are not of `case`.
    """
    _check_sizes(policy, observations, case)
    times = []

    def infer(index: int) -> None:
        times.append(policy.infer(observations[index % len(observations)]).times)

    total = measure({"total": infer}, "host", repeats=repeats)["total"]
    parts = {
        stage: percentiles([getattr(each, f"{stage}_ms") for each in times[-repeats:]])
        for stage in ("processing", *STAGES)
    }
    height, width = next(iter(observations[0].images.values())).shape[:2]
    numbers = {
        "image_height": height,
        "image_width": width,
        "p99_over_p50": (total.p99 or 0.0) / total.p50,
    }
    if not isinstance(subject.engine, EagerEngine):
        calls = {"total": stage_calls(subject, case)["total"]}
        graphs_ms = measure(calls, "cuda", repeats=repeats)["total"].p50
        numbers |= {"graphs_ms": graphs_ms, "over_graphs_ms": total.p50 - graphs_ms}
    return _record("e2e", subject, case, parts | {"total": total}, numbers=numbers)


def measured_record(
    benchmark: str,
    engine: str,
    case: Case,
    device: torch.device,
    ms: Mapping[str, Percentiles],
    **others: Any,
) -> Record:
    """A record of what was just measured here; `others` are fields of `Record`."""
    return Record(
        kind="measured",
        benchmark=benchmark,
        engine=engine,
        case=asdict(case),
        ms=ms,
        **others,
        **asdict(environment(device)),
    )


def known_device(device: torch.device) -> Device | None:
    """The limits of `device`, None if it is not in devices.toml."""
    try:
        return find_device(environment(device).device)
    except NoFloorError:
        return None


def stage_floors(config: Pi05Config, case: Case, device: torch.device) -> dict[str, float] | None:
    """Floors of the stages, None where none is known."""
    limits = known_device(device)
    try:
        return None if limits is None else floors(limits, config, case)
    except NoFloorError:
        return None


def model_inputs(
    config: Pi05Config, case: Case, device: torch.device, seed: int = 0
) -> tuple[ModelInputs, Tensor]:
    """Random inputs of `case`, as the plain model reads them, and noise fp32 (1, h, a)."""
    inputs, noise = random_inputs(config, case, seed)
    moved = {name: tensor.to(device) for name, tensor in vars(inputs).items()}
    moved["images"] = to_model(moved["images"])
    return ModelInputs(**moved), noise[None].to(device)


def reference_actions(model: Pi05, case: Case) -> Tensor:
    """Actions (h, a) for `random_inputs` of `case` by `model` in fp32.

    Weights that it holds in bf16 count as exact.
    """
    reference = copy.deepcopy(model).to_dtype(torch.float32)
    inputs, noise = model_inputs(model.config, case, model.action_in.weight.device)
    return reference.sample_actions(**vars(inputs), noise=noise, num_steps=case.steps)[0].cpu()


def relative_error(actions: Tensor, reference: Tensor) -> float:
    """‖actions − reference‖ / ‖reference‖."""
    return float((actions.cpu() - reference).norm() / reference.norm())


def clock_of(device: torch.device) -> Literal["cuda", "host"]:
    """What times work on `device`."""
    return "cuda" if device.type == "cuda" else "host"


def _record(
    benchmark: str,
    subject: Subject,
    case: Case,
    ms: Mapping[str, Percentiles],
    **others: Any,
) -> Record:
    engine = subject.engine
    floor_ms = stage_floors(engine.config, case, engine.device)
    return measured_record(
        benchmark, subject.backend, case, engine.device, ms, floor_ms=floor_ms, **others
    )


def stage_calls(subject: Subject, case: Case) -> dict[str, Call]:
    """Stage → a call that runs it; "total" runs all three."""
    if isinstance(subject.engine, EagerEngine):
        return _torch_calls(subject.engine, case)
    engine = cast("GraphEngine", subject.engine)
    graphs = engine.stage_graphs(case.cameras, case.prompt_tokens, case.steps)

    def total(_: int) -> None:
        for stage in STAGES:
            graphs[stage]()

    return {stage: _ignoring_index(graphs[stage]) for stage in STAGES} | {"total": total}


def _ignoring_index(replay: Callable[[], None]) -> Call:
    return lambda _: replay()


def _torch_calls(engine: EagerEngine, case: Case) -> dict[str, Call]:
    """The stages in plain or compiled torch, each on one of a few inputs."""
    rotation = [model_inputs(engine.config, case, engine.device, seed) for seed in range(_ROTATION)]
    images = [inputs.prepared for inputs, _ in rotation]
    noises = [noise for _, noise in rotation]
    tokens = [engine.vision(image) for image in images]

    def prefill(index: int, image_tokens: Tensor) -> PrefixCache:
        inputs, _ = rotation[index % _ROTATION]
        return engine.prefill(image_tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)

    def denoise(index: int, cache: PrefixCache) -> Tensor:
        return engine.denoise(cache, noises[index % _ROTATION], case.steps)

    caches = [prefill(index, tokens[index]) for index in range(_ROTATION)]
    return {
        "vision": lambda index: engine.vision(images[index % _ROTATION]),
        "prefill": lambda index: prefill(index, tokens[index % _ROTATION]),
        "denoise": lambda index: denoise(index, caches[index % _ROTATION]),
        "total": lambda index: denoise(
            index, prefill(index, engine.vision(images[index % _ROTATION]))
        ),
    }


def _check_sizes(policy: Policy, observations: Sequence[Observation], case: Case) -> None:
    inputs = [policy.processor.inputs(observation) for observation in observations]
    sizes = {(int(each.image_mask.sum()), int(each.token_mask.sum())) for each in inputs}
    if sizes != {(case.cameras, case.prompt_tokens)}:
        raise ValueError(
            f"observations must be of {case.cameras} cameras and {case.prompt_tokens} prompt "
            f"tokens, got {sorted(sizes) or 'none'}"
        )
