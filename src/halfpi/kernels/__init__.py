"""Triton kernels, one operation a file; they know shapes and pointers, and nothing of models.

Each file holds the operation in plain torch, the Triton kernel, the launcher that writes into given
tensors, and a `KernelSpec` named SPEC. Importing the package needs neither Triton nor a GPU.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from halfpi.kernels.spec import KernelSpec


def specs() -> dict[str, KernelSpec[Any]]:
    """The spec of every kernel file, by name. Raises ImportError without Triton."""
    modules = (
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    )
    found = [module.SPEC for module in modules if hasattr(module, "SPEC")]
    return {spec.name: spec for spec in found}
