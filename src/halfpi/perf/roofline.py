"""Floors: the least time in which a device can do a stage's necessary work.

Necessary are the matrix products, at the rate of their format, and reading weights, inputs and
outputs of a stage once, at the memory's bandwidth; the two overlap, so the slower one counts.
Norms, activations and all that stays on the chip cost nothing here. A denoising step reads the
expert and the prefix's keys and values anew, unless they all fit into the L2.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfpi.config import Pi05Config
from halfpi.perf.cases import Case
from halfpi.perf.devices import Device, NoFloorError

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

    The layers that count as quantised are those of `halfpi.quant.sites`. Raises NoFloorError for a
    precision without rates.
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
    narrow = config.vision_depth * width * 2 * config.vision_mlp
    ends = 3 * config.patch_size**2 * width + width * config.prefix_width
    wide = config.vision_depth * width * 4 * width + ends
    attention = config.vision_depth * 4 * rows * tokens * width
    pixels = case.cameras * 3 * config.image_size**2
    return Cost(
        narrow_flops=2 * rows * narrow,
        wide_flops=2 * rows * wide + attention,
        weight_bytes=narrow * _WEIGHT_BYTES[case.precision] + wide * _WIDE,
        other_bytes=pixels + rows * config.prefix_width * _WIDE,
    )


def _prefill(config: Pi05Config, case: Case, prefix: int) -> Cost:
    layers = config.depth - 1  # the last one ends at keys and values
    key_value = 2 * config.prefix_width * config.kv_heads * config.head_dim
    narrow = layers * 3 * config.prefix_width * config.prefix_mlp
    wide = layers * _projections(config, config.prefix_width) + key_value
    attention = layers * 4 * config.q_heads * config.head_dim * prefix * prefix
    return Cost(
        narrow_flops=2 * prefix * narrow,
        wide_flops=2 * prefix * wide + attention,
        weight_bytes=narrow * _WEIGHT_BYTES[case.precision] + wide * _WIDE,
        other_bytes=prefix * config.prefix_width * _WIDE + _cache_bytes(config, prefix),
    )


def _denoise(config: Pi05Config, case: Case, prefix: int) -> Cost:
    rows, width = case.horizon, config.expert_width
    blocks = config.depth * (_projections(config, width) + 3 * width * config.expert_mlp)
    ends = 2 * config.action_dim * width
    attention = config.depth * 4 * config.q_heads * config.head_dim * rows * (prefix + rows)
    return Cost(
        narrow_flops=case.steps * 2 * rows * blocks,
        wide_flops=case.steps * (2 * rows * ends + attention),
        weight_bytes=blocks * _WEIGHT_BYTES[case.precision] + ends * _WIDE,
        other_bytes=_cache_bytes(config, prefix),
        passes=case.steps,
    )


def _projections(config: Pi05Config, width: int) -> int:
    """Weights of one layer's attention: q and o, k and v."""
    return width * (2 * config.q_heads + 2 * config.kv_heads) * config.head_dim


def _cache_bytes(config: Pi05Config, prefix: int) -> int:
    """Keys and values of the prefix, over all layers."""
    return config.depth * 2 * prefix * config.kv_heads * config.head_dim * _WIDE
