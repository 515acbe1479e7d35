"""Real-time chunking: a new chunk continues the plan that is executed while it is inferred.

Two ways: guidance of a model that knows nothing of it, and a model that was trained with the first
actions given. Unlike LeRobot's runtime, the plan is never padded: beyond its end a chunk is free,
where padding with zeros would pull it to the mean of the training data.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from halfpi.model import Guidance
from halfpi.runtime.plan import Plan
from halfpi.runtime.schedulers import Asynchronous, Request, require_in

Schedule = Literal["zeros", "ones", "linear", "exp"]


class GuidedRtc(Asynchronous):
    """Asynchronous, with every denoising step guided towards the plan (`halfpi.model.Guidance`).

    threshold: as in `Asynchronous`; leave more than the calls take. execution_horizon: how many
    actions of the plan guide at most. schedule: how the pull fades after the actions that will be
    executed before the chunk arrives. max_gain: bound of the pull. Defaults are LeRobot's.
    """

    def __init__(
        self,
        threshold: int,
        execution_horizon: int = 10,
        schedule: Schedule = "linear",
        max_gain: float = 10.0,
    ) -> None:
        super().__init__(threshold)
        if schedule not in get_args(Schedule):
            raise ValueError(
                f"schedule must be one of {', '.join(get_args(Schedule))}, got {schedule!r}"
            )
        if not max_gain > 0:
            raise ValueError(f"max_gain must be positive, got {max_gain}")
        self.execution_horizon = execution_horizon
        self.schedule: Schedule = schedule
        self.max_gain = max_gain

    def start(self, horizon: int) -> None:
        """Also checks that the execution horizon fits."""
        require_in("execution_horizon", self.execution_horizon, 1, horizon)
        super().start(horizon)

    def request(self, plan: Plan, delay: int | None) -> Request:
        """Guidance towards what is left of the plan, all of it decided if the delay is unknown."""
        rest = torch.from_numpy(plan.normalized[: self.execution_horizon])
        if not len(rest):
            return Request()
        shape = (self.horizon, rest.shape[1])
        delay = len(rest) if delay is None else delay
        return Request(guidance=guidance(rest, delay, shape, self.schedule, self.max_gain))


class TrainedRtc(Asynchronous):
    """Asynchronous, with the first actions given to a model that was trained to continue them.

    max_delay: the most actions that were given in training (Black et al. 2025, "Training-Time
    Action Conditioning for Efficient Real-Time Chunking"); 6 for nano.
    """

    def __init__(self, threshold: int, max_delay: int) -> None:
        super().__init__(threshold)
        self.max_delay = max_delay

    def start(self, horizon: int) -> None:
        """Also checks that the longest delay fits."""
        require_in("max_delay", self.max_delay, 1, horizon)
        super().start(horizon)

    def request(self, plan: Plan, delay: int | None) -> Request:
        """The actions that the call's delay will use up, or the most allowed if it is unknown."""
        count = self.max_delay if delay is None else min(delay, self.max_delay)
        return Request(given=plan.first(count).normalized if len(plan) else None)


def guidance(
    rest: Tensor, delay: int, shape: tuple[int, int], schedule: Schedule, max_gain: float
) -> Guidance:
    """Guidance of a chunk of `shape` (h, a) towards the `rest` of a plan, fp32 (r ≤ h, ≤ a).

    The first `delay` actions are decided, and the pull fades over the others by `schedule`.
    Dimensions that `rest` does not have are pulled to 0, as in LeRobot.
    """
    target = torch.zeros(shape)
    target[: rest.shape[0], : rest.shape[1]] = rest
    weights = prefix_weights(schedule, min(delay, len(rest)), len(rest), shape[0])
    return Guidance(target, weights, max_gain)


def prefix_weights(schedule: Schedule, delay: int, overlap: int, horizon: int) -> Tensor:
    """Weights of a guidance, fp32 (horizon,) (LeRobot rtc/modeling_rtc.py, get_prefix_weights).

    1 for the first `delay` actions, 0 from `overlap` on. Between them "zeros" and "ones" say what
    they are; "linear" falls evenly; "exp" is u·(eᵘ − 1)/(e − 1) of the linear u.
    Expects delay ≤ overlap ≤ horizon.
    """
    if schedule == "zeros":
        fading = torch.zeros(overlap - delay)
    elif schedule == "ones":
        fading = torch.ones(overlap - delay)
    else:
        fading = torch.linspace(1, 0, overlap - delay + 2)[1:-1]
        if schedule == "exp":
            fading = fading * fading.expm1() / (torch.e - 1)
    return torch.cat([torch.ones(delay), fading, torch.zeros(horizon - overlap)])
