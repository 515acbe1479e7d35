"""Checkpoints of π0.5: read every format that exists, strictly, and write one of our own."""

from __future__ import annotations

from halfpi.checkpoints.checkpoint import Checkpoint, CheckpointSummary, open_checkpoint
from halfpi.checkpoints.convert import convert
from halfpi.checkpoints.errors import CheckpointError
from halfpi.checkpoints.load import load_model, model_of_module
from halfpi.checkpoints.save import save_model

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointSummary",
    "convert",
    "load_model",
    "model_of_module",
    "open_checkpoint",
    "save_model",
]
