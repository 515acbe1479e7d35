"""State and action normalisation, by openpi's and by LeRobot's formulas.

Every mode is affine: `(x - offset) / scale`, then `2x - 1` for the modes that map a range to
[-1, 1]. The frameworks differ in how they keep from dividing by zero, in precision (openpi computes
in float64, LeRobot in float32, which decides a state's bin at its edges), and in what they do when
statistics and data differ in length.

Sources: openpi transforms.py (Normalize, Unnormalize); LeRobot processor/normalize_processor.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfpi.config import FeatureStats, NormMode, NormRule

Floats = NDArray[np.floating[Any]]

# The two statistics of each mode that has a range: what maps to -1 and what maps to 1.
_RANGES: Mapping[NormMode, tuple[str, str]] = {
    "quantile": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
    "min_max": ("min", "max"),
}


class Normalizer:
    """Normalises one feature and takes it back.

    feature: its name in errors. eps: keeps denominators from zero, so it must be positive.
    Without statistics, or in mode "identity", values pass unchanged. Both directions compute in,
    and return, float64 by openpi's rule and float32 by LeRobot's. Nothing is clipped.

    Raises ValueError when the mode's statistics are missing, of unequal length or not finite.
    """

    def __init__(
        self, feature: str, mode: NormMode, rule: NormRule, eps: float, stats: FeatureStats | None
    ) -> None:
        if not eps > 0:
            raise ValueError(f"norm_eps must be positive, got {eps}")
        self._feature = feature
        self._rule = rule
        self._eps = eps
        self._dtype: type[np.floating[Any]] = np.float64 if rule == "openpi" else np.float32
        self._affine = stats is not None and mode != "identity"
        self._has_range = mode in _RANGES
        if stats is None or mode == "identity":
            return
        first, second = self._statistics(stats, *_RANGES.get(mode, ("mean", "std")))
        scale = second - first if self._has_range else second
        self._offset = first
        self._scale, self._inverse_scale = self._safe(scale)

    def normalize(self, values: Floats) -> Floats:
        """(..., dim) in the robot's units → (..., dim), mostly in [-1, 1].

        openpi's rule reads the first dim statistics, LeRobot's wants exactly dim of them.
        Raises ValueError when there are too few, or, by LeRobot's rule, too many.
        """
        x = values.astype(self._dtype)
        if not self._affine:
            return x
        dim = x.shape[-1]
        if dim > len(self._offset):
            raise self._length_error(dim)
        self._check_equal_length(dim)
        scaled = (x - self._offset[:dim]) / self._scale[:dim]
        return scaled * 2 - 1 if self._has_range else scaled

    def unnormalize(self, values: Floats) -> Floats:
        """The inverse of `normalize`, (..., dim) → (..., dim).

        By openpi's rule dimensions beyond the statistics have offset 0 and scale 1, which leaves
        them unchanged in the modes with a range and multiplies them by 1 + eps in "mean_std".
        Raises ValueError when, by LeRobot's rule, there are not exactly dim statistics.
        """
        x = values.astype(self._dtype)  # a copy, which the steps below work on
        if not self._affine:
            return x
        self._check_equal_length(x.shape[-1])
        known = min(x.shape[-1], len(self._offset))
        head = x[..., :known]
        if self._has_range:
            head[...] = (head + 1) / 2
        else:
            x[..., known:] *= 1 + self._eps
        head[...] = head * self._inverse_scale[:known] + self._offset[:known]
        return x

    def _statistics(self, stats: FeatureStats, first: str, second: str) -> tuple[Floats, Floats]:
        arrays = []
        for name in (first, second):
            values = getattr(stats, name)
            if values is None:
                raise ValueError(f"{self._feature} normalisation needs the statistic {name}")
            arrays.append(np.asarray(values, dtype=self._dtype))
            if not np.isfinite(arrays[-1]).all():
                raise ValueError(f"{self._feature} statistic {name} must be finite, got {values}")
        if len(arrays[0]) != len(arrays[1]):
            raise ValueError(
                f"{self._feature} statistics {first} and {second} must be of one length, "
                f"got {len(arrays[0])} and {len(arrays[1])}"
            )
        return arrays[0], arrays[1]

    def _safe(self, scale: Floats) -> tuple[Floats, Floats]:
        """The divisor of the way in and the factor of the way out."""
        eps = self._dtype(self._eps)
        if self._rule == "openpi":
            return scale + eps, scale + eps
        if self._has_range:
            safe = np.where(scale == 0, eps, scale)
            return safe, safe
        return scale + eps, scale  # LeRobot adds the epsilon on the way in only

    def _check_equal_length(self, dim: int) -> None:
        if self._rule == "lerobot" and dim != len(self._offset):
            raise self._length_error(dim)

    def _length_error(self, dim: int) -> ValueError:
        return ValueError(
            f"{self._feature} has {dim} values, but its statistics have {len(self._offset)}"
        )
