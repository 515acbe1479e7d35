"""π0.5 in plain torch, at any size: the numerical truth for every faster path."""

from __future__ import annotations

from halfpi.model.gemma import PrefixCache
from halfpi.model.guidance import Guidance
from halfpi.model.pi05 import Pi05, schedule_times

__all__ = ["Guidance", "Pi05", "PrefixCache", "schedule_times"]
