"""What a call costs: limits of devices, floors of stages, timing, records and their tables."""

from __future__ import annotations
