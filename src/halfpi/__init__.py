"""A real-time inference engine for the robot policy π0.5.

The public names load on first use, so `import halfpi` alone imports neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfpi.checkpoints import load_model
    from halfpi.config import Pi05Config
    from halfpi.integrations.lerobot import accelerate, restore
    from halfpi.policy import Policy, load_policy
    from halfpi.types import ActionChunk, Observation

__version__ = "0.1.0"

__all__ = [
    "ActionChunk",
    "Observation",
    "Pi05Config",
    "Policy",
    "__version__",
    "accelerate",
    "load_model",
    "load_policy",
    "restore",
]

_EXPORTS = {
    "ActionChunk": "halfpi.types",
    "Observation": "halfpi.types",
    "Pi05Config": "halfpi.config",
    "Policy": "halfpi.policy",
    "accelerate": "halfpi.integrations.lerobot",
    "load_model": "halfpi.checkpoints",
    "load_policy": "halfpi.policy",
    "restore": "halfpi.integrations.lerobot",
}


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'halfpi' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
