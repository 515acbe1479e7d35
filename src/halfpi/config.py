"""Configuration as frozen dataclasses, and the presets that go by name.

`Pi05Config` is the architecture and says nothing about a robot; `ProcessingConfig` is everything
between a robot's observation and the model's tensors. Both are stored beside the weights in
halfpi's own format. `EngineConfig` is how a model is run, and is stored nowhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

ResizeRule = Literal["pil", "interpolate", "interpolate-0.4"]
NormRule = Literal["openpi", "lerobot"]
NormMode = Literal["quantile", "quantile10", "mean_std", "min_max", "identity"]
RobotName = Literal["none", "libero", "droid", "aloha", "metaworld"]
Backend = Literal["eager", "compile", "triton"]
Precision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True)
class Pi05Config:
    """The architecture of one π0.5. Defaults are the released size (3.35 B parameters).

    The prefix and the expert share `depth`, `q_heads`, `kv_heads` and `head_dim`, because the
    expert attends to the prefix's keys and values layer by layer.
    """

    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1152
    vision_mlp: int = 4304
    vision_depth: int = 27
    vision_heads: int = 16

    vocab_size: int = 257_152
    prefix_width: int = 2048
    prefix_mlp: int = 16_384
    expert_width: int = 1024
    expert_mlp: int = 4096
    depth: int = 18
    q_heads: int = 8
    kv_heads: int = 1
    head_dim: int = 256

    action_dim: int = 32
    horizon: int = 50
    max_prompt_tokens: int = 200
    time_min_period: float = 4e-3
    time_max_period: float = 4.0

    def __post_init__(self) -> None:
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            if value <= 0:
                raise ValueError(f"Pi05Config.{field_.name} must be positive, got {value}")
        _require_multiple("image_size", self.image_size, "patch_size", self.patch_size)
        _require_multiple("vision_width", self.vision_width, "vision_heads", self.vision_heads)
        _require_multiple("q_heads", self.q_heads, "kv_heads", self.kv_heads)
        _require_multiple("head_dim", self.head_dim, "2 (for RoPE)", 2)
        _require_multiple("expert_width", self.expert_width, "2 (for the time embedding)", 2)

    @property
    def tokens_per_image(self) -> int:
        """Image tokens a camera contributes to the prefix."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def vision_head_dim(self) -> int:
        """Width of one SigLIP attention head."""
        return self.vision_width // self.vision_heads


def _require_multiple(name: str, value: int, of_name: str, of: int) -> None:
    if value % of:
        raise ValueError(f"Pi05Config.{name} must be a multiple of {of_name}, got {value} and {of}")


@dataclass(frozen=True)
class FeatureStats:
    """Statistics of one feature (state or action) in training; each a tuple of its length."""

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    q01: tuple[float, ...] | None = None
    q99: tuple[float, ...] | None = None
    q10: tuple[float, ...] | None = None
    q90: tuple[float, ...] | None = None
    min: tuple[float, ...] | None = None
    max: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ProcessingConfig:
    """How an observation becomes tensors and a model output becomes robot actions.

    `cameras` are the keys of `Observation.images` in the order in which the model sees them; names
    carry no other meaning. `norm_rule` selects whose formulas are used (openpi adds an epsilon to
    every denominator, LeRobot replaces a zero denominator by it); with no statistics a feature
    passes unchanged. `prompt_state_dim` pads the state in the prompt with zeros to that length, as
    LeRobot 0.4 did. `delta_mask` marks the action dimensions predicted relative to the current
    state.
    """

    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    image_size: int = 224
    resize: ResizeRule = "pil"

    norm_rule: NormRule = "openpi"
    state_norm: NormMode = "quantile"
    action_norm: NormMode = "quantile"
    norm_eps: float = 1e-6
    state_stats: FeatureStats | None = None
    action_stats: FeatureStats | None = None

    state_in_prompt: bool = True
    prompt_state_dim: int | None = None
    max_prompt_tokens: int = 200
    default_prompt: str | None = None

    robot: RobotName = "none"
    robot_action_dim: int = 32
    delta_mask: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class EngineConfig:
    """How an engine runs a model.

    backend: "eager" is plain torch, on any device; "compile" is the same through torch.compile;
    "triton" plans once and replays CUDA graphs of halfpi's kernels. precision: "fp8" needs scales.

    The rest is what "triton" plans for, and a call beyond it is refused. num_steps: the numbers of
    Euler steps. max_cameras, max_prompt_tokens: the most of each; fewer cost less.
    persistent_expert: denoise in one kernel for all steps, where the GPU and the model's sizes
    allow it (Hopper), instead of a chain of kernels.

    Raises ValueError that names the field whose value is wrong.
    """

    backend: Backend = "eager"
    precision: Precision = "fp32"
    num_steps: tuple[int, ...] = (10,)
    max_cameras: int = 3
    max_prompt_tokens: int = 200
    persistent_expert: bool = True

    def __post_init__(self) -> None:
        for name, choice in (("backend", Backend), ("precision", Precision)):
            value, allowed = getattr(self, name), get_args(choice)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not self.num_steps or min(self.num_steps) < 1:
            raise ValueError(f"num_steps must hold numbers of at least 1, got {self.num_steps}")
        for name in ("max_cameras", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def to_json(config: Pi05Config | ProcessingConfig) -> dict[str, Any]:
    """A JSON-ready dictionary of `config`."""
    return dataclasses.asdict(config)


def pi05_from_json(data: Mapping[str, Any]) -> Pi05Config:
    """Rebuild a `Pi05Config`; raises ValueError that names an unknown field."""
    return Pi05Config(**_known(Pi05Config, data))


def processing_from_json(data: Mapping[str, Any]) -> ProcessingConfig:
    """Rebuild a `ProcessingConfig`; raises ValueError that names an unknown field."""
    known = _known(ProcessingConfig, data)
    for name in ("cameras", "delta_mask"):
        if known.get(name) is not None:
            known[name] = tuple(known[name])
    for name in ("state_stats", "action_stats"):
        if known.get(name) is not None:
            stats = _known(FeatureStats, known[name])
            known[name] = FeatureStats(
                **{k: None if v is None else tuple(v) for k, v in stats.items()}
            )
    return ProcessingConfig(**known)


def _known(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {field_.name for field_ in dataclasses.fields(cls)}
    unknown = sorted(set(data) - names)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
    return dict(data)


PRESETS: Mapping[str, Pi05Config] = {
    "pi05": Pi05Config(),
    "pi05-libero": Pi05Config(horizon=10),
    "pi05-droid": Pi05Config(horizon=15),
    "nano": Pi05Config(
        image_size=112,
        vision_width=192,
        vision_mlp=512,
        vision_depth=4,
        vision_heads=3,
        vocab_size=832,
        prefix_width=192,
        prefix_mlp=512,
        expert_width=128,
        expert_mlp=384,
        depth=4,
        q_heads=4,
        head_dim=64,
        action_dim=4,
        horizon=16,
        max_prompt_tokens=48,
    ),
}
