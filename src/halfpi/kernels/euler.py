"""The end of a denoising step: velocity, guidance and the Euler step, in one kernel.

The velocity is a product with few outputs, so one program has all of an action's. Guidance is as in
halfpi.model.guidance; with weights of zero it changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from halfpi.kernels.spec import (
    FLOATS,
    Case,
    Device,
    KernelSpec,
    Launch,
    Output,
    Problem,
    check,
    moved_bytes,
)
from halfpi.kernels.tile import begin


def euler_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    actions: Tensor,
    target: Tensor,
    pull: Tensor,
    gain: Tensor,
    decided: int,
    time: float,
    step: float,
) -> tuple[Tensor]:
    """Actions (m, a) after `step` along the guided velocity at `time`; the first `decided` stay.

    hidden: (m, d), weight: (a, d), bias: (a,), of the velocity. target: (m, a), pull: (m,) and
    gain: (1,), of guidance (LeRobot rtc/modeling_rtc.py).
    """
    velocity = F.linear(hidden, weight.to(hidden.dtype)).float() + bias
    error = (target - (actions - time * velocity)) * pull[:, None]
    moved = actions - step * (velocity - gain * error)
    stays = torch.arange(actions.shape[0], device=actions.device) < decided
    return (torch.where(stays[:, None], actions, moved),)


@triton.jit
def _euler_kernel(
    hidden, weight, bias, actions, target, pull, gain, decided, time, step, A, D,
    BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    outs = tl.arange(0, BLOCK_A)
    valid = outs < A
    velocity = tl.load(bias + outs, mask=valid, other=0.0)
    begin(PDL)
    sums = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        cols = first + tl.arange(0, BLOCK_D)
        inside = cols < D
        one = tl.load(hidden + row * D + cols, mask=inside, other=0.0).to(tl.float32)
        rows = tl.load(
            weight + outs[:, None] * D + cols[None, :],
            mask=valid[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        sums += rows * one[None, :]
    velocity += tl.sum(sums, 1)
    places = row * A + outs
    action = tl.load(actions + places, mask=valid, other=0.0)
    wanted = tl.load(target + places, mask=valid, other=0.0)
    error = (wanted - (action - time * velocity)) * tl.load(pull + row)
    moved = action - step * (velocity - tl.load(gain) * error)
    tl.store(actions + places, moved, mask=valid & (row >= tl.load(decided)))


def euler(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    actions: Tensor,
    target: Tensor,
    pull: Tensor,
    gain: Tensor,
    decided: Tensor,
    time: float,
    step: float,
    launch: Launch,
) -> None:
    """Write `euler_reference` to `actions` (m, a), in place.

    hidden: bfloat16 or fp32 (m, d). decided: int32 (1,). All others: fp32.

    Raises ValueError naming the tensor whose shape, layout or dtype is wrong.
    """
    (m, d), a = hidden.shape, weight.shape[0]
    check("hidden", hidden, (m, d), *FLOATS)
    shapes = {
        "weight": (weight, (a, d)),
        "bias": (bias, (a,)),
        "actions": (actions, (m, a)),
        "target": (target, (m, a)),
        "pull": (pull, (m,)),
        "gain": (gain, (1,)),
    }
    for name, (tensor, shape) in shapes.items():
        check(name, tensor, shape, torch.float32)
    check("decided", decided, (1,), torch.int32)
    _euler_kernel[(m,)](
        hidden, weight, bias, actions, target, pull, gain, decided, time, step, a, d,
        BLOCK_A=triton.next_power_of_2(a), BLOCK_D=128, **launch.options(),
    )  # fmt: skip


def _problem(case: Case, launch: Launch, device: torch.device) -> Problem:
    m, d, a = case["m"], case["d"], case["a"]
    tensors: dict[str, Any] = {
        "hidden": torch.randn(m, d, device=device).to(case.dtype),
        "weight": torch.randn(a, d, device=device) * d**-0.5,
        "bias": torch.randn(a, device=device),
        "actions": torch.randn(m, a, device=device),
        "target": torch.randn(m, a, device=device),
        "pull": torch.rand(m, device=device),
        "gain": torch.full((1,), 1.5, device=device),
    }
    scalars: dict[str, Any] = {"time": 0.7, "step": 0.1}
    output = Output(tensors["actions"].clone())
    decided = torch.full((1,), case["decided"], dtype=torch.int32, device=device)
    return Problem(
        run=lambda: euler(
            **{**tensors, "actions": output.tensor}, decided=decided, **scalars, launch=launch
        ),
        reference=euler_reference,
        inputs={**tensors, "decided": case["decided"], **scalars},
        outputs=(output,),
        flops=2 * m * a * d,
        bytes=moved_bytes(tensors, output.tensor),
    )


def _launches(case: Case, device: Device) -> tuple[Launch, ...]:
    del case
    return tuple(Launch(warps, pdl=device.is_hopper_or_newer) for warps in (4, 8))


def _cases() -> Iterator[Case]:
    out = torch.float32
    yield Case("expert", {"m": 50, "d": 1024, "a": 32, "decided": 4}, torch.float32, out)
    yield Case("ragged", {"m": 7, "d": 200, "a": 6, "decided": 0}, torch.float32, out, real=False)
    yield Case("ragged-small", {"m": 3, "d": 72, "a": 2, "decided": 1}, out_dtype=out, real=False)


SPEC = KernelSpec("euler", tuple(_cases()), _problem, _launches)
