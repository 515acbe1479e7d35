"""`halfpi bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halfpi.checkpoints import load_model
from halfpi.commands.checkpoint import open_source
from halfpi.commands.console import notes, output
from halfpi.config import PRESETS
from halfpi.model import Pi05
from halfpi.perf.bench import bench_stages, report
from halfpi.perf.cases import Case
from halfpi.perf.records import append_record
from halfpi.perf.synthetic import random_model
from halfpi.policy import default_device

if TYPE_CHECKING:
    from halfpi.cli import Bench


def bench(options: Bench) -> None:
    """Time the stages, print the report, and append the record if asked to."""
    device = options.device or default_device()
    model = _model(options, device)
    case = Case(
        model=options.checkpoint,
        cameras=options.cameras,
        prompt_tokens=options.prompt_tokens,
        horizon=model.config.horizon,
        steps=options.num_steps,
        precision=options.precision,
    )
    record = bench_stages(model, case, repeats=options.repeats)
    output.print(report(record))
    if options.results is not None:
        notes.print(f"appended to {append_record(record, options.results)}")


def _model(options: Bench, device: str) -> Pi05:
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[options.precision]
    if options.checkpoint != "nano" and options.checkpoint in PRESETS:
        return random_model(PRESETS[options.checkpoint], device=device, dtype=dtype)
    return load_model(open_source(options), device=device, dtype=dtype)
