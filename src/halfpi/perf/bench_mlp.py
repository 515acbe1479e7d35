"""The prefix's gated MLP in bf16, in FP8 that quantises in passes of its own, and hybrid.

One FP8 product is almost twice as fast as one in bf16, but a pass that reads the hidden activations
and writes them in E4M3 gives much of that back. The hybrid's first product writes them in E4M3
itself. All FP8 variants share the library's product for the way down.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from halfpi.model.gemma import GatedMlp
from halfpi.perf.bench import known_device, measured_record
from halfpi.perf.cases import Precision, standard_case
from halfpi.perf.records import Record
from halfpi.perf.roofline import Cost
from halfpi.perf.timing import Call, measure_short, rotation
from halfpi.perf.variants import Fp8Linear, FusedMlp, quantise_pass
from halfpi.quant import scale_for

# 970 rows: 3 cameras of 256 tokens and a prompt of 202.
CASE = dataclasses.replace(standard_case(), prompt_tokens=202)
ROWS = 970
VARIANTS: dict[str, Precision] = {"bf16": "bf16", "fp8, separate": "fp8", "fp8, hybrid": "fp8"}


class MlpVariants:
    """The same MLP of random weights in all variants, and an input for each.

    The hybrid's input is E4M3 already, as the norm before it leaves it.
    """

    def __init__(self, rows: int, width: int, hidden: int, device: torch.device) -> None:
        self.x = torch.randn(rows, width, device=device).bfloat16()
        self.plain = random_mlp(width, hidden, device).bfloat16()
        with torch.no_grad():
            self.separate = _quantised(self.plain, self.x)
            self.hybrid = FusedMlp(self.separate)
            self.narrow_x = quantise_pass(self.x, self.hybrid.input_scale)

    def run(self, name: str) -> Tensor:
        """The output of the variant `name`, (rows, width)."""
        if name == "bf16":
            out: Tensor = self.plain(self.x)
        elif name == "fp8, separate":
            out = self.separate(self.x)
        else:
            out = self.hybrid(self.narrow_x)
        return out

    def error(self, name: str) -> float:
        """‖output − truth‖ / ‖truth‖ against fp32 on the same weights."""
        wide = GatedMlp(self.plain.down.out_features, self.plain.down.in_features)
        wide = wide.to(self.x.device).requires_grad_(False)
        wide.load_state_dict(self.plain.state_dict())
        truth = wide(self.x.float())
        return float((self.run(name) - truth).norm() / truth.norm())


def bench_mlp(
    device: torch.device, width: int = 2048, hidden: int = 16384, *, repeats: int = 200
) -> list[Record]:
    """Time the variants; a record each, with its error against fp32."""
    weights = 3 * width * hidden
    turns = [MlpVariants(ROWS, width, hidden, device) for _ in range(rotation(device, weights))]
    with torch.inference_mode():
        errors = {name: turns[0].error(name) for name in VARIANTS}
        calls = {name: _in_rotation(turns, name) for name in VARIANTS}
        times = measure_short(calls, device, repeats=repeats)
    known, records = known_device(device), []
    for name, precision in VARIANTS.items():
        moved = weights * (1 if precision == "fp8" else 2) + 4 * ROWS * width
        cost = Cost(2 * ROWS * weights, 0, moved, 0)
        record = measured_record(
            "mlp",
            name,
            dataclasses.replace(CASE, precision=precision),
            device,
            {"total": times[name]},
            floor_ms=None if known is None else {"total": cost.floor_ms(known, precision)},
            error=errors[name],
        )
        records.append(record)
    return records


def random_mlp(width: int, hidden: int, device: torch.device) -> GatedMlp:
    """An MLP of random fp32 weights that keeps the size of activations."""
    with torch.device(device), torch.no_grad():
        mlp = GatedMlp(width, hidden)
        for parameter in mlp.parameters():
            parameter.normal_(std=parameter.shape[1] ** -0.5)
    return mlp.requires_grad_(False)


def _quantised(plain: GatedMlp, x: Tensor) -> GatedMlp:
    """`plain` of FP8 layers, its scales from what it makes of `x`."""
    hidden = F.gelu(plain.gate(x), approximate="tanh") * plain.up(x)
    wide = max(_largest(plain.gate.weight), _largest(plain.up.weight))
    narrow = GatedMlp(1, 1)
    for name, layer, weight_largest, inputs in (
        ("gate", plain.gate, wide, x),
        ("up", plain.up, wide, x),
        ("down", plain.down, _largest(plain.down.weight), hidden),
    ):
        scales = scale_for(weight_largest), scale_for(_largest(inputs))
        narrow.set_submodule(name, Fp8Linear(layer, *scales))
    return narrow


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _in_rotation(turns: list[MlpVariants], name: str) -> Call:
    return lambda index: turns[index % len(turns)].run(name)
