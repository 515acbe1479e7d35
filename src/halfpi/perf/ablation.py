"""What each step from plain torch to the engine gives: the waterfall.

All variants stay in memory and run interleaved. Those before the engine are models of
`halfpi.perf.variants`; each keeps the changes of the one before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from halfpi.model import Pi05
from halfpi.perf.bench import (
    clock_of,
    measured_record,
    model_inputs,
    reference_actions,
    relative_error,
    stage_calls,
    stage_floors,
)
from halfpi.perf.cases import ABLATION, Case
from halfpi.perf.engines import engine_config, make_subject, random_scales
from halfpi.perf.kernel_count import count_kernels, kernel_names
from halfpi.perf.records import Record
from halfpi.perf.synthetic import random_inputs
from halfpi.perf.timing import Call, captured, measure
from halfpi.perf.variants import (
    fuse_attention,
    fuse_quantisation,
    quantise_linears,
    sharing_copy,
)

# The last two are engines.
_ENGINES = ("no reformats", "restructured expert")


@dataclass(frozen=True)
class _Variant:
    """run: what is timed. actions: fp32 (h, a). owner: of the memory that graphs in `run` read."""

    run: Call
    actions: Tensor
    owner: object


def bench_ablation(
    model: Pi05, case: Case, names: Sequence[str] = tuple(ABLATION), *, repeats: int = 200
) -> list[Record]:
    """Time the variants `names` of the bf16 `model` in `case`, a record each.

    The numbers of a record have how many kernels a call runs, and how many of those only cast,
    copy or change a layout. Raises ValueError for a variant that does not exist.
    """
    unknown = [name for name in names if name not in ABLATION]
    if unknown or not names:
        raise ValueError(f"variants must be of {', '.join(ABLATION)}, got {', '.join(names)}")
    device = model.action_in.weight.device
    on_gpu = device.type == "cuda"
    with torch.inference_mode():
        variants = {name: _variant(model, case, name) for name in ABLATION if name in names}
        reference = reference_actions(model, case)
        counts = {
            name: count_kernels(kernel_names(partial(one.run, 0))) for name, one in variants.items()
        }
        calls = {name: one.run for name, one in variants.items()}
        times = measure(calls, clock_of(device), repeats=repeats, launched=("eager",))
    records = []
    for name, one in variants.items():
        own = dataclasses.replace(case, precision=ABLATION[name])
        floors = stage_floors(model.config, own, device)
        records.append(
            measured_record(
                "ablation",
                name,
                own,
                device,
                {"total": times[name]},
                floor_ms=None if floors is None else {"total": floors["total"]},
                error=relative_error(one.actions, reference),
                numbers=counts[name] if on_gpu else {},
            )
        )
    return records


def _variant(model: Pi05, case: Case, name: str) -> _Variant:
    if name in _ENGINES:
        return _engine_variant(model, case, persistent_expert=name == _ENGINES[1])
    changed = _changed(model, case, name)
    inputs, noise = model_inputs(model.config, case, model.action_in.weight.device)

    def run(_: int) -> Tensor:
        tokens = changed.vision(inputs.images)
        cache = changed.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
        return changed.denoise(cache, noise, case.steps)

    actions = run(0)[0].cpu()
    is_graph = noise.is_cuda and name != "eager"
    return _Variant(captured(run, 1) if is_graph else run, actions, changed)


def _changed(model: Pi05, case: Case, name: str) -> Pi05:
    """A copy of `model` with the changes of all variants up to `name`."""
    changed, order = sharing_copy(model), list(ABLATION)
    made = order[: order.index(name) + 1]
    if "fused attention" in made:
        fuse_attention(changed)
    if "naive fp8" in made:
        quantise_linears(changed, random_scales(model, case))
    if "fused fp8" in made:
        fuse_quantisation(changed)
    return changed


def _engine_variant(model: Pi05, case: Case, *, persistent_expert: bool) -> _Variant:
    own = dataclasses.replace(case, precision="fp8")
    config = engine_config(own, "triton", persistent_expert=persistent_expert)
    subject = make_subject(model, own, config)
    inputs, noise = random_inputs(model.config, own)
    actions, _ = subject.engine.run(inputs, noise, own.steps)
    return _Variant(stage_calls(subject, own)["total"], actions, subject)
