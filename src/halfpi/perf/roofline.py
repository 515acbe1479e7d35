"""Floors: the least time in which a device can do a stage's necessary work.

Necessary are the matrix products, at the rate of their format, and reading weights, inputs and
outputs of a stage once, at the memory's bandwidth; the two overlap, so the slower one counts.
Norms, activations and all that stays on the chip cost nothing here. A denoising step reads the
expert and the prefix's keys and values anew, unless they all fit into the L2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from halfpi.config import Pi05Config
from halfpi.model import Pi05
from halfpi.perf.cases import STAGES, Case
from halfpi.perf.devices import Device, NoFloorError
from halfpi.quant.sites import Site, matrix_products, quantised_sites

# Bytes an element: of 16-bit tensors, and of the weights of quantised layers by precision.
_WIDE = 2
_WEIGHT_BYTES = {"bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Cost:
    """The necessary work of a stage, or of one operation.

    flops: of products whose operands are quantised (`narrow`) or 16-bit (`wide`), multiply and add
    counted apart, over all passes. weight_bytes, other_bytes: what one pass reads and writes.
    passes: how often it does, 1 or the number of denoising steps.
    """

    narrow_flops: float
    wide_flops: float
    weight_bytes: float
    other_bytes: float
    passes: int = 1

    @property
    def flops(self) -> float:
        """All of them."""
        return self.narrow_flops + self.wide_flops

    def floor_ms(self, device: Device, precision: str) -> float:
        """Milliseconds on `device`; `precision` is that of the quantised layers."""
        rates = {"bf16": device.bf16_tflops.value, "fp8": device.fp8_tflops.value}
        compute_ms = (
            self.narrow_flops / rates[precision] + self.wide_flops / device.bf16_tflops.value
        ) / 1e9
        moved = self.weight_bytes + self.other_bytes
        if moved > device.l2_mb.value * 1e6:
            moved *= self.passes
        return max(compute_ms, moved / device.bandwidth_tbs.value / 1e9)


def floors(device: Device, config: Pi05Config, case: Case) -> dict[str, float]:
    """Milliseconds of vision, prefill, denoise and their total.

    The case's horizon counts, not the config's. Raises NoFloorError as `stage_costs` does.
    """
    costs = stage_costs(config, case)
    by_stage = {name: cost.floor_ms(device, case.precision) for name, cost in costs.items()}
    return {**by_stage, "total": sum(by_stage.values())}


def stage_costs(config: Pi05Config, case: Case) -> dict[str, Cost]:
    """The necessary work of vision, prefill and denoise.

    The products that count as quantised are `quantised_sites`. Raises NoFloorError for a precision
    without rates.
    """
    if case.precision not in _WEIGHT_BYTES:
        known = ", ".join(_WEIGHT_BYTES)
        raise NoFloorError(f"no floor is known in {case.precision}, only in {known}")
    prefix = case.cameras * config.tokens_per_image + case.prompt_tokens
    return {
        "vision": _vision(config, case),
        "prefill": _prefill(config, case, prefix),
        "denoise": _denoise(config, case, prefix),
    }


def _vision(config: Pi05Config, case: Case) -> Cost:
    width, tokens = config.vision_width, config.tokens_per_image
    rows = case.cameras * tokens
    blocks, wide = _layer_weights(config)["vision"]
    wide += 3 * config.patch_size**2 * width + width * config.prefix_width
    attention = config.vision_depth * 4 * rows * tokens * width
    pixels = case.cameras * 3 * config.image_size**2
    return Cost(
        narrow_flops=2 * rows * blocks,
        wide_flops=2 * rows * wide + attention,
        weight_bytes=blocks * _WEIGHT_BYTES[case.precision] + wide * _WIDE,
        other_bytes=pixels + rows * config.prefix_width * _WIDE,
    )


def _prefill(config: Pi05Config, case: Case, prefix: int) -> Cost:
    layers = config.depth - 1  # the last one ends at keys and values
    blocks, wide = _layer_weights(config)["prefill"]
    attention = layers * 4 * config.q_heads * config.head_dim * prefix * prefix
    return Cost(
        narrow_flops=2 * prefix * blocks,
        wide_flops=2 * prefix * wide + attention,
        weight_bytes=blocks * _WEIGHT_BYTES[case.precision] + wide * _WIDE,
        other_bytes=prefix * config.prefix_width * _WIDE + _cache_bytes(config, prefix),
    )


def _denoise(config: Pi05Config, case: Case, prefix: int) -> Cost:
    rows = case.horizon
    blocks, wide = _layer_weights(config)["denoise"]
    wide += 2 * config.action_dim * config.expert_width
    attention = config.depth * 4 * config.q_heads * config.head_dim * rows * (prefix + rows)
    return Cost(
        narrow_flops=case.steps * 2 * rows * blocks,
        wide_flops=case.steps * (2 * rows * wide + attention),
        weight_bytes=blocks * _WEIGHT_BYTES[case.precision] + wide * _WIDE,
        other_bytes=_cache_bytes(config, prefix),
        passes=case.steps,
    )


@cache
def _layer_weights(config: Pi05Config) -> Mapping[str, tuple[int, int]]:
    """Stage → how many weights its layers' products have: those that are quantised, the others."""
    with torch.device("meta"):
        model = Pi05(config)
    quantised = set(quantised_sites(config))
    others = set(matrix_products(config)) - quantised

    def count(sites: Collection[Site], stage: str) -> int:
        layers = (layer for site in sites if site.stage == stage for layer in site.layers(model))
        return sum(layer.weight.numel() for layer in layers)

    return {stage: (count(quantised, stage), count(others, stage)) for stage in STAGES}


def _cache_bytes(config: Pi05Config, prefix: int) -> int:
    """Keys and values of the prefix, over all layers."""
    return config.depth * 2 * prefix * config.kv_heads * config.head_dim * _WIDE
