"""`halfpi bench`. What needs Triton is imported where it is used: not every torch brings it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from halfpi.checkpoints import load_model
from halfpi.commands.checkpoint import open_source
from halfpi.commands.console import notes, output
from halfpi.config import PRESETS, Pi05Config, Precision
from halfpi.kernels import specs
from halfpi.kernels.spec import Device
from halfpi.model import Pi05
from halfpi.perf.bench import bench_e2e, bench_stages
from halfpi.perf.bench_kernels import bench_kernel
from halfpi.perf.cases import ABLATION, Case, weights_dtype
from halfpi.perf.charts import draw
from halfpi.perf.cold import bench_cold
from halfpi.perf.engines import engine_config, make_subject
from halfpi.perf.records import Record, append_record
from halfpi.perf.report import report
from halfpi.perf.synthetic import random_model, random_observations, random_policy
from halfpi.policy import default_device

if TYPE_CHECKING:
    from halfpi import cli

# The size of a camera's images, height and width.
_CAMERA = (480, 640)


def bench(options: cli.Bench) -> None:
    """Measure, print the report, and keep records and chart if asked to.

    A record is appended as soon as it is there: what fails later costs nothing that was measured.
    """
    what = options.what
    device = torch.device(what.device or default_device())
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    records = []
    for record in _BENCHMARKS[type(what).__name__](what, device):
        records.append(record)
        if what.results is not None:
            path = append_record(record, what.results)
            notes.print(f"{record.engine}: appended to {path}")
    output.print(report(records))
    if what.chart is not None:
        draw(records, what.chart)


def _kernels(options: cli.BenchKernels, device: torch.device) -> Iterator[Record]:
    found = specs()
    unknown = [name for name in options.kernels if name not in found]
    if unknown:
        raise ValueError(f"no kernel is called {unknown[0]}; there are {', '.join(found)}")
    _require_gpu(device)
    for name in options.kernels or found:
        yield from bench_kernel(found[name], device, Device.of(device), repeats=options.repeats)


def _mlp(options: cli.BenchMlp, device: torch.device) -> list[Record]:
    from halfpi.perf.bench_mlp import bench_mlp

    _require_gpu(device)
    return bench_mlp(device, repeats=options.repeats)


def _attention(options: cli.BenchAttention, device: torch.device) -> list[Record]:
    from halfpi.perf.bench_attention import bench_attention

    _require_gpu(device)
    return bench_attention(device, Device.of(device), repeats=options.repeats)


def _stages(
    options: cli.BenchStages | cli.BenchPaced, device: torch.device, rate_hz: float | None = None
) -> Iterator[Record]:
    model, case = _model_and_case(options, device)
    subject = make_subject(model, case, engine_config(case, options.backend))
    yield bench_stages(subject, case, repeats=options.repeats, rate_hz=rate_hz)


def _paced(options: cli.BenchPaced, device: torch.device) -> Iterator[Record]:
    return _stages(options, device, options.rate_hz)


def _e2e(options: cli.BenchE2e, device: torch.device) -> Iterator[Record]:
    model, case = _model_and_case(options, device)
    subject = make_subject(model, case, engine_config(case, options.backend))
    policy = random_policy(subject.engine, case)
    for shape in (None, _CAMERA):
        observations = random_observations(model.config, case, 8, image_shape=shape)
        yield bench_e2e(subject, policy, observations, case, repeats=options.repeats)


def _ablation(options: cli.BenchAblation, device: torch.device) -> list[Record]:
    from halfpi.perf.ablation import bench_ablation

    config, case = _preset_and_case(options, "bf16")
    model = random_model(config, device=device, dtype="bfloat16")
    names = options.variants or tuple(ABLATION)
    return bench_ablation(model, case, names, repeats=options.repeats)


def _cold(options: cli.BenchCold, device: torch.device) -> Iterator[Record]:
    config, case = _preset_and_case(options, options.precision)
    yield bench_cold(config, case, options.backend, device, repeats=options.repeats)


_BENCHMARKS: dict[str, Callable[[Any, torch.device], Iterator[Record] | list[Record]]] = {
    "BenchKernels": _kernels,
    "BenchStages": _stages,
    "BenchPaced": _paced,
    "BenchE2e": _e2e,
    "BenchMlp": _mlp,
    "BenchAttention": _attention,
    "BenchAblation": _ablation,
    "BenchCold": _cold,
}


def _preset_and_case(options: cli.BenchPreset, precision: Precision) -> tuple[Pi05Config, Case]:
    if options.checkpoint not in PRESETS:
        raise ValueError(f"no preset is called {options.checkpoint}: {', '.join(PRESETS)}")
    config = PRESETS[options.checkpoint]
    tokens = (options.cameras, options.prompt_tokens)
    return config, Case(options.checkpoint, *tokens, config.horizon, 10, precision)


def _model_and_case(options: cli.BenchEngine, device: torch.device) -> tuple[Pi05, Case]:
    dtype = weights_dtype(options.precision)
    if options.checkpoint != "nano" and options.checkpoint in PRESETS:
        model = random_model(PRESETS[options.checkpoint], device=device, dtype=dtype)
    else:
        model = load_model(open_source(options), device=device, dtype=dtype)
    case = Case(
        model=options.checkpoint,
        cameras=options.cameras,
        prompt_tokens=options.prompt_tokens,
        horizon=model.config.horizon,
        steps=options.num_steps,
        precision=options.precision,
    )
    return model, case


def _require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"this benchmark times kernels and needs a CUDA device, got {device}")
