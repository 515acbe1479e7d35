"""What a request may ask beyond openpi's protocol, and the checks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from halfpi.model import Guidance

EXTRAS = "halfpi"
"""The one key of a request that only halfpi knows; its value is a dictionary, see `Extras`."""

_ARRAYS = ("noise", "given", "target", "weights")


@dataclass(frozen=True)
class Extras:
    """The fields under `EXTRAS`; plain clients send none of them.

    steps: Euler steps. noise: float (h, a). given: float (d, a), the first actions of the chunk,
    normalised, if they are decided already (real-time chunking of a model trained for it).
    target: float (r, a), r ≤ h, normalised: where guidance pulls the first r actions of the chunk
    (real-time chunking of any model). weights: float (r,) in [0, 1], how strongly. max_gain: bound
    of the pull. normalized: whether the reply also holds the chunk as the model gave it, float32
    (h, a), to be fed back as `given` or `target`.

    Raises ValueError naming the field, what was expected and what came.
    """

    steps: int | None = None
    noise: NDArray[np.float32] | None = None
    given: NDArray[np.float32] | None = None
    target: NDArray[np.float32] | None = None
    weights: NDArray[np.float32] | None = None
    max_gain: float = field(default=Guidance.max_gain)
    normalized: bool = False

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, np.ndarray) and value.dtype.kind == "f"
            ):
                raise ValueError(f"{name!r} must be a float array, got {_kind(value)}")
        if not isinstance(self.normalized, bool):
            raise ValueError(f"'normalized' must be true or false, got {_kind(self.normalized)}")
        if type(self.max_gain) not in (int, float) or not 0 < self.max_gain < np.inf:
            raise ValueError(f"'max_gain' must be a positive number, got {self.max_gain!r}")
        if (self.target is None) != (self.weights is None):
            raise ValueError("guidance needs both 'target' and 'weights', got only one of them")

    def guidance(self, horizon: int, action_dim: int) -> Guidance | None:
        """The guidance of a chunk of `horizon` actions; those beyond the target are free.

        Raises ValueError on shapes that do not fit and values that cannot be.
        """
        if self.target is None or self.weights is None:
            return None
        rows = self.target.shape[0] if self.target.ndim else 0
        if self.target.shape != (rows, action_dim) or not 1 <= rows <= horizon:
            raise ValueError(
                f"'target' must have shape (1 to {horizon}, {action_dim}), got {self.target.shape}"
            )
        if self.weights.shape != (rows,):
            raise ValueError(f"'weights' must have shape ({rows},), got {self.weights.shape}")
        if not ((self.weights >= 0) & (self.weights <= 1)).all():
            raise ValueError(f"'weights' must be in [0, 1], got {self.weights}")
        target, weights = torch.zeros(horizon, action_dim), torch.zeros(horizon)
        target[:rows] = torch.tensor(self.target, dtype=torch.float32)
        weights[:rows] = torch.tensor(self.weights, dtype=torch.float32)
        return Guidance(target, weights, float(self.max_gain))


def extras_of(data: object, max_steps: int) -> Extras:
    """The extras in `data`, what a request has under `EXTRAS`. Raises ValueError like `Extras`."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{EXTRAS!r} must be a dictionary, got {type(data).__name__}")
    known = [one.name for one in fields(Extras)]
    unknown = sorted(set(data).difference(known))
    if unknown:
        raise ValueError(f"{EXTRAS!r} has no {', '.join(unknown)}: expected {', '.join(known)}")
    extras = Extras(**data)
    steps: Any = extras.steps
    if steps is not None and not (type(steps) is int and 1 <= steps <= max_steps):
        raise ValueError(f"'steps' must be an int from 1 to {max_steps}, got {steps!r}")
    return extras


def _kind(value: object) -> str:
    return f"{value.dtype} array" if isinstance(value, np.ndarray) else type(value).__name__
