"""FP8 hybrid precision in plain torch, on any device: what it does to actions, not to speed.

Every site multiplies the E4M3 values that the kernels multiply, in fp32, where their products are
exact. Two details differ from a fused kernel: sums are fp32 throughout, where Hopper's tensor cores
keep fewer bits, and what enters a site was rounded to bf16 first, where a kernel that produces it
quantises straight from fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfpi.model import Pi05, PrefixCache
from halfpi.quant.formats import quantise
from halfpi.quant.scales import Scales
from halfpi.quant.sites import quantised_sites


@dataclass
class _Step:
    """The denoising step that is running."""

    index: int = 0


class FakeQuantLinear(nn.Module):
    """`linear` with input and weight in E4M3, sums and bias in fp32.

    The input has one scale, or one for each value of `step`. The output has the input's dtype.
    """

    def __init__(
        self, linear: nn.Linear, weight_scale: float, input_scales: tuple[float, ...], step: _Step
    ) -> None:
        super().__init__()
        self.weight_scale = weight_scale
        self.input_scales = input_scales
        self.step = step
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", quantise(linear.weight.detach(), weight_scale).float())
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product for `x` (..., in) → (..., out)."""
        scale = self.input_scales[self.step.index]
        sums = F.linear(quantise(x, scale).float(), self.weight) * (scale * self.weight_scale)
        return (sums if self.bias is None else sums + self.bias).to(x.dtype)


class FakeQuantPi05(Pi05):
    """`model` as FP8 hybrid precision runs it; a `Pi05` for inference with `scales.num_steps`.

    Sites hold E4M3 values; everything else is bfloat16, with the exceptions of `Pi05.to_dtype`.
    `model` stays as it is; unchanged parameters are shared with it.

    Raises ValueError when `scales` are of another model.
    """

    def __init__(self, model: Pi05, scales: Scales) -> None:
        scales.check(model.config)
        with torch.device("meta"):
            super().__init__(model.config)
        self.load_state_dict(model.state_dict(), assign=True)
        self._num_steps = scales.num_steps
        self._step = _Step()
        always = _Step()
        for site in quantised_sites(model.config):
            own = scales.sites[site.name]
            step = self._step if site.per_step else always
            for name, linear in zip(site.linears, site.layers(self), strict=True):
                self.set_submodule(name, FakeQuantLinear(linear, own.weight, own.input, step))
        self.to_dtype(torch.bfloat16).requires_grad_(False).eval()

    def velocity(self, cache: PrefixCache, actions: Tensor, time: Tensor) -> Tensor:
        """As `Pi05.velocity`, with the scales of the step that is nearest to the latest `time`."""
        step = round((1 - float(time.max())) * self._num_steps)
        self._step.index = min(step, self._num_steps - 1)
        return super().velocity(cache, actions, time)

    def _schedule(
        self, num_steps: int, noise: Tensor, decided: int
    ) -> Iterator[tuple[float, list[Tensor]]]:
        if num_steps != self._num_steps:
            raise ValueError(
                f"the scales are for {self._num_steps} denoising steps, got num_steps={num_steps}; "
                "calibrate with as many steps as will run"
            )
        for index, step in enumerate(super()._schedule(num_steps, noise, decided)):
            self._step.index = index
            yield step
