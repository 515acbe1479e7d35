"""Guidance: pulling a chunk, while it is denoised, towards actions that are already planned.

This is real-time chunking without training (Black et al. 2025, "Real-Time Execution of Action
Chunking Flow Policies"), in LeRobot's form (rtc/modeling_rtc.py). The paper takes the gradient of
the predicted actions through the network; LeRobot's velocity is a constant in that gradient, which
leaves the identity, so a guided step costs no more than a plain one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """Where each action of a chunk is pulled to, and how strongly.

    target: fp32 (..., h, a), normalised actions; rows of weight 0 are not looked at.
    weights: fp32 (..., h), from 0 (the action is free) to 1 (it is decided).
    max_gain: bound of the gain, which grows without limit towards both ends of the flow.
    """

    target: Tensor
    weights: Tensor
    max_gain: float = 10.0

    def to(self, device: torch.device) -> Guidance:
        """The same on `device`."""
        return Guidance(self.target.to(device), self.weights.to(device), self.max_gain)

    def steer(self, velocity: Tensor, actions: Tensor, time: float) -> Tensor:
        """`velocity` (..., h, a) at noisy `actions` (..., h, a), turned towards the target.

        time: of the flow, in (0, 1]; 1 is noise. The error is that of the actions at which a
        straight path from here would end.
        """
        error = (self.target - (actions - time * velocity)) * self.weights[..., None]
        return velocity - self.gain(time) * error

    def gain(self, time: float) -> float:
        """t/τ · (t² + τ²)/t², at most `max_gain`; t is `time` and τ = 1 − t."""
        done = 1 - time
        if done <= 0:
            return self.max_gain
        return min(self.max_gain, (time**2 + done**2) / (time * done))
