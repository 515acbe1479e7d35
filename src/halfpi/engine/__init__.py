"""Engines run the three stages of a model, planned once for a device."""

from __future__ import annotations

from halfpi.engine.eager import EagerEngine

__all__ = ["EagerEngine"]
