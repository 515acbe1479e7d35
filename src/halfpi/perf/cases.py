"""The cases that are measured: everything that decides what a call costs, but the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

STAGES = ("vision", "prefill", "denoise")
Precision = Literal["fp32", "bf16", "fp8", "nvfp4"]


@dataclass(frozen=True)
class Case:
    """One workload.

    model: a preset of `Pi05Config`, or the name of a checkpoint. reuse: what a call takes over from
    the one before, "none" or the name of a policy.

    Raises ValueError that names the field whose type or value is wrong.
    """

    model: str
    cameras: int
    prompt_tokens: int
    horizon: int
    steps: int
    precision: Precision
    reuse: str = "none"

    def __post_init__(self) -> None:
        for name in ("cameras", "prompt_tokens", "horizon", "steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"Case.{name} must be an int of at least 1, got {value!r}")
        for name in ("model", "reuse"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise ValueError(f"Case.{name} must be a text, got {value!r}")
        if self.precision not in get_args(Precision):
            allowed = ", ".join(get_args(Precision))
            raise ValueError(f"Case.precision must be one of {allowed}, got {self.precision!r}")


def weights_dtype(precision: str) -> str:
    """Of a model that is measured in `precision`, as in `load_model`: fp8 starts from bf16."""
    return "float32" if precision == "fp32" else "bfloat16"


# Variants of the ablation → their precisions; each keeps the changes of those before it.
ABLATION: Mapping[str, Precision] = {
    "eager": "bf16",
    "graph": "bf16",
    "fused attention": "bf16",
    "naive fp8": "fp8",
    "fused fp8": "fp8",
    "no reformats": "fp8",
    "restructured expert": "fp8",
}

# What an engine on an H200 is to stay below in the standard case, in milliseconds.
TARGETS: Mapping[Precision, Mapping[str, float]] = {
    "bf16": {"vision": 1.8, "prefill": 6.5, "denoise": 3.6, "total": 11.5},
    "fp8": {"vision": 1.4, "prefill": 4.0, "denoise": 2.8, "total": 7.8},
}


def standard_case(precision: Precision = "bf16") -> Case:
    """The case that all engines of π0.5 are compared in: 3 cameras and a full prompt."""
    return Case("pi05", cameras=3, prompt_tokens=200, horizon=50, steps=10, precision=precision)
