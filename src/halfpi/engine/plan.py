"""Everything that a Triton engine decides and allocates before its first call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from halfpi.config import EngineConfig, Pi05Config
from halfpi.engine.denoise import DenoiseInputs, DenoiseStage, modulation_table
from halfpi.engine.graphs import Timed
from halfpi.engine.images import ImageInput
from halfpi.engine.operations import Operations
from halfpi.engine.packing import Packer
from halfpi.engine.persistent import PersistentDenoise, persistent_sizes
from halfpi.engine.prefill import Cache, PrefillStage
from halfpi.engine.staging import Field, Staging
from halfpi.engine.vision import VisionStage
from halfpi.model import Pi05
from halfpi.quant import Scales

# A prefix runs in the smallest multiple of this that holds it: whole tiles of a product.
BUCKET_ROWS = 128
_WORKING = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """Buffers and graphs of one engine.

    staging: small inputs of a call. images: what brings the others. embedded: (s, d), rows of the
    prefix. vision: by dtype of the images, first block and number of blocks. prefill: by rows,
    ascending. denoise: by number of steps. result: fp32 (h, a) on the host, pinned for a GPU, where
    denoise leaves the actions. persistent: whether it is one kernel for all steps.
    """

    staging: Staging
    images: ImageInput
    embedded: Tensor
    vision: Mapping[tuple[torch.dtype, int, int], Timed]
    prefill: Mapping[int, Timed]
    denoise: Mapping[int, Timed]
    result: Tensor
    persistent: bool


def make_plan(
    model: Pi05, config: EngineConfig, device: torch.device, scales: Scales | None
) -> Plan:
    """Pack `model` for `device`, allocate, compile and capture."""
    sizes, working = model.config, _WORKING[config.precision]
    packer = Packer(model, device, working, scales)
    operations = Operations(device, working)
    prefix_rows = config.max_cameras * sizes.tokens_per_image + config.max_prompt_tokens
    staging = Staging(_fields(sizes, config), device)
    embedded = torch.zeros(prefix_rows, sizes.prefix_width, dtype=working, device=device)
    cache = Cache.empty(sizes, prefix_rows + sizes.horizon, working, device)

    prefill = PrefillStage(sizes, packer.prefix(), operations, embedded, cache, staging.device)
    vision = VisionStage(sizes, packer.vision(), operations, embedded, config.max_cameras)
    result = torch.zeros(sizes.horizon, sizes.action_dim, pin_memory=device.type == "cuda")
    stages = _denoise_stages(packer, config, operations, cache, _denoise_inputs(staging, result))
    buffers = {torch.uint8: vision.pixels, torch.float32: vision.floats}
    tables = {steps: modulation_table(model, steps, device) for steps in config.num_steps}
    _fill_for_capture(staging, prefix_rows)
    return Plan(
        staging=staging,
        images=ImageInput(buffers, operations),
        embedded=embedded,
        vision={
            (dtype, first, count): Timed(partial(vision.enqueue, source, first, count), device)
            for dtype, source in buffers.items()
            for first in range(config.max_cameras)
            for count in range(1, config.max_cameras - first + 1)
        },
        prefill={
            rows: Timed(partial(prefill.enqueue, rows), device) for rows in buckets(prefix_rows)
        },
        denoise={
            steps: Timed(partial(stages[steps].enqueue, table), device)
            for steps, table in tables.items()
        },
        result=result,
        persistent=isinstance(next(iter(stages.values())), PersistentDenoise),
    )


def _denoise_stages(
    packer: Packer,
    config: EngineConfig,
    operations: Operations,
    cache: Cache,
    inputs: DenoiseInputs,
) -> Mapping[int, DenoiseStage | PersistentDenoise]:
    """By number of steps: one kernel for each schedule where that can be, else a chain for all."""
    sizes, weights, device = packer.config, packer.expert(), cache.keys.device
    precision = weights.layers[0].qkv.weight.dtype
    planned = {
        steps: persistent_sizes(sizes, steps, precision, device) for steps in config.num_steps
    }
    whole = {steps: one for steps, one in planned.items() if one is not None}
    if config.persistent_expert and len(whole) == len(planned):
        try:
            return {
                steps: PersistentDenoise(one, weights, cache, inputs)
                for steps, one in whole.items()
            }
        except ImportError as error:
            warnings.warn(f"the expert runs as a chain of kernels: {error}", stacklevel=2)
    chain = DenoiseStage(sizes, weights, operations, cache, inputs)
    return dict.fromkeys(config.num_steps, chain)


def buckets(rows: int) -> list[int]:
    """Row counts that prefixes of up to `rows` tokens run in, ascending."""
    return [*range(BUCKET_ROWS, rows, BUCKET_ROWS), rows]


def _fields(sizes: Pi05Config, config: EngineConfig) -> dict[str, Field]:
    counts = ("image_count", "token_count", "prefix_count", "key_count", "decided")
    actions = Field((sizes.horizon, sizes.action_dim), torch.float32)
    return {
        "tokens": Field((config.max_prompt_tokens,), torch.int32),
        **dict.fromkeys(counts, Field((1,), torch.int32)),
        "actions": actions,
        "target": actions,
        "pull": Field((sizes.horizon,), torch.float32),
        "gains": Field((max(config.num_steps),), torch.float32),
    }


def _denoise_inputs(staging: Staging, result: Tensor) -> DenoiseInputs:
    names = ("actions", "decided", "prefix_count", "key_count", "target", "pull", "gains")
    return DenoiseInputs(**{name: staging.device[name] for name in names}, result=result)


def _fill_for_capture(staging: Staging, prefix_rows: int) -> None:
    """Counts that kernels can run with while they are compiled."""
    host = staging.host
    host["prefix_count"].fill_(prefix_rows)
    host["key_count"].fill_(prefix_rows + host["actions"].shape[0])
    staging.upload()
