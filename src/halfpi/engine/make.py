"""An engine of any backend for a model."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from halfpi.config import EngineConfig, Pi05Config
from halfpi.engine.eager import EagerEngine, Noise
from halfpi.model import Guidance, Pi05
from halfpi.processing.pipeline import ModelInputs
from halfpi.quant import FakeQuantPi05, Scales
from halfpi.types import StageTimes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Engine(Protocol):
    """What a policy needs of an engine; `EagerEngine` says what the methods do."""

    config: Pi05Config
    device: torch.device
    defers: bool  # whether inputs may be `DeferredInputs`

    def run(
        self,
        inputs: ModelInputs | None,
        noise: Noise,
        num_steps: int,
        given: Tensor | None = None,
        guidance: Guidance | None = None,
        kept: Collection[int] = (),
    ) -> tuple[Tensor, StageTimes]:
        """Actions of one observation."""

    def forget(self) -> None:
        """Drop what earlier calls left to keep."""


@runtime_checkable
class BatchEngine(Protocol):
    """What computes several observations in one pass; `EagerEngine.run_many` says how."""

    def run_many(
        self,
        inputs: ModelInputs,
        noise: Tensor,
        num_steps: int,
        given: Tensor | None = None,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, StageTimes]:
        """Actions of all of them."""


def make_engine(
    model: Pi05,
    config: EngineConfig,
    *,
    device: torch.device | str | None = None,
    scales: Scales | None = None,
) -> Engine:
    """An engine that runs `model` as `config` says.

    model: for "triton" best left on the CPU, from where it is packed matrix by matrix; it can be
    dropped afterwards. Other backends change its dtype and device in place. device: a torch device,
    the model's without it. scales: of fp8.

    Raises ValueError when scales are missing, or of another model, and when the device cannot run
    the backend.
    """
    where = model.action_in.weight.device if device is None else torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    scales = _scales_of(model, config, scales)
    if config.backend == "triton":
        return _triton_engine(model, config, where, scales)
    model = _in_precision(model, config, scales).to(where)
    if config.backend == "compile":
        return EagerEngine(model, partial(torch.compile, dynamic=False))
    return EagerEngine(model)


def _scales_of(model: Pi05, config: EngineConfig, scales: Scales | None) -> Scales | None:
    """`scales`, checked, in fp8; None in other precisions."""
    if config.precision != "fp8":
        return None
    if scales is None:
        raise ValueError("precision fp8 needs scales, got none; `halfpi calibrate` makes them")
    scales.check(model.config)
    return scales


def _in_precision(model: Pi05, config: EngineConfig, scales: Scales | None) -> Pi05:
    if scales is not None:
        return FakeQuantPi05(model, scales)
    return model.to_dtype(_DTYPES[config.precision])


def _triton_engine(
    model: Pi05, config: EngineConfig, device: torch.device, scales: Scales | None
) -> Engine:
    if device.type != "cuda":
        raise ValueError(f"backend triton needs a CUDA device, got {device}")
    if config.precision == "fp32":
        raise ValueError("backend triton runs in bf16 or fp8, got fp32")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise ValueError(
            f"backend triton needs a GPU of compute capability 8.9 or newer, "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        )
    if scales is not None and config.num_steps != (scales.num_steps,):
        raise ValueError(
            f"the scales are for {scales.num_steps} Euler steps, got num_steps={config.num_steps}"
        )
    # Imports Triton, which a CPU build of torch comes without.
    from halfpi.engine.triton import TritonEngine

    return TritonEngine(model, config, device, scales)
