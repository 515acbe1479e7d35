"""Several calls in one pass, for a policy that several robots share.

Denoising a chunk of a small batch costs hardly more than denoising one: what takes the time is
reading weights on a GPU, and starting operations on a CPU. Calls are computed together when they
agree on what is one number for a whole pass: Euler steps, how many actions are given, and the bound
of the guidance. Cameras and prompt lengths may differ; masks see to that.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from halfpi.engine import BatchEngine, drawn
from halfpi.model import Guidance
from halfpi.policy import Arguments, Policy
from halfpi.processing.pipeline import ModelInputs
from halfpi.types import ActionChunk, Observation


@dataclass(frozen=True)
class Call:
    """The arguments of a `Policy.infer` that keeps nothing."""

    observation: Observation
    noise: NDArray[np.float32] | None = None
    given: NDArray[np.float32] | None = None
    guidance: Guidance | None = None
    num_steps: int | None = None


def can_batch(policy: Policy) -> bool:
    """Whether the policy's engine computes several observations in one pass."""
    return isinstance(policy.engine, BatchEngine)


def infer_many(policy: Policy, calls: Sequence[Call]) -> list[ActionChunk | ValueError]:
    """What `policy.infer` gives or raises for each of `calls`, up to rounding; in their order.

    `policy` must be one that `can_batch`. A ValueError is one call's own and leaves the others
    alone. Noise is drawn in the order of the calls. The stage times of a chunk are those of its
    pass, which all calls in it waited for. What earlier calls left to keep stays as it is.
    """
    rows = [_row(policy, call) for call in calls]
    outcomes: dict[int, ActionChunk | ValueError] = {}
    passes: dict[tuple[object, ...], dict[int, _Row]] = defaultdict(dict)
    for index, row in enumerate(rows):
        if isinstance(row, ValueError):
            outcomes[index] = row
        else:
            passes[row.shared][index] = row
    for together in passes.values():
        outcomes.update(zip(together, _run(policy, list(together.values())), strict=True))
    return [outcomes[index] for index in range(len(calls))]


@dataclass(frozen=True)
class _Row:
    """One call, ready for a pass."""

    observation: Observation
    inputs: ModelInputs
    arguments: Arguments
    noise: torch.Tensor
    processing_ms: float

    @property
    def shared(self) -> tuple[object, ...]:
        """What all rows of a pass have in common."""
        given, guidance = self.arguments.given, self.arguments.guidance
        return (
            self.arguments.num_steps,
            0 if given is None else len(given),
            None if guidance is None else guidance.max_gain,
        )


def _row(policy: Policy, call: Call) -> _Row | ValueError:
    began = time.perf_counter()
    try:
        inputs = policy.processor.inputs(call.observation)
        arguments = policy.arguments(call.noise, call.given, call.guidance, call.num_steps)
    except ValueError as error:
        return error
    noise = drawn(arguments.noise)
    processing_ms = (time.perf_counter() - began) * 1000
    return _Row(call.observation, inputs, arguments, noise, processing_ms)


def _run(policy: Policy, rows: Sequence[_Row]) -> list[ActionChunk | ValueError]:
    noise = torch.stack([row.noise for row in rows])
    engine = policy.engine
    if not isinstance(engine, BatchEngine):
        raise TypeError(f"{type(engine).__name__} computes one observation at a time")
    actions, times = engine.run_many(
        _stacked_inputs(rows),
        noise,
        rows[0].arguments.num_steps,
        _stacked_given(rows),
        _stacked_guidance(rows),
    )
    chunks: list[ActionChunk | ValueError] = []
    for row, normalized in zip(rows, actions.numpy(), strict=True):
        began = time.perf_counter()
        try:
            robot_actions = policy.processor.outputs(normalized, row.observation)
        except ValueError as error:
            chunks.append(error)
            continue
        processing_ms = row.processing_ms + (time.perf_counter() - began) * 1000
        own = dataclasses.replace(times, processing_ms=processing_ms)
        chunks.append(ActionChunk(robot_actions, normalized, own))
    return chunks


def _stacked_inputs(rows: Sequence[_Row]) -> ModelInputs:
    names = [field.name for field in dataclasses.fields(ModelInputs)]
    return ModelInputs(
        **{name: torch.cat([getattr(row.inputs, name) for row in rows]) for name in names}
    )


def _stacked_given(rows: Sequence[_Row]) -> torch.Tensor | None:
    given = [row.arguments.given for row in rows if row.arguments.given is not None]
    return torch.stack(given) if len(given) == len(rows) else None


def _stacked_guidance(rows: Sequence[_Row]) -> Guidance | None:
    guidance = [row.arguments.guidance for row in rows if row.arguments.guidance is not None]
    if not guidance:
        return None
    return Guidance(
        torch.stack([one.target for one in guidance]),
        torch.stack([one.weights for one in guidance]),
        guidance[0].max_gain,
    )
