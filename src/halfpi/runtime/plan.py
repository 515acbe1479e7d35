"""The plan: the actions that are decided but not yet executed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from halfpi.types import Observation


@dataclass(frozen=True)
class Plan:
    """Actions in the order of their execution, one a tick.

    step: the number of row 0. Steps count the actions that a run has executed, so a plan that is
    late or held up still lines up with the plans before it.
    actions: float32 (r, robot_action_dim). normalized: float32 (r, a), the same as the model has
    them. observation: what they were inferred from. observed_s: when it was made.
    """

    step: int
    actions: NDArray[np.float32]
    normalized: NDArray[np.float32]
    observation: Observation | None
    observed_s: float

    def __len__(self) -> int:
        return len(self.actions)

    def since(self, step: int) -> Plan:
        """The part that begins at `step`, which is not before this plan's own."""
        return self._rows(step, slice(step - self.step, None))

    def first(self, count: int) -> Plan:
        """The first `count` actions, or all if there are fewer."""
        return self._rows(self.step, slice(count))

    def _rows(self, step: int, rows: slice) -> Plan:
        return replace(
            self, step=step, actions=self.actions[rows], normalized=self.normalized[rows]
        )


NO_PLAN = Plan(0, np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32), None, 0.0)
