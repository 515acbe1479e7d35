"""Engines run the three stages of a model, planned once for a device."""

from __future__ import annotations

from halfpi.engine.eager import EagerEngine, Noise, drawn
from halfpi.engine.make import BatchEngine, Engine, make_engine

__all__ = ["BatchEngine", "EagerEngine", "Engine", "Noise", "drawn", "make_engine"]
